"""The rehearsal: what the CDK command line, user-data and the server do on AWS, done on one machine without an account.

`python -m rehearse` (`make rehearse`) runs it; docs/rehearse.md says what it proves. Knows the product from outside alone: templates, the
deployed user-data, HTTPS. `emulator/` runs in an environment of its own, since MiniStack pins its own botocore.
"""
