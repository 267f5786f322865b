"""How programs are compiled: XLA's options, and a cache that outlives the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

Options = dict[str, str | bool]


def use_compilation_cache(folder: Path) -> None:
    """Compiled programs are kept in `folder`/xla: what starts again starts in seconds."""
    jax.config.update("jax_compilation_cache_dir", str((folder / "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compiler_options(settings: Sequence[str], platform: str) -> Options:
    """XLA options of "name=value" settings. One that names another platform (xla_gpu_..., xla_tpu_...) is left out:
    a config says once what each platform needs. Raises ValueError for a setting of another form."""
    options: Options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.startswith("xla_") or not value:
            raise ValueError(f"xla_options={setting!r} must be xla_NAME=VALUE")
        # xla_jf_: the TPU compiler's older names.
        kinds = {"xla_cpu": "cpu", "xla_gpu": "gpu", "xla_tpu": "tpu", "xla_jf_": "tpu"}
        if kinds.get(name[:7], platform) == platform:
            # XLA takes numbers as text, and booleans only as booleans.
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def compile_program(lowered: jax.stages.Lowered, options: Options) -> jax.stages.Compiled:
    """Raises ValueError for an option that XLA does not have here, or whose value it refuses."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "setting option" in str(error):
            raise ValueError(f"xla_options={options}: {error}") from error
        raise
