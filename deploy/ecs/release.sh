#!/usr/bin/env bash
# Deploy a release, after migrate.sh; try it from outside; go back to the one before if it does not answer:
#
#     release.sh NAME IMAGE VERSION [PATH ...]
#
# Each PATH, /ready if there is none, has a minute (TRY_SECONDS) to answer without an error. Going back is a failure, too.
# The first release is made with deploy.sh: there is nothing to go back to.
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
  echo "$url$path does not answer: going back from $version to $version_before" >&2
  "$here/deploy.sh" "$name" "$image_before" "$version_before"
  exit 1
done
