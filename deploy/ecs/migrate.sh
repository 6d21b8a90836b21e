#!/usr/bin/env bash
# Migrate the database with the image of a release, before that release is deployed:
#
#     migrate.sh NAME IMAGE          such as: migrate.sh shop-prod 123456789012.dkr.ecr.eu-central-1.../shop-prod@sha256:...
#
# It ends with the exit code of `fastapi-prodkit db upgrade`. RELEASE_ROLE is the role that CloudFormation acts in
# (release.yaml).
set -euo pipefail

[ $# = 2 ] || { echo "usage: $0 NAME IMAGE" >&2; exit 2; }
here=$(dirname "$0")

aws cloudformation deploy --stack-name "$1-tasks" --template-file "$here/tasks.yaml" --no-fail-on-empty-changeset \
  ${RELEASE_ROLE:+--role-arn "$RELEASE_ROLE"} --parameter-overrides "Name=$1" "Image=$2"
exec "$here/run-task.sh" "$1" migrate
