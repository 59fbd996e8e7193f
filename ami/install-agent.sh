#!/bin/bash
# Installs the CloudWatch agent, unless it is there, from the region's own bucket, which the S3 gateway endpoint reaches too.
#   install-agent.sh REGION
set -euo pipefail

region=$1
[ ! -x /opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl ] || exit 0
package=$(mktemp --suffix=.deb)
trap 'rm -f "$package"' EXIT
curl -fsS --retry 3 -o "$package" \
    "https://amazoncloudwatch-agent-$region.s3.$region.amazonaws.com/ubuntu/amd64/latest/amazon-cloudwatch-agent.deb"
# dpkg itself does not wait for the lock that unattended-upgrades holds after a boot.
DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -q -y install "$package"
