"""``python -m hpcq.pilot``: what a batch script starts."""

import sys

from hpcq.pilot.main import main

if __name__ == "__main__":
    sys.exit(main())
