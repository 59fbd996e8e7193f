"""How user-data ends: the deploy learns of it, a launch that failed is given up at its hook, one that serves has requests first."""

import subprocess

import pytest

from infra.user_data import SCRIPT

ID = "i-0123456789abcdef0"
_STUBS = """
say() { echo "say $*" >>"$CALLS"; }
show_logs() { :; }
sleep() { echo "sleep $1" >>"$CALLS"; SECONDS=$((SECONDS + $1)); }
metadata() { case $1 in instance-id) echo "$ID" ;; *) echo "$TARGET" ;; esac; }
aws() {
    if [ "$2" = describe-auto-scaling-instances ]; then
        states=$(<"$CALLS.states")
        [ "$states" != refused ] || return 255
        [ -z "$states" ] || printf 'fleet\\t%s\\n' "${states%% *}"
        echo "${states#* }" >"$CALLS.states"
        return
    fi
    echo "$*" >>"$CALLS"
    [ "$2" != complete-lifecycle-action ] || return "$COMPLETES"
}
"""


@pytest.fixture
def end(tmp_path):
    """The script's last words after a boot with `code`: what it called, one line each. `states`: of the instance, as it is asked for."""

    def run(code: int, *, target: str = "InService", states: str = "", hook: str = "launch", completes: int = 0) -> list[str]:
        text = SCRIPT.read_text()
        functions = text[text.index("own_group() {") : text.index("trap signal EXIT")]
        script = f"set -euo pipefail\n{_STUBS}{functions}\ntrap signal EXIT\nexit {code}\n"
        calls = tmp_path / "calls"
        calls.with_name("calls.states").write_text(states)
        variables = {
            "PATH": "/usr/bin:/bin", "CALLS": str(calls), "ID": ID, "TARGET": target, "COMPLETES": str(completes),
            "LAUNCH_HOOK": hook, "STACK_NAME": "stack", "SIGNAL_RESOURCE": "Fleet", "ENTER_S": "30",
        }  # fmt: skip
        result = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, timeout=60)
        assert result.returncode == code and not result.stderr, result.stderr
        return calls.read_text().splitlines()

    return run


def signal_of(status: str) -> str:
    return f"cloudformation signal-resource --stack-name stack --logical-resource-id Fleet --unique-id {ID} --status {status}"


ABANDON = (
    f"autoscaling complete-lifecycle-action --auto-scaling-group-name fleet --lifecycle-hook-name launch --instance-id {ID}"
    " --lifecycle-action-result ABANDON"
)


def test_a_boot_that_fails_gives_its_launch_up(end):
    assert end(1, states="Pending:Wait") == ["say boot: FAILURE", signal_of("FAILURE"), ABANDON]


def test_one_that_fails_on_its_way_to_the_warm_pool_too(end):
    assert end(1, target="Warmed:Stopped", states="Warmed:Pending:Wait")[-1] == ABANDON


@pytest.mark.parametrize(("states", "hook"), [("", "launch"), ("refused", "launch"), ("Pending:Wait", "")])
def test_without_a_group_or_a_hook_nothing_is_given_up(end, states, hook):
    assert end(1, states=states, hook=hook)[-1] == signal_of("FAILURE")


def test_a_hook_that_is_not_there_yet_fails_nothing_more(end):
    assert end(3, states="InService", completes=255)[-1] == "say no launch waits at the hook"


def test_the_signal_comes_once_the_group_and_then_the_load_balancer_have_the_instance(end):
    found = end(0, states="Pending:Wait Pending:Proceed InService InService")
    assert found == ["sleep 5", "sleep 5", "sleep 30", "say boot: SUCCESS", signal_of("SUCCESS")]


@pytest.mark.parametrize("states", ["Pending:Wait", "refused"])
def test_and_in_any_case_after_two_minutes(end, states):
    found = end(0, states=states)
    assert found == ["sleep 5"] * 24 + ["sleep 30", "say boot: SUCCESS", signal_of("SUCCESS")]


@pytest.mark.parametrize(("target", "states"), [("InService", ""), ("Warmed:Stopped", "Warmed:Pending:Wait")])
def test_nobody_waits_outside_a_group_or_in_a_warm_pool(end, target, states):
    assert not [line for line in end(0, target=target, states=states) if line.startswith("sleep")]
