#!/bin/bash
# Puts this release's units, log rotation, needrestart's exception and CloudWatch agent configuration in place. user-data calls it once it
# has written /etc/manylora/*.env, and so does whoever rolls a new release.   STOP_S: seconds that systemd gives the server to drain
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
source /etc/manylora/host.env

install -m 644 "$here"/manylora*.service /etc/systemd/system/
if [ -n "${STOP_S:-}" ]; then
    mkdir -p /etc/systemd/system/manylora.service.d
    printf '[Service]\nTimeoutStopSec=%s\n' "$STOP_S" >/etc/systemd/system/manylora.service.d/drain.conf
fi
install -m 644 "$here/logrotate.conf" /etc/logrotate.d/manylora
[ ! -d /etc/needrestart/conf.d ] || install -m 644 "$here/needrestart.conf" /etc/needrestart/conf.d/manylora.conf
systemctl daemon-reload
systemctl enable manylora-model.service manylora.service manylora-agent.service

[ -n "$LOG_GROUP" ] || exit 0
ctl=/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl
sed "s|@LOG_GROUP@|$LOG_GROUP|g" "$here/cloudwatch-agent.json" >/etc/manylora/cloudwatch-agent.json
# Without it the server serves all the same: said, not fatal.
if ! bash "$here/install-agent.sh" "$REGION" || ! "$ctl" -a fetch-config -m ec2 -s -c file:/etc/manylora/cloudwatch-agent.json; then
    echo "the CloudWatch agent does not run" >&2
fi
