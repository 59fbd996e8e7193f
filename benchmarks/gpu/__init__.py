"""The benchmark of a GPU: this engine and vLLM, the same workloads, one run on one card.

    python -m benchmarks.gpu --part offline-base offline-r16 decode http arrivals --vllm-site DIR
    python -m benchmarks.gpu --part offline-r8 --vllm-site DIR --max-loras 256
    python -m benchmarks.gpu --part start
    python -m benchmarks.gpu --table rows.jsonl --save

Parts that are named together share starts: one of ours for all that is called directly, but for `offline-r8`, which has its own; one
server for `http` and `arrivals`; one of vLLM for each set of adapters. A call takes at most --limit-s (540), keeps what it had measured
when the time is over, and says what it left out; `--engine ours` leaves vLLM for another call, and so does one value of --max-loras for
the others. Rows are appended to --out (rows.jsonl), each with the GPU's UUID, the machine's boot id, commit and versions; the table is
refused for rows of several machines, boots or versions of the code. `benchmarks/gpu/pack_vllm` packs vLLM for a machine without a network.
Elsewhere than on a GPU, `--model tiny --device cpu` tries it all out; the numbers mean nothing there.

Nothing is downloaded: the base has random weights (models, random_base), the adapters too (adapters); speed does not depend on what the
weights say. What stands for what: `offline-base`, `offline-r16`, `offline-r8` are 768 requests at once of 256 prompt and 128 new tokens on
the base, on 25 adapters of rank 16 on all linears, on 1000 of rank 8 on q and v; `decode` is short prompts and 256 new tokens in batches
of 1, 64 and 256; `http` the 25 over HTTP against the engine called directly; `arrivals` 2000 registered adapters, Zipf(1.0), Poisson
arrivals at 60% of the peak; `start` from nothing to the first token.
"""
