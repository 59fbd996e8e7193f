#!/bin/bash
# From a fresh instance to a server that answers /health. Runs once, at the first boot; run again, it changes nothing. Every step is timed, on
# the serial console, in the log and, through the agent, as the metric BootSeconds.
# infra/user_data.py writes the block below anew. MANYLORA_* are the server's settings. Nothing in it is a secret.
# shellcheck disable=SC2034  # MANYLORA_* are used by their prefix
# >>> variables
REGION=''           # region of the stack
STACK_NAME=''       # stack and resource that wait for this instance's signal; empty: none does
SIGNAL_RESOURCE=''
ARTIFACT_URI=''     # s3:// archive of the server (infra/artifact.py)
WHEELHOUSE_URI=''   # s3:// prefix with wheels and packages, in place of PyPI; empty: PyPI
MOUNT_KIND=''       # the shared file system, as mount -t takes it: efs, lustre, s3files
MOUNT_SOURCE=''
MOUNT_OPTIONS=''
MOUNT_POINT=''
CACHE_ROOT=''       # where the instance store is mounted; empty or not mounted: no local cache
MODEL_ORIGIN=''     # as server.host.deliver takes it
SHARED_DIR=''       # where it lies for all instances; empty: each fetches it for itself
HUB_SECRET_ARN=''   # secret with the hub's token; empty: none
ADMIN_SECRET_ARN='' # secret with the servers' admin key; empty: admin routes are off
GATEWAY_SECRET_ARN='' # secret by which the servers know the gateway; empty: it names no tenants
LOG_GROUP=''        # CloudWatch log group; empty: no agent
DRAIN_HOOK=''       # lifecycle hooks that server.host.agent completes
LAUNCH_HOOK=''
READY_S=''          # the server must answer within so many seconds of the script's start
HEAL_S=''           # later on, one that does not answer for so long has its instance replaced
ENTER_S=''          # from the server's first answer until the load balancer sends it requests
MANYLORA_MODEL_ID=''
MANYLORA_PORT=''
MANYLORA_DRAIN_TIMEOUT_S=''
# <<< variables
set -euo pipefail
umask 022

