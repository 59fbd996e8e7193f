#!/bin/bash
# Fetches the keys that the gateway shows into memory, where manylora.service reads them; as root, before each start. Without a secret there
# is no key: the server then refuses orders about adapters, or believes no gateway.   RUN: folder in memory   HOST_ENV: what user-data wrote
set -euo pipefail

RUN=${RUN:-/run/manylora-admin}
# shellcheck source=/dev/null
source "${HOST_ENV:-/etc/manylora/host.env}"

mkdir -p "$RUN"
chmod 700 "$RUN"
rm -f "$RUN/key.env"
[ -n "${ADMIN_SECRET_ARN:-}${GATEWAY_SECRET_ARN:-}" ] || exit 0
umask 077

fetch() {  # ARN SETTING
    local key
    [ -n "$1" ] || return 0
    key=$(aws secretsmanager get-secret-value --region "$REGION" --secret-id "$1" --query SecretString --output text)
    printf '%s=%s\n' "$2" "$key" >>"$RUN/key.env.new"
}

rm -f "$RUN/key.env.new"
fetch "${ADMIN_SECRET_ARN:-}" MANYLORA_ADMIN_KEY
fetch "${GATEWAY_SECRET_ARN:-}" MANYLORA_GATEWAY_KEY
mv "$RUN/key.env.new" "$RUN/key.env"
