"""MiniStack on loopback with what our stacks need and it lacks. Runs in .venv-rehearse; imports nothing of the rest of the repository."""
