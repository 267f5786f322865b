"""Training with products in FP8: near the same step without, on one device and split."""

import functools

import jax
import numpy as np
import pytest

from model.execution import Execution
from model.precision import Precision
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from quantization.rules import ProductRules
from tests.model.tiny import COMPILE_FAST, dense, moe, packed_batch, random_params
from training.config import LossConfig
from training.step import StepSpec, objective

FP8 = ProductRules("fp8")
SIZES = {"embed_dim": 32, "mlp_dim": 64, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1}


def gradient(config, rules: ProductRules, placement: Placement | None = None, scan: bool = True):
    definition = Definition(config, scan, rules=rules)
    products = Precision(compute="float32", products=rules.products)
    run = Execution(products, placement, grouped_matmul="loop", quantized_matmul="xla")
    spec = StepSpec(definition, run, LossConfig(chunk_tokens=64))
    params, biases = random_params(Definition(config, scan))
    batch = packed_batch(rows=4, length=16)
    if placement is not None:
        params = jax.tree.map(
            lambda x, names: jax.device_put(x, placement.sharding(*names)), params, definition.logical[0]
        )
        batch = {name: jax.device_put(x, placement.sharding("batch", None)) for name, x in batch.items()}

    @functools.partial(jax.jit, compiler_options=COMPILE_FAST)
    def compute(params, biases, batch):
        total = batch["weights"].sum()
        return jax.value_and_grad(objective, has_aux=True)(params, biases, batch, total, spec)

    (loss, _), grads = compute(params, biases, batch)
    return float(loss), jax.tree.map(np.asarray, grads)


def off(got, want) -> dict[str, float]:
    """Distance of each gradient over its length."""
    flat = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        for (path, a), b in flat
    }


@pytest.mark.parametrize("name", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_gradients_are_near_those_of_wide_products(name):
    config = dense(**SIZES) if name == "dense" else moe(**SIZES, shared_mlp_dim=32)
    loss, got = gradient(config, FP8)
    wide, want = gradient(config, ProductRules())
    assert loss == pytest.approx(wide, rel=0.02) and loss != wide
    errors = off(got, want)
    # e5m2 has two bits behind the leading one: 6% a rounding, of many that average out.
    assert max(errors.values()) < 0.5, errors
    touched = [error for path, error in errors.items() if "attention" in path and "norm" not in path]
    assert min(touched) > 1e-3, "the products were not rounded"


def test_split_over_devices_gives_the_same():
    config = dense(**SIZES)
    placement = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]))
    loss, got = gradient(config, FP8, placement)
    alone, want = gradient(config, FP8, scan=True)
    assert loss == pytest.approx(alone, rel=1e-4)
    # A sum in another order may round to another neighbour of 8 bits.
    assert max(off(got, want).values()) < 0.1


@pytest.mark.parametrize("products", ["int8", "w8", "w4"])
def test_formats_of_served_weights_are_refused(products):
    with pytest.raises(ValueError, match=rf"precision.products={products} is a format of weights that are served"):
        Precision(products=products)
