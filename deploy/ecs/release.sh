#!/usr/bin/env bash
# Deploy a release, after migrate.sh. Request paths from outside, and deploy the previous release again if one fails:
#
#     release.sh NAME IMAGE VERSION [PATH ...]
#
# Each PATH, by default /ready, must answer without an error within a minute (TRY_SECONDS). A rollback makes it fail.
# For the first release use deploy.sh, because there is no previous one.
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: $0 NAME IMAGE VERSION [PATH ...]" >&2; exit 2; }
name=$1 image=$2 version=$3
shift 3
[ $# -gt 0 ] || set -- /ready
here=$(dirname "$0")

service() {
  aws cloudformation describe-stacks --stack-name "$name-service" --output text --query "Stacks[0].$1"
}

image_before=$(service "Parameters[?ParameterKey=='Image'].ParameterValue")
version_before=$(service "Parameters[?ParameterKey=='Version'].ParameterValue")
"$here/deploy.sh" "$name" "$image" "$version"

url=$(service "Outputs[?OutputKey=='Url'].OutputValue")
for path; do
  curl --silent --show-error --fail --output /dev/null --max-time 10 --retry 1000 --retry-delay 2 --retry-all-errors \
    --retry-max-time "${TRY_SECONDS:-60}" "$url$path" && echo "$url$path answers" && continue
  echo "$url$path does not answer: rolling back from $version to $version_before" >&2
  "$here/deploy.sh" "$name" "$image_before" "$version_before"
  exit 1
done
