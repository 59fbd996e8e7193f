#!/bin/bash
# What an image brings along, so that a boot need not: packages, mount helpers, the CloudWatch agent, the server's user, compiled kernels.
#   bake.sh MOUNT_KIND [WHEELHOUSE_URI|none]
set -euo pipefail

mount_kind=$1
wheelhouse_uri=${2:-none}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wheelhouse=
if [ "$wheelhouse_uri" != none ]; then
    wheelhouse=/opt/manylora/wheelhouse
    aws s3 sync --only-show-errors "$wheelhouse_uri" "$wheelhouse"
fi
WHEELHOUSE=$wheelhouse bash "$here/install.sh"
bash "$here/install-mount.sh" "$mount_kind" "$wheelhouse"
token=$(curl -fsS -X PUT -H 'x-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
bash "$here/install-agent.sh" "$(curl -fsS -H "x-aws-ec2-metadata-token: $token" http://169.254.169.254/latest/meta-data/placement/region)"
getent passwd manylora >/dev/null || useradd --system --user-group --uid 8080 --home-dir /var/lib/manylora manylora
bash "$here/warm.sh"
rm -rf /opt/manylora/wheelhouse
