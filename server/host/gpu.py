"""GPU errors that only another machine cures: fatal Xid events of the driver in the kernel's log, and what nvidia-smi says of the memory.

Owns which errors are fatal. Xids that a program's own fault brings (13, 31, 43, 45, 68) are not among them; the server's supervisor
restarts the engine. Codes: NVIDIA, "XID Errors" (docs.nvidia.com/deploy/xid-errors). `agent` asks every half minute.
"""

import errno
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

FATAL_XIDS = {
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "GSP RPC timeout",
    120: "GSP error",
    136: "ALI training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization error",
}
KERNEL_LOG = Path("/dev/kmsg")
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,ecc.errors.uncorrected.volatile.total,remapped_rows.failure",
    "--format=csv,noheader,nounits",
)
_XID = re.compile(r"NVRM: Xid \((?P<device>[^)]*)\): (?P<code>\d+)")
_TIMEOUT_S = 20.0
_NUM_FAILED = 3  # calls of nvidia-smi in a row, half a minute apart: one may meet a driver that is busy or being reset
_RECORD_BYTES = 8192


class GpuWatch:
    """Reads the kernel's log from its beginning (that of this boot) on."""

    def __init__(self, *, kernel_log: Path = KERNEL_LOG, nvidia_smi: Sequence[str] = NVIDIA_SMI, timeout_s: float = _TIMEOUT_S) -> None:
        self._nvidia_smi, self._timeout_s = list(nvidia_smi), timeout_s
        self._num_failed = 0
        self._stuck: subprocess.Popen[str] | None = None  # one that could not be killed: it hangs in the driver
        self._log: int | None = None
        with suppress(OSError):  # not readable: nvidia-smi alone has to do
            self._log = os.open(kernel_log, os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def errors(self) -> list[str]:
        """What was found since the last call; each ends this machine's use."""
        return [*self._fatal_xids(), *self._memory_errors()]

    def _fatal_xids(self) -> list[str]:
        found = []
        for match in _XID.finditer(self._read_log()):
            if reason := FATAL_XIDS.get(int(match["code"])):
                found.append(f"Xid {match['code']} on {match['device']}: {reason}")
        return found

    def _read_log(self) -> str:
        """What is new. The kernel gives one record a read, and EPIPE where records were overwritten before they were read."""
        text = []
        while self._log is not None:
            try:
                data = os.read(self._log, _RECORD_BYTES)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    continue
                break
            if not data:
                break
            text.append(data.decode(errors="replace"))
        return "".join(text)

    def _memory_errors(self) -> list[str]:
        try:
            status, said = self._ask()
        except subprocess.TimeoutExpired:
            return self._failed("nvidia-smi hangs")
        except FileNotFoundError:
            return []  # no driver, no GPU: not this watch's affair
        if status:
            words = said.strip().splitlines() or ["no reason given"]
            return self._failed(f"nvidia-smi failed ({status}): {words[0][:200]}")
        self._num_failed = 0
        found = []
        for line in said.splitlines():
            index, uncorrected, remap_failed = ([part.strip() for part in line.split(",")] + ["", ""])[:3]
            if uncorrected.isdigit() and int(uncorrected):  # "[N/A]" where ECC is off
                found.append(f"GPU {index}: {uncorrected} uncorrected ECC errors")
            if remap_failed.lower() in ("yes", "1"):
                found.append(f"GPU {index}: row remapping failed")
        return found

    def _failed(self, how: str) -> list[str]:
        """An error from the third call on that failed in a row, one way or the other."""
        self._num_failed += 1
        log.warning("%s, %d in a row", how, self._num_failed)
        return [how] if self._num_failed >= _NUM_FAILED else []

    def _ask(self) -> tuple[int, str]:
        """Exit status and words of nvidia-smi. TimeoutExpired if it takes too long, at once while an earlier one hangs: it is killed, but
        not waited for, since a process in the driver's hands may never end, and the agent has more to do."""
        if self._stuck is not None and self._stuck.poll() is None:
            raise subprocess.TimeoutExpired(self._nvidia_smi, 0)
        self._stuck = None
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = subprocess.Popen(self._nvidia_smi, stdout=said, stderr=subprocess.STDOUT, text=True)
            try:
                status = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                self._stuck = process
                raise
            said.seek(0)
            return status, said.read()
