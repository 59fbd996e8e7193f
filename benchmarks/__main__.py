"""`python -m benchmarks`: the benchmark of this machine's kind."""

from benchmarks.cpu import main

main()
