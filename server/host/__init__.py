"""What runs on an instance beside the server: `python -m server.host.deliver` before it starts, `python -m server.host.agent` with it.

Knows S3, the instance's metadata service and systemd; the server itself knows none of them. Configured by flags, which the units of `ami/`
fill from the environment file that user-data wrote.
"""
