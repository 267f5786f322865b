"""Plans and measures: `python -m perf COMMAND [--setting value ...]`; see perf/command.py."""

import sys

from perf.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
