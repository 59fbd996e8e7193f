#!/bin/bash
# What one needs to find out why an instance serves badly, as one archive in the bucket. Reads only; no key and no prompt is in it: values of
# the server's settings that could be secret are taken out, and the server logs no prompts. Run by the document of infra/operations.py.
#   TARGET_URI      s3:// folder to write to
set -uo pipefail

LOGS=${LOGS:-/var/log/manylora}
CONFIG=${CONFIG:-/etc/manylora}
# shellcheck source=/dev/null
source "$CONFIG/host.env"
export AWS_DEFAULT_REGION=$REGION

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

keep() { # NAME COMMAND...: its output, its errors and its exit status, whatever they are
    local name=$1
    shift
    timeout 60 "$@" >"$folder/$name" 2>&1
    echo "exit status $?" >>"$folder/$name"
}

keep nvidia-smi.txt nvidia-smi -q
keep kernel.txt dmesg --ctime
keep units.txt systemctl status --no-pager --full 'manylora*' amazon-cloudwatch-agent
keep journal.txt journalctl --no-pager --since -2h -u 'manylora*'
keep memory.txt free -m
keep disks.txt df -h
keep mounts.txt findmnt
keep processes.txt ps auxww --sort -rss
keep sockets.txt ss -s
keep release.txt ls -l /opt/manylora /opt/manylora/releases /opt/manylora/environments
keep health.txt curl -sS -i --max-time 10 "http://127.0.0.1:$PORT/health"
keep info.json curl -sS --max-time 10 "http://127.0.0.1:$PORT/info"
keep metrics.txt curl -sS --max-time 10 "http://127.0.0.1:$PORT/metrics"
keep settings.txt sed -E 's/^([A-Z_]*(KEY|TOKEN|SECRET|PASSWORD)[A-Z_]*)=.*/\1=(left out)/' "$CONFIG/server.env"
for log in "$LOGS"/*.log; do
    [ -e "$log" ] && keep "log-$(basename "$log")" tail -c 5000000 "$log"
done

token=$(curl -fsS -X PUT -H 'x-aws-ec2-metadata-token-ttl-seconds: 60' "${IMDS:-http://169.254.169.254}/latest/api/token")
instance=$(curl -fsS -H "x-aws-ec2-metadata-token: $token" "${IMDS:-http://169.254.169.254}/latest/meta-data/instance-id")
archive=$instance-$(date -u +%Y%m%dT%H%M%SZ).tar.gz
tar -C "$folder" -czf "$folder.tar.gz" .
aws s3 cp --only-show-errors "$folder.tar.gz" "$TARGET_URI$archive"
code=$?
rm -f "$folder.tar.gz"
[ "$code" -ne 0 ] || echo "$TARGET_URI$archive"
exit "$code"
