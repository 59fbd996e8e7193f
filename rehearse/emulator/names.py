"""Names that the emulator and the rehearsal, which run in environments of their own, must agree on."""

ACCOUNT, REGION = "123456789012", "us-east-1"
TIMEOUT_S = 120.0  # of a request to a target, whatever the template says
TARGET_HEADER = "x-rehearse-target"  # of every answer that the load balancer gave: which instance was asked
