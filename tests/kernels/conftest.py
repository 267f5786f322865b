"""How tests get at what runs a Hopper kernel."""

import jax
import pytest

from tests.kernels.execution import Execution


@pytest.fixture(scope="session")
def execution(pytestconfig) -> Execution:
    """Interprets kernels, or runs them on a GPU where pytest was told `--device gpu`. Skips where JAX can't."""
    if pytestconfig.option.device == "gpu":
        return Execution(jax.devices("cuda")[0])
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} can't interpret the kernels; 0.11 can")
    return Execution(None)
