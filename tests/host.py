"""XLA's flags for every process that the tests start: compile times count here, and run times hardly do."""

from importlib.metadata import version

# LLVM spends most of a compilation on code for arrays of a few elements. A train step of these sizes compiles in 50% of
# the time (JAX 0.10.2 and 0.11.2), and in 25% with the older generator of kernels too, which only 0.10 still has. How a
# program is partitioned, and what the devices tell each other, is decided before.
_COMPILE_FAST = {"xla_backend_optimization_level": 0}

# For `jax.jit(compiler_options=...)` of a program that runs for long, or whose last bits matter: as users have it.
OPTIMIZED = {"xla_backend_optimization_level": 3}

if version("jax").startswith("0.10."):
    _COMPILE_FAST["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


def xla_flags(devices: int) -> str:
    """Value of XLA_FLAGS for a process with this many virtual CPU devices."""
    flags = _COMPILE_FAST | {"xla_force_host_platform_device_count": devices}
    return " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
