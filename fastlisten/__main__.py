"""`python -m fastlisten`: the command line, which is in fastlisten.cli."""

import sys

from fastlisten.cli import main

if __name__ == "__main__":
    sys.exit(main())
