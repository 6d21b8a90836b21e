#!/usr/bin/env bash
# Deploy a release, after migrate.sh, and wait until it serves or is rolled back:
#
#     deploy.sh NAME IMAGE VERSION [PARAMETER=VALUE ...]
#
# The first deployment needs all parameters of service.yaml that have no default, such as Domain=...; later ones keep
# them. It fails if the release is rolled back.
# RELEASE_ROLE is the role that CloudFormation acts in (release.yaml).
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: $0 NAME IMAGE VERSION [PARAMETER=VALUE ...]" >&2; exit 2; }
name=$1 image=$2 version=$3
shift 3

aws cloudformation deploy --stack-name "$name-service" --template-file "$(dirname "$0")/service.yaml" \
  --no-fail-on-empty-changeset ${RELEASE_ROLE:+--role-arn "$RELEASE_ROLE"} \
  --parameter-overrides "Name=$name" "Image=$image" "Version=$version" "$@"
