#!/bin/bash
# Fetches the servers' admin key into memory, where manylora.service reads it; as root, before each start. Without a secret there is no key,
# and the server refuses orders about adapters.   RUN: folder in memory   HOST_ENV: what user-data wrote
set -euo pipefail

RUN=${RUN:-/run/manylora-admin}
# shellcheck source=/dev/null
source "${HOST_ENV:-/etc/manylora/host.env}"

mkdir -p "$RUN"
chmod 700 "$RUN"
rm -f "$RUN/key.env"
[ -n "${ADMIN_SECRET_ARN:-}" ] || exit 0
umask 077
key=$(aws secretsmanager get-secret-value --region "$REGION" --secret-id "$ADMIN_SECRET_ARN" --query SecretString --output text)
printf 'MANYLORA_ADMIN_KEY=%s\n' "$key" >"$RUN/key.env.new"
mv "$RUN/key.env.new" "$RUN/key.env"
