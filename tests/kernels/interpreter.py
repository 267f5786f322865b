"""What Pallas's interpreter lacks of a Hopper kernel, for tests that run one on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest


def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts plain products where the interpreter has none: of what is in registers. Skips where it knows too little."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} can't interpret casts of layouts; 0.11 can")
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from kernels import hopper

    def weigh(out, weights, v_smem):
        out = out + jnp.dot(weights.astype(jnp.float32), v_smem[...].astype(jnp.float32))
        # The interpreter asks it between a read into registers and the next copy to that place; wgmma has none.
        plgpu.commit_smem()
        return out

    def weigh_and_score(out, weights, v_smem, q_smem, k_smem, issued):
        out, scores = weigh(out, weights, v_smem), hopper.product(q_smem, k_smem.T)
        issued()
        return out, scores

    def float8_operand(weights):
        rows, columns = weights.shape
        parts = jnp.minimum(weights, 448).reshape(rows, columns // 16, 2, 4, 2)
        return parts.transpose(0, 1, 3, 2, 4).reshape(weights.shape).astype(jnp.float8_e4m3fn)

    monkeypatch.setattr(hopper, "float8_operand", float8_operand)
    monkeypatch.setattr(hopper, "weigh", weigh)
    monkeypatch.setattr(hopper, "weigh_and_score", weigh_and_score)
