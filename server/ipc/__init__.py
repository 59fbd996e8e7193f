"""Typed messages between the API process and an engine process, and the sockets that carry them."""
