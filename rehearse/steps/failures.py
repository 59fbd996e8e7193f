"""Step 4, first half: under load, one instance loses its power and another is drained."""

from rehearse.errors import check
from rehearse.load import Load
from rehearse.rehearsal import Rehearsal


def lose_instances(rehearsal: Rehearsal) -> None:
    """Kill one, replace it, drain the other."""
    report, group = rehearsal.report, rehearsal.group
    report.begin(4, "instances that go, under load")
    with report.line("a killed instance: nothing is lost but what was sent to it before the balancer knew, each with an error") as line:
        line.detail = kill(rehearsal)
    with report.line("its replacement boots onto the warm file system and serves") as line:
        (fresh,) = group.launch(1)
        seconds = fresh.boot_seconds()
        line.detail = f"model delivered in {seconds['model']:.1f} s, ready after {sum(seconds.values()):.0f} s"
    with report.line("a drained instance: nothing is lost; the agent completes the hook once it is empty") as line:
        line.detail = drain(rehearsal)


def kill(rehearsal: Rehearsal) -> str:
    """One of two, with requests on both."""
    group = rehearsal.group
    victim, other = sorted(group.targets())
    with Load(rehearsal.endpoint) as load:
        load.await_answers({victim, other})
        unknown_from = group.kill(group.instances[victim])
        load.await_answers({other})
    lost = load.failed
    check(lost, "nothing was under way on the killed instance: nothing was tried")
    strays = [item for item in lost if item.target != victim or item.sent_at > unknown_from]
    check(not strays, f"lost beyond what was on it: {strays[:3]}")
    check(all(item.status == 502 and "message" in item.text for item in lost), f"without an error of the gateway's: {lost[:3]}")
    return f"{len(lost)} of {len(load.answers)} ended with 502; the rest with 200"


def drain(rehearsal: Rehearsal) -> str:
    """The older of two, as a scale-in takes it."""
    group = rehearsal.group
    serving = [id for id in group.instances if id in group.targets()]
    leaver, other = serving
    with Load(rehearsal.endpoint) as load:
        load.await_answers({leaver, other})
        took_s = group.drain(group.instances[leaver])
        load.await_answers({other})
    check(not load.failed, f"lost: {load.failed[:3]}")
    calls = [item for item in group.hook_calls() if item["instance"] == leaver]
    ends = [item["hook"] for item in calls if item["operation"] == "CompleteLifecycleAction"]
    check(ends == [group.launch_hook, group.drain_hook], f"calls of hooks: {calls}")
    return f"{len(load.answers)} requests, all 200; the server stopped and the hook completed after {took_s:.0f} s"
