"""Auto Scaling's hooks, which MiniStack completes whether or not anybody waits: calls are written down, one that nothing waits for fails.

The stand-in for Auto Scaling (rehearse.group) writes the names of waiting transitions. `__main__` calls `watch_hooks`.
"""

import json
import time
from pathlib import Path
from typing import Any


def watch_hooks(autoscaling: Any, state: Path) -> None:
    """`state`/waiting.json: [[instance, hook], ...]; `state`/hooks.jsonl gets a line for each call that was accepted."""
    handlers = next(value for value in vars(autoscaling).values() if isinstance(value, dict) and "CompleteLifecycleAction" in value)
    for operation in ("CompleteLifecycleAction", "RecordLifecycleActionHeartbeat"):
        handlers[operation] = _recording(autoscaling, operation, handlers[operation], state)


def _recording(autoscaling: Any, operation: str, answer: Any, state: Path) -> Any:
    def handle(parameters: dict[str, Any]) -> Any:
        instance, hook = (autoscaling._p(parameters, name) for name in ("InstanceId", "LifecycleHookName"))
        waiting = state / "waiting.json"
        if [instance, hook] not in (json.loads(waiting.read_text()) if waiting.exists() else []):
            return autoscaling._error("ValidationError", f"No active Lifecycle Action found with instance ID {instance}")
        line = {"operation": operation, "instance": instance, "hook": hook, "at": time.time()}
        with (state / "hooks.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return answer(parameters)

    return handle
