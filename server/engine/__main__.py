"""Entry point of the engine process."""

import os
import sys

from server.engine.process import main

sys.exit(main(os.environ))
