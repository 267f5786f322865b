"""Serving on TPU with the kernel over pages by name: what is resolved, and that TPU's compiler takes the programs."""

import re

import jax
import pytest
from jax.sharding import Mesh

from parallel.mesh import MeshConfig
from parallel.topology import tpu_devices
from serving.config import EngineConfig, ServeRun, ServingKernels
from serving.resolve import Resolved, resolve
from serving.startup import make_runner
from tests.kernels.absent_tpu import SLICES, needs_libtpu, nothing_cached
from tests.model.tiny import dense

MODEL = dense(num_heads=4, num_kv_heads=2, head_dim=128, num_layers=1, max_positions=512)
PAGES = 33


def resolved(kv_dtype: str, tensor: int, page_size: int = 128) -> Resolved:
    engine = EngineConfig(
        max_sequences=4,
        batch_sizes=(4,),
        max_context=512,
        tile_tokens=16,
        tile_counts=(2,),
        page_size=page_size,
        num_pages=PAGES,
        kv_dtype=kv_dtype,
    )
    kernels, mesh = ServingKernels(paged_attention="pallas"), MeshConfig(tensor=tensor)
    run = ServeRun(name="tiny", model=MODEL, engine=engine, kernels=kernels, mesh=mesh)
    return resolve(run, tpu_devices(SLICES["v5e"])[:tensor])


@needs_libtpu
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_pages_are_read_where_they_lie_in_decode_and_prefill(kv_dtype):
    server = resolved(kv_dtype, 1)
    assert "attention over pages: pallas, asked for by name; pallas in decode, pallas in prefill" in server.choices
    assert server.live_decode and server.live_prefill and not server.holds_scores
    # Narrower page tables would save nothing.
    assert {cell.width for cell in server.cells} == {512}


@needs_libtpu
def test_pages_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(ValueError, match="int8 of a multiple of 128 positions, not 64"):
        resolved("int8", 1, page_size=64)


@needs_libtpu
@pytest.mark.parametrize(("kv_dtype", "tensor"), [("int8", 2), pytest.param("auto", 1, marks=pytest.mark.slow)])
def test_programs_compile_for_tpu(kv_dtype, tensor):
    """A device of two has one kv head: XLA lays its pages in memory in another order than those of both."""
    server = resolved(kv_dtype, tensor)
    with nothing_cached():
        runner = make_runner(server, PAGES)
    mesh = Mesh(server.devices, ("x",)) if server.placement is None else server.placement.mesh
    for cell in server.cells:
        with nothing_cached(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = runner._lower(cell).compile().as_text()
        assert "tpu_custom_call" in text
        assert not re.search(rf"(bf16|s8)\[{PAGES},[^ ]* copy\(", text)
