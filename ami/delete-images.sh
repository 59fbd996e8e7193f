#!/bin/bash
# Deletes what the image pipeline made and no stack owns: AMIs of a deployment, their snapshots, the parameter that named the newest one.
#   delete-images.sh NAME [REGION]     NAME: `name` of the configuration
set -euo pipefail

name=${1:?usage: delete-images.sh NAME [REGION]}
export AWS_DEFAULT_REGION=${2:-${AWS_DEFAULT_REGION:?no region: give one as the second argument}}
# shellcheck disable=SC2016  # JMESPath's own backquotes
mapfile -t images < <(aws ec2 describe-images --owners self --filters "Name=tag:manylora:name,Values=$name" \
    --query 'Images[].[ImageId, BlockDeviceMappings[?Ebs].Ebs.SnapshotId | join(`,`, @)]' --output text)
for line in "${images[@]}"; do
    read -r image snapshots <<<"$line"
    echo "deleting $image and ${snapshots//,/, }"
    aws ec2 deregister-image --image-id "$image"
    for snapshot in ${snapshots//,/ }; do
        aws ec2 delete-snapshot --snapshot-id "$snapshot"
    done
done
aws ssm delete-parameter --name "/imagebuilder/$name/ami-id" 2>/dev/null || true
