"""`python -m tests.training.slow_host SECONDS NAME --...` is `train.py NAME --...` that sleeps before each batch."""

import sys
from pathlib import Path

import train
from tests.training import runs


def main(words: list[str]) -> int:
    with runs.jax_settings_kept(), runs.recording(Path("/dev/null"), pause=float(words[0])):
        return train.main(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
