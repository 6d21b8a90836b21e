#!/usr/bin/env bash
# Run a task of tasks.yaml, wait for it, show its log, and exit with its exit code:
#
#     run-task.sh NAME TASK          such as: run-task.sh shop-prod migrate
#
# It waits for TASK_HOURS hours at most, by default one. Then it fails, and the task continues.
set -euo pipefail

[ $# = 2 ] || { echo "usage: $0 NAME TASK" >&2; exit 2; }
name=$1 task=$2

output() {
  aws cloudformation describe-stacks --stack-name "$name-$1" --output text \
    --query "Stacks[0].Outputs[?OutputKey=='$2'].OutputValue"
}

definition=$(output tasks "$task")
[ -n "$definition" ] || { echo "$name-tasks has no task '$task'" >&2; exit 2; }
network="awsvpcConfiguration={subnets=[$(output network TaskSubnets)],securityGroups=[$(output network ServiceGroup)]}"

arn=$(aws ecs run-task --cluster "$name" --task-definition "$definition" --launch-type FARGATE --count 1 \
  --network-configuration "$network" --query 'tasks[0].taskArn' --output text)
[ "$arn" != None ] || { echo "$task could not be started: the cluster has no room, or the network is wrong" >&2; exit 1; }
echo "$task runs: $arn" >&2

# `aws ecs wait` fails after ten minutes.
for ((waits = 6 * ${TASK_HOURS:-1}; waits > 0; waits--)); do
  aws ecs wait tasks-stopped --cluster "$name" --tasks "$arn" && break
done

aws logs get-log-events --log-group-name "/ecs/$name" --log-stream-name "task/$task/${arn##*/}" --start-from-head \
  --query 'events[].message' --output text | tr '\t' '\n' || true # a task that was not started has no log

read -r status code reason < <(aws ecs describe-tasks --cluster "$name" --tasks "$arn" --output text \
  --query 'tasks[0].[lastStatus, containers[0].exitCode, stoppedReason]')
[ "$status" = STOPPED ] || { echo "$task still runs; gave up waiting for it" >&2; exit 1; }
[ "$code" != None ] || { echo "$task did not start: $reason" >&2; exit 1; }
echo "$task ended with exit code $code" >&2
exit "$code"
