"""`python -m benchmarks`: the benchmark of this machine's kind."""

import sys

from benchmarks.cpu import main
from sizing.printing import run_tool

sys.exit(run_tool(main))
