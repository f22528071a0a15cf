"""``python -m cenote`` is ``cenote``."""

import sys

from cenote.cli import main

if __name__ == "__main__":
    sys.exit(main())
