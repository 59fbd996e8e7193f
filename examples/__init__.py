"""Runnable examples: the embedded model, the adapters with the script that trained them, and the demo."""
