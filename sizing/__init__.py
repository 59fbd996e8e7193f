"""What a model takes, what an instance has, and what it costs: arithmetic that the deployment (infra/) and the server share.

Pure Python over numbers and tables: no torch, no CDK, nothing of ours is imported. The server divides a device's memory by `budget`; the
planner (`python -m infra.plan`, and every `cdk synth`) predicts by the same functions what the server will do on a card that is not here.
Beside it stands the one other thing that both halves need, how a command-line tool ends (`printing`).
"""
