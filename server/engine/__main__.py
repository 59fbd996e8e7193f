"""Entry point of the engine process."""

import sys

from server.engine.process import main

sys.exit(main())
