"""The rehearsal itself: what the steps share, their order, and an end that leaves nothing behind.

Owns the scratch folder and the contexts (emulator, endpoint, group). Each step is a function of `steps`; it reads and sets what is here and
writes the table's lines. `__main__` runs one.
"""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rehearse.cdk import Cdk
from rehearse.emulator_process import Emulator
from rehearse.endpoint import Endpoint
from rehearse.errors import CannotRun
from rehearse.group import Group
from rehearse.instance import why_not
from rehearse.report import Report

_PROGRAMS = ("bash", "curl")
_LONGEST_FOLDER = 60  # characters: sockets lie below it, and their paths end at 108


@dataclass
class Options:
    """`shared`: folder that stands for EFS, or one in the scratch folder; `has_namespaces`: whether to use them where they can be had."""

    shared: Path | None = None
    has_namespaces: bool = True
    is_kept: bool = False


@dataclass
class Rehearsal:
    """What the steps share. `names`: the stacks by part; `refused`: why there are no namespaces, if so; `held`: by the emulator, when."""

    report: Report
    folder: Path
    emulator: Emulator
    cdk: Cdk
    shared: Path
    refused: str | None
    contexts: ExitStack
    held: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    _endpoint: Endpoint | None = None
    _group: Group | None = None

    def enter_endpoint(self, endpoint: Endpoint) -> None:
        """The deployed one, until the rehearsal ends."""
        self._endpoint = self.contexts.enter_context(endpoint)

    def enter_group(self, group: Group) -> None:
        """The stand-in for Auto Scaling, until the rehearsal ends or `end_group`."""
        self._group = self.contexts.enter_context(group)

    def end_group(self) -> None:
        """The instances end; their records stay."""
        if self._group is not None:
            self._group.end()

    @property
    def endpoint(self) -> Endpoint:
        assert self._endpoint is not None, "no step has deployed"
        return self._endpoint

    @property
    def group(self) -> Group:
        assert self._group is not None, "no step has made the group"
        return self._group


Step = Callable[[Rehearsal], None]


def run(steps: list[Step], report: Report, options: Options) -> None:
    """One after another, in a scratch folder that is gone afterwards. The first error ends it, once everything is ended."""
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            raise CannotRun(f"there is no {program}, which user-data needs")
    folder = _make_folder()
    try:
        with ExitStack() as contexts:
            emulator = contexts.enter_context(Emulator(folder))
            cdk = Cdk(emulator, folder, say=report.progress)
            refused = why_not() if options.has_namespaces else "not wanted"
            shared = options.shared or folder / "shared"
            shared.mkdir(exist_ok=True)
            rehearsal = Rehearsal(report, folder, emulator, cdk, shared, refused, contexts)
            for step in steps:
                step(rehearsal)
    finally:
        if options.is_kept:
            report.say(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="manylora-rehearse-"))
    if len(str(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        raise CannotRun(f"TMPDIR is too long for the sockets below it: {folder.parent}. Set TMPDIR=/tmp")
    return folder
