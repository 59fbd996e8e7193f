#!/bin/bash
# Puts another release of the server onto this instance and goes back to the old one if the new one does not answer. The Systems Manager
# document of infra/operations.py runs it as root, on one instance after another.
#   ARTIFACT_URI    s3:// archive as infra/artifact.py makes it
#   WHEELHOUSE_URI  s3:// prefix with wheels, in place of PyPI; empty: PyPI
#   ANSWER_S        the server must answer within so many seconds
#   LEAVE_S         from a server's first 503 on /health until the load balancer sends it nothing more
#   ENTER_S         from its first answer until the load balancer sends it requests
set -euo pipefail

PREFIX=${PREFIX:-/opt/manylora}
# What it sets goes before what is given, so no name above may be in it.
# shellcheck source=/dev/null
source "${HOST_ENV:-/etc/manylora/host.env}"
export AWS_DEFAULT_REGION=$REGION

let_go() { # a server that serves says that it goes, and answers what comes until the load balancer has heard it
    curl -fs -o /dev/null --max-time 5 "http://127.0.0.1:$PORT/health" || return 0
    if systemctl kill --kill-who=main --signal=SIGUSR1 manylora.service; then sleep "$LEAVE_S"; fi
}

switch_to() { # RELEASE: its packages, its units, a restart, which drains what is open
    WHEELHOUSE=$wheelhouse bash "$1/ami/install.sh" && bash "$1/ami/configure.sh" && let_go &&
        systemctl restart manylora.service manylora-agent.service
}

answers() {
    local deadline=$((SECONDS + ANSWER_S))
    until curl -fs -o /dev/null --max-time 5 "http://127.0.0.1:$PORT/health"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 2
    done
}

old=$(readlink -f "$PREFIX/current")
new=$PREFIX/releases/$(basename "$ARTIFACT_URI" .zip)
wheelhouse=
if [ -n "$WHEELHOUSE_URI" ]; then
    wheelhouse=$PREFIX/wheelhouse
    aws s3 sync --only-show-errors "$WHEELHOUSE_URI" "$wheelhouse"
fi
if [ ! -e "$new/.whole" ]; then
    aws s3 cp --only-show-errors "$ARTIFACT_URI" "$new.zip"
    rm -rf "$new"
    python3 -m zipfile -e "$new.zip" "$new"
    touch "$new/.whole"
    rm -f "$new.zip"
fi

if switch_to "$new" && answers; then
    sleep "$ENTER_S" # the next instance goes only when this one is in turn again
    echo "serving $(basename "$new")"
    exit 0
fi
echo "$(basename "$new") does not answer; back to $(basename "$old")" >&2
tail -n 40 /var/log/manylora/server.log >&2 || true
# The agent's patience begins anew: what the new release took of it must not cost the old one its instance.
systemctl restart manylora-agent.service || true
if switch_to "$old" && answers; then
    sleep "$ENTER_S" # a mark that the agent made meanwhile is taken back before the group looks again
else
    echo "$(basename "$old") does not answer either" >&2
fi
exit 1
