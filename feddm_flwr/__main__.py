"""`python -m feddm_flwr`: the command `feddm`."""

import sys

from feddm_flwr.cli.main import main

sys.exit(main())
