"""What runs the Hopper kernels' tests: the way of arrays to a device and back, and what pytest says without a GPU."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from quantization.qarray import QArray, quantize
from tests.kernels.execution import Execution


def test_arrays_go_to_the_device_and_come_back():
    here, there = jax.devices()[:2]
    seen = []

    def multiply(x, w: QArray, bias, out_dtype, *, factors, scale: float, new):
        # What is static is known while this is traced, and `interpret` would be.
        seen.append((jax.config.jax_default_device, type(scale), bias, out_dtype, new[0].shape))
        return {"y": (scale * (x @ w.dequantize()) * factors[0]).astype(out_dtype)}, new[1]

    x, new = np.ones((2, 8), np.float32), (jnp.zeros(3), jnp.arange(4))
    w = quantize(jnp.ones((8, 4)), "int8", (None, 1))
    for _ in range(2):
        arguments = {"factors": [jnp.full(4, 2.0)], "scale": 0.5, "new": new}
        results, last = Execution(there).run(multiply, x, w, None, jnp.dtype("bfloat16"), **arguments)
        np.testing.assert_allclose(np.asarray(results["y"], np.float32), 8, rtol=1e-2)
        np.testing.assert_array_equal(last, np.arange(4))
        assert results["y"].dtype == jnp.bfloat16 and results["y"].devices() == last.devices() == {here}
    # Compiled once.
    assert seen == [(there, float, None, jnp.dtype("bfloat16"), (3,))]


def test_a_compiled_kernel_keeps_its_own_functions(monkeypatch):
    module = types.SimpleNamespace(product="of the kernel")
    Execution(jax.devices()[0]).put_plainly(monkeypatch, module, product="plain")
    assert module.product == "of the kernel" and Execution(jax.devices()[0]).interpret() is None
    Execution(None).put_plainly(monkeypatch, module, product="plain")
    assert module.product == "plain"


def test_pytest_says_that_there_is_no_gpu():
    command = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-m", "pytest", "--device", "gpu", "-n", "0", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "--device gpu: no GPU" in done.stderr
