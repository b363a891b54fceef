"""`python -m kvarn`: the `kvarn` program of the interpreter at hand."""

import sys

from kvarn.cli import main

if __name__ == "__main__":
    sys.exit(main())
