"""`python -m videovae`."""

import sys

from videovae.cli import main

if __name__ == "__main__":
    sys.exit(main())
