"""Trains a transformer: `train.py NAME [--setting value ...]`. `--list` shows the names, `NAME --help` the settings."""

from __future__ import annotations

import sys
import time

STARTED_NS = time.monotonic_ns()

USAGE = """usage: train.py NAME [--setting value ...]
       train.py NAME --help     every setting of a config, with its default
       train.py --list          the configs
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    # Imported late: the usage text needs neither JAX nor a device.
    import configs

    if arguments[0] == "--list":
        print(configs.listing("train"))
        return 0
    try:
        module = configs.load(arguments[0])
        return train(module, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(module, arguments: list[str]) -> int:
    import tyro

    from parallel.platform import skip_absent_tpu
    from training import loop
    from training.config import TrainRun

    if not hasattr(module, "train"):
        raise ValueError(f"config {arguments[0]!r} can be served and not trained; see train.py --list")
    settings = tyro.cli(
        tyro.conf.AvoidSubcommands[TrainRun],
        prog=f"train.py {arguments[0]}",
        description=module.__doc__,
        default=module.train(),
        args=arguments[1:],
    )
    skip_absent_tpu()
    try:
        loop.run(settings, started_ns=STARTED_NS)
    except loop.FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
