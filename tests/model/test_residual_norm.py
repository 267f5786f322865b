"""The residual stream through `add_rms_norm`'s kernels, with plain arithmetic in their place: what is added, read and
differentiated where, on one device and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.norm import NormCase, choose, reference
from kernels.target import Target
from model import attention, layers
from model.rounded import readers
from model.selection import select_kernels
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules
from tests.model.tiny import COMPILE_FAST, assert_close, dense, execution, moe, packed_batch, random_params

H100 = Target("gpu", (9, 0))
MODELS = {
    "dense": dense(),
    "moe": moe(),
    "zero-centered, both": dense(norm_zero_centered=True, norm_placement="both"),
    "post": dense(norm_placement="post"),
}


@pytest.fixture
def calls(monkeypatch):
    """The kernels' calls: rows of x and of the residual forward, gradients of readers back; and of either direction the
    columns of a narrow matrix."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    monkeypatch.setattr("kernels.norm.tiles.unsupported", lambda case, target: None)
    made = []

    def forward(x, residual, scale, narrow, *, epsilon, offset):
        made.append((len(x), len(residual)))
        total, normed, rstd = reference.add_rms_norm(x, residual, scale, epsilon=epsilon, offset=offset)
        if narrow is not None:
            made.append(f"{narrow.shape[1]} columns")
        return total, normed, rstd[:, 0], None if narrow is None else reference.multiply(normed, narrow)

    def backward(x, rstd, scale, d_normed, d_sum, narrow, d_products, *, offset):
        made.append(len(d_normed))
        hat, dy, d_narrow = x * rstd[:, None], sum(d_normed), None
        if narrow is not None:
            made.append(f"{narrow.shape[1]} columns back")
            d_narrow = (hat * (scale + offset)).T @ d_products
            dy = dy + d_products @ narrow.T
        g = dy * (scale + offset)
        dx = rstd[:, None] * (g - hat * jnp.mean(g * hat, axis=-1, keepdims=True)) + d_sum
        return dx, jnp.sum(dy * hat, axis=0), d_narrow

    from kernels.norm import gpu

    monkeypatch.setattr(gpu, "forward", forward)
    monkeypatch.setattr(gpu, "backward", backward)
    return made


def gradients(config, run, placement=None, scan=False):
    """Of a sum of the hidden states, by every parameter; and the hidden states."""
    definition = Definition(config, scan)
    params, biases = random_params(definition)
    batch = packed_batch(4, 8)
    run = dataclasses.replace(run, placement=placement)

    def loss(params):
        model = definition.bind(params, biases)
        hidden = model(batch["tokens"], batch["positions"], batch["segments"], run).hidden_BTD
        return jnp.sum(hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))), hidden

    grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=COMPILE_FAST)
    return grad(jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize(
    ("model", "remat", "scan"),
    [("dense", "none", False), ("moe", "full", True), ("zero-centered, both", "dots", False), ("post", "none", False)],
)
def test_gradients_are_those_of_xla(calls, monkeypatch, model, remat, scan):
    config, apart = MODELS[model], []
    for module in (attention, layers):
        monkeypatch.setattr(module, "readers", lambda x, count: apart.append(isinstance(x, tuple)) or readers(x, count))
    run = execution(config, remat=remat, target=H100)
    want = gradients(config, dataclasses.replace(run, norm="xla"), scan=scan)
    assert not calls
    got = gradients(config, dataclasses.replace(run, norm="pallas"), scan=scan)
    assert_close(got, want, 1e-5)
    if model == "dense":
        # A layer reads its input three times and the sum with attention's output twice.
        assert calls == [(32, 32)] * 2 + [2, 3] * 2 and all(apart)
    assert ("8 columns" in calls and "8 columns back" in calls) == (model == "moe")
    assert bool(calls) == (model != "post")


def test_on_a_mesh_each_device_has_its_rows(calls, monkeypatch):
    config, chosen = MODELS["moe"], []
    monkeypatch.setattr(layers, "choose", lambda impl, case, target: chosen.append(case) or choose(impl, case, target))
    placement = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]))
    run = execution(config, norm="pallas", target=H100)
    want = gradients(config, dataclasses.replace(run, norm="xla"))
    got = gradients(config, run, placement)
    assert (16, 16) in calls and 3 in calls and "8 columns back" in calls
    assert NormCase("float32", 16, config.embed_dim, True, 1) in chosen
    assert_close(got, want, 1e-4)


def test_the_router_multiplies_where_the_norm_does_not(calls, monkeypatch):
    """A matrix that the kernel lacks, by name; and "auto", which takes it where it was measured."""
    config = MODELS["moe"]
    want = gradients(config, execution(config, norm="xla"))
    monkeypatch.setattr("kernels.norm.tiles.unsupported", lambda case, target: "wide" if case.num_columns else None)
    assert_close(gradients(config, execution(config, norm="pallas", target=H100)), want, 1e-5)
    assert (32, 32) in calls and "8 columns" not in calls
    monkeypatch.setattr("kernels.norm.tiles.unsupported", lambda case, target: None)
    for measured in (False, True):
        calls.clear()
        monkeypatch.setattr(
            "kernels.norm.tiles.beats_xla", lambda case, measured=measured: measured or not case.num_columns
        )
        assert_close(gradients(config, execution(config, target=H100)), want, 1e-5)
        assert (32, 32) in calls and ("8 columns" in calls) == measured


def test_rows_in_parts_are_no_kernels(calls):
    config = MODELS["dense"]
    rules = ShardingRules(act_embed="tensor", act_mlp=None, act_heads=None, act_vocab=None)
    placement = Placement(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2]), rules)
    with pytest.raises(ValueError, match=r"act_embed=tensor splits them"):
        gradients(config, execution(config, norm="pallas", target=H100), placement)
    got = gradients(config, execution(config, target=H100), placement)
    assert not calls
    assert_close(got, gradients(config, execution(config, norm="xla")), 1e-4)


def test_copies_are_as_many_as_readers():
    x = jnp.ones(3)
    assert readers(x, 3) == (x,) * 3 and readers((x, x), 2) == (x, x)
    with pytest.raises(AssertionError, match="2 copies for 3 readers"):
        readers((x, x), 3)
    np.testing.assert_array_equal(readers(x, 1)[0], x)


@pytest.mark.parametrize(("model", "said"), [("dense", True), ("post", False)])
def test_the_log_says_what_norms_run_on(model, said):
    placement = Placement(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    selection = select_kernels(
        Definition(MODELS[model], False),
        **dict.fromkeys(("attention", "grouped_matmul", "quantized_matmul", "norm", "dispatch"), "auto"),
        dtype="float32",
        rows=2,
        sequence_length=8,
        segments=False,
        placement=placement,
        device=jax.devices()[0],
    )
    line = "residual sums and their norms: xla, the only implementation for cpu"
    assert (line in selection.reasons) == said
