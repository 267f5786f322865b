"""Serves a model: `serve.py NAME [--setting value ...]`, where NAME is a config, a folder or a GGUF file."""

from __future__ import annotations

import sys

USAGE = """usage: serve.py NAME [--setting value ...]
       serve.py PATH [--setting value ...]     a Hugging Face folder, a GGUF file, a folder under runs/
       serve.py NAME --prompt TEXT             print one answer and exit
       serve.py NAME --bench                   measure, print one JSON line and exit
       serve.py NAME --help                    every setting, with its default
       serve.py --list                         the configs
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    # Imported late: the usage text needs neither JAX nor a device.
    import configs

    if arguments[0] == "--list":
        print(configs.listing("serve"))
        return 0
    from serving.command import FAILURES

    try:
        return serve(configs, arguments)
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(configs, arguments: list[str]) -> int:
    import tyro

    from parallel.platform import skip_absent_tpu
    from serving import command
    from serving.config import ServeRun

    run, description = default_run(configs, arguments[0])
    settings = tyro.cli(
        tyro.conf.AvoidSubcommands[ServeRun],
        prog=f"serve.py {arguments[0]}",
        description=description,
        default=run,
        args=arguments[1:],
    )
    skip_absent_tpu()
    return command.run(settings)


def default_run(configs, name: str):
    """(settings, description) of a config's name or a path. Raises ValueError for neither."""
    from pathlib import Path

    from serving.config import ServeRun

    if name in configs.names():
        module = configs.load(name)
        if not hasattr(module, "serve"):
            raise ValueError(f"config {name!r} can be trained and not served; see serve.py --list")
        return module.serve(), module.__doc__
    if Path(name).exists():
        return ServeRun(name=Path(name).resolve().stem, source=name), f"Serves {name}."
    raise ValueError(f"{name!r} is neither a config nor a path; configs: {', '.join(configs.names())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
