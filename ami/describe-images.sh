#!/bin/bash
# The newest Deep Learning AMIs of a line, newest first, as one looks them up by hand before a launch in the console.
#   describe-images.sh [base|pytorch] [REGION]
set -euo pipefail

line=${1:-base}
case $line in
    base) name='Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04)*' ;;
    pytorch) name='Deep Learning OSS Nvidia Driver AMI GPU PyTorch 2.* (Ubuntu 24.04)*' ;;
    *) echo "describe-images.sh: $line is not a line of images. Allowed: base, pytorch" >&2; exit 2 ;;
esac
aws ec2 describe-images ${2:+--region "$2"} --owners amazon \
    --filters "Name=name,Values=$name" Name=state,Values=available Name=architecture,Values=x86_64 \
    --query 'reverse(sort_by(Images, &CreationDate))[:10].[ImageId, CreationDate, Name]' --output table
