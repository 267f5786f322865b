"""What Pallas's interpreter lacks of a Hopper kernel, for tests that run one on the CPU."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from quantization.qarray import QArray
from tests.kernels.execution import Execution


def plain_products(monkeypatch: pytest.MonkeyPatch, execution: Execution) -> None:
    """Puts plain products where the interpreter has none: of what is in registers."""
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

    def score_and_weigh(q_smem, k_smem, out, weights, v_smem, issued, soften, num_rows):
        scores = hopper.product(q_smem, k_smem.T)
        issued()
        softened = soften(scores)
        assert len(softened) == 1 + num_rows
        return softened, weigh(out, weights, v_smem)

    def float8_operand(weights):
        rows, columns = weights.shape
        parts = jnp.minimum(weights, 448).reshape(rows, columns // 16, 2, 4, 2)
        return parts.transpose(0, 1, 3, 2, 4).reshape(weights.shape).astype(jnp.float8_e4m3fn)

    functions = (float8_operand, weigh, weigh_and_score, score_and_weigh)
    execution.put_plainly(monkeypatch, hopper, **{function.__name__: function for function in functions})


def plain_fragments(monkeypatch: pytest.MonkeyPatch, execution: Execution, *modules) -> None:
    """Puts plain products where weights of few bits are widened in registers, and multiplied from there."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from kernels.quantized_matmul import weight_only

    def fragment(w_smem, block, start, size, *, w_dtype, dtype):
        tiles = w_smem[block].reshape(1, -1, 512 if w_dtype == jnp.int4 else 4096)
        whole = QArray(tiles, jnp.ones((1, 64)), layout="fragments")
        assert whole.shape == (64 * tiles.shape[1], 64)
        return whole.dequantize(dtype).T[:, start : start + size]

    def products(sums, terms):
        results = []
        for total, pairs in zip(sums, terms, strict=True):
            for operand, x_smem in pairs:
                wide = operand().astype(jnp.float32), x_smem[...].T.astype(jnp.float32)
                total = total + jnp.dot(*wide, precision="highest")
            results.append(total)
        # The interpreter asks it between a read into registers and the next copy to that place.
        plgpu.commit_smem()
        return tuple(results)

    execution.put_plainly(monkeypatch, weight_only, fragment=fragment, products=products)
    for module in modules:
        execution.put_plainly(monkeypatch, module, fragment=fragment)
