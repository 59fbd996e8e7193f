"""A long run of requests and orders at random against a whole server, where every answer betrays which adapter and version made it.

`python -m benchmarks.soak` (`make soak`) drives; `marks` makes the adapters, `names` knows what each name may answer when, `requests` asks,
`orders` changes names, `leaks` looks at what is held once nothing runs. No torch here: the server and its engine are the product's, on a
base with random weights (benchmarks.gpu.serve).
"""
