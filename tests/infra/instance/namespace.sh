#!/bin/bash
# Runs user-data in a mount namespace of its own in which /etc, /opt, /var, /mnt and /run take writes that nobody outside sees.
#   namespace.sh STATE SCRIPT...    STATE: folder with bin/ (stand-ins), environment/ (LOCK's), nvme/ and shared/
set -euo pipefail
state=$1
shift

mkdir -p "$state/upper"
mount -t tmpfs tmpfs "$state/upper"
for top in etc opt var mnt run; do
    mkdir -p "$state/upper/$top" "$state/upper/.$top"
    mount -t overlay overlay -o "lowerdir=/$top,upperdir=$state/upper/$top,workdir=$state/upper/.$top" "/$top"
done
# What a Deep Learning AMI with a baked environment has: the instance store, the server's packages, the CloudWatch agent.
mkdir -p /opt/dlami/nvme /opt/aws/amazon-cloudwatch-agent/bin /opt/manylora
mount --bind "$state/nvme" /opt/dlami/nvme
cp -r "$state/environments" /opt/manylora/
printf '#!/bin/sh\necho "$@" >>"%s/agent"\n' "$state" >/opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl
chmod +x /opt/aws/amazon-cloudwatch-agent/bin/amazon-cloudwatch-agent-ctl
export STAND_IN_STATE=$state PATH="$state/bin:$PATH"
keep() {  # what a test looks at, before the namespace goes
    cp /etc/fstab /etc/manylora/server.env /etc/manylora/host.env /var/log/manylora/boot.jsonl "$state/" || true
    readlink -f /var/lib/manylora/model >"$state/link" || true
}
trap keep EXIT
for script in "$@"; do
    bash "$script"
done
