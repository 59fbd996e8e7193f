"""The deployment on AWS as CDK constructs: `app.py` reads the configuration, `stacks` wires, each other module is one construct.

Knows nothing of the server's code; the two meet in the environment file that user-data writes.
"""