PREFIX=/opt/manylora
STATE=/var/lib/manylora
LOGS=/var/log/manylora
CONFIG=/etc/manylora
USER_ID=8080        # infra.storage.base.SERVER_UID: the shared file system's access point writes as it
IMDS=${IMDS:-http://169.254.169.254}
CONSOLE=/dev/console
[ -w "$CONSOLE" ] || CONSOLE=/dev/null
export AWS_DEFAULT_REGION=$REGION HOME=${HOME:-/root}
mkdir -p "$PREFIX/releases" "$STATE" "$LOGS" "$CONFIG"

say() { printf 'manylora: %s\n' "$*" | tee -a "$LOGS/boot.log" "$CONSOLE"; }

step() {  # NAME COMMAND...: run and time
    local name=$1 started
    started=$(date +%s%3N)
    shift
    say "$name ..."
    "$@"
    started=$(($(date +%s%3N) - started))
    say "$name: $started ms"
    printf '{"step": "%s", "seconds": %d.%03d}\n' "$name" $((started / 1000)) $((started % 1000)) >>"$LOGS/boot.jsonl"
}

retry() {  # COMMAND...: a role's rights and a mount target's name may take a while to be known everywhere
    local pause
    for pause in 2 4 8 16 32; do
        "$@" && return
        say "again in $pause s: $*"
        sleep "$pause"
    done
    "$@"
}

metadata() {
    local token
    token=$(curl -fsS -X PUT -H 'x-aws-ec2-metadata-token-ttl-seconds: 60' "$IMDS/latest/api/token")
    curl -fsS -H "x-aws-ec2-metadata-token: $token" "$IMDS/latest/meta-data/$1"
}

fetch_artifact() {
    release=$PREFIX/releases/$(basename "$ARTIFACT_URI" .zip)
    if [ ! -e "$release/.whole" ]; then
        retry aws s3 cp --only-show-errors "$ARTIFACT_URI" "$release.zip"
        rm -rf "$release"
        python3 -m zipfile -e "$release.zip" "$release"
        touch "$release/.whole"
        rm -f "$release.zip"
    fi
}

install_server() {
    local wheelhouse=
    if [ -n "$WHEELHOUSE_URI" ]; then
        wheelhouse=$PREFIX/wheelhouse
        retry aws s3 sync --only-show-errors "$WHEELHOUSE_URI" "$wheelhouse"
    fi
    getent passwd manylora >/dev/null || useradd --system --user-group --uid "$USER_ID" --home-dir "$STATE" manylora
    WHEELHOUSE=$wheelhouse bash "$release/ami/install.sh"
    bash "$release/ami/install-mount.sh" "$MOUNT_KIND" "$wheelhouse"
}

mount_shared() {
    mkdir -p "$MOUNT_POINT"
    grep -qF " $MOUNT_POINT " /etc/fstab || printf '%s %s %s %s 0 0\n' "$MOUNT_SOURCE" "$MOUNT_POINT" "$MOUNT_KIND" "$MOUNT_OPTIONS,nofail" >>/etc/fstab
    mountpoint -q "$MOUNT_POINT" || retry mount "$MOUNT_POINT"
}

first_tenants() {  # a file to begin with, where tenants are asked for and nobody has put one yet
    local file=${MANYLORA_TENANTS_FILE:-} place=${MANYLORA_MODEL_BUCKET:-}${MANYLORA_MODEL_FOLDER:+/$MANYLORA_MODEL_FOLDER}
    if [ -z "$file" ] || [ -e "$file" ]; then return; fi
    sed "s|@PLACE@|$place|g" "$PREFIX/current/ami/tenants.toml" >"$file.$$"
    chown "$USER_ID:$USER_ID" "$file.$$" 2>/dev/null || true
    ln "$file.$$" "$file" 2>/dev/null || true  # another instance was first
    rm -f "$file.$$"
}

write_configuration() {
    local cache='' name value
    if [ -n "$CACHE_ROOT" ] && mountpoint -q "$CACHE_ROOT"; then
        cache=$CACHE_ROOT/manylora
    elif [ -z "$SHARED_DIR" ]; then
        cache=$STATE/cache
    fi
    MANYLORA_STORE_DIR=${MANYLORA_STORE_DIR:-${cache:-$STATE}/store}
    for name in MANYLORA_ADAPTERS_DIR MANYLORA_REGISTRY_DIR MANYLORA_STORE_DIR; do
        [ -n "${!name:-}" ] || continue
        mkdir -p "${!name}"
        chown "$USER_ID:$USER_ID" "${!name}" 2>/dev/null || true  # an EFS access point has done so, and lets nobody
    done
    first_tenants
    for name in $(compgen -A variable MANYLORA_); do
        value=${!name//\\/\\\\}
        printf '%s="%s"\n' "$name" "${value//\"/\\\"}"
    done >"$CONFIG/server.env.new"
    mv "$CONFIG/server.env.new" "$CONFIG/server.env"
    for name in REGION MODEL_ORIGIN SHARED_DIR HUB_SECRET_ARN ADMIN_SECRET_ARN GATEWAY_SECRET_ARN DRAIN_HOOK LAUNCH_HOOK READY_S HEAL_S MOUNT_POINT LOG_GROUP; do
        printf '%s="%s"\n' "$name" "${!name}"
    done >"$CONFIG/host.env"
    printf 'CACHE_DIR="%s"\nMODEL_LINK="%s"\nPORT="%s"\nDRAIN_S="%s"\n' "$cache" "$MANYLORA_MODEL_ID" "$MANYLORA_PORT" \
        "$MANYLORA_DRAIN_TIMEOUT_S" >>"$CONFIG/host.env"
    STOP_S=$((${MANYLORA_DRAIN_TIMEOUT_S%.*} + 30)) bash "$PREFIX/current/ami/configure.sh"
}

await_server() {
    until curl -fs -o /dev/null --max-time 5 "http://127.0.0.1:$MANYLORA_PORT/health"; do
        if [ "$SECONDS" -ge "$READY_S" ]; then
            say "the server does not answer after $READY_S s"
            curl -s --max-time 5 "http://127.0.0.1:$MANYLORA_PORT/health" 2>&1 | tee -a "$LOGS/boot.log" "$CONSOLE" || true
            return 1
        fi
        sleep 2
    done
}

show_logs() {  # the end of what the units said, where an operator without access looks first: the serial console
    tail -q -n 30 "$LOGS/model.log" "$LOGS/server.log" 2>/dev/null | tee -a "$LOGS/boot.log" "$CONSOLE" || true
}

own_group() {  # ID: its Auto Scaling group and its state there; nothing outside any
    aws autoscaling describe-auto-scaling-instances --instance-ids "$1" \
        --query 'AutoScalingInstances[].[AutoScalingGroupName,LifecycleState]' --output text
}

enter_service() {  # ID: the signal lets a deploy end an older instance, so this one gets requests first: the agent lets the launch go on
    local found until=$((SECONDS + 120))
    while [ "$SECONDS" -lt "$until" ]; do
        found=$(own_group "$1") || found='? ?'
        [ -n "$found" ] || return 0
        [[ $found != *InService ]] || break
        sleep 5
    done
    sleep "${ENTER_S:-0}"
}

abandon_launch() {  # ID: one that cannot serve is ended now, not when the hook's time is over
    local found=
    [ -z "$LAUNCH_HOOK" ] || found=$(own_group "$1") || true
    [ -n "$found" ] || return 0
    aws autoscaling complete-lifecycle-action --auto-scaling-group-name "${found%%[[:space:]]*}" --lifecycle-hook-name "$LAUNCH_HOOK" \
        --instance-id "$1" --lifecycle-action-result ABANDON || say "no launch waits at the hook"
}

signal() {  # whoever waits for this instance learns how it ended
    local code=$? status=SUCCESS id target
    trap - EXIT
    id=$(metadata instance-id || true)
    target=$(metadata autoscaling/target-lifecycle-state || true)
    if [ "$code" -ne 0 ]; then
        status=FAILURE
        show_logs
    elif [[ $target != Warmed:* ]]; then
        enter_service "$id"
    fi
    say "boot: $status"
    case $target in
        Warmed:*) say "in the warm pool: no signal" ;;
        *) if [ -n "$STACK_NAME" ]; then
            aws cloudformation signal-resource --stack-name "$STACK_NAME" --logical-resource-id "$SIGNAL_RESOURCE" \
                --unique-id "$id" --status "$status" || say "no deploy waits for the signal"
        fi ;;
    esac
    [ "$code" -eq 0 ] || abandon_launch "$id"
    exit "$code"
}

trap signal EXIT
step artifact fetch_artifact
step install install_server
step mount mount_shared
step agent write_configuration
step model systemctl start manylora-model.service
step ready eval 'systemctl enable --now manylora.service manylora-agent.service && await_server'
