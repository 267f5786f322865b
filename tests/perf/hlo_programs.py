"""Programs compiled once and stored, without what nothing reads (layouts, most of the backend's settings).

train_v5e_4x4, train_v5p_4x4x4: the train step of dense-1b, 8 rows a chip, layers scanned and recomputed (jax 0.10.2,
libtpu 0.0.42.1; cases of benchmarks/tpu_memory.py). slices_v5e: two products and their gradients on two slices of
2 × 2. decode_v5e: a scan over layers with stacked caches. attention_v5e: the Pallas kernels. cpu: a product in a loop
from 2 to 7, on a mesh of 2 × 2. gpu: a part of a decode step with a kernel of ours.
"""

import functools
import lzma
from pathlib import Path

from perf.chips import CHIPS
from perf.hlo import Module, parse
from perf.interconnect import Network, Place, torus

FOLDER = Path(__file__).with_name("hlo_fixtures")
CHIP = {chip.name: chip for chip in CHIPS}

# Where make_mesh puts fsdp 16 on a slice of 4 × 4: along a snake, so that each chip's next one is its neighbour.
SNAKE = ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1), (1, 2))
SNAKE += ((2, 2), (3, 2), (3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1))


@functools.cache
def text(name: str) -> str:
    return lzma.decompress((FOLDER / f"{name}.hlo.xz").read_bytes()).decode()


@functools.cache
def program(name: str) -> Module:
    return parse(text(name))


def box(name: str, *dims: int, slices: int = 1) -> Network:
    """Slices of a chip, coordinates counting up, the first axis fastest."""
    grid = [()]
    for size in reversed(dims):
        grid = [(n, *rest) for rest in grid for n in range(size)]
    return torus(CHIP[name], [Place(index, place) for index in range(slices) for place in grid])


def snake() -> Network:
    return torus(CHIP["TPU v5e"], [Place(0, place) for place in SNAKE])


def planes() -> Network:
    """data 4 × fsdp 16 on v5p's 4 × 4 × 4: a plane for each part of data."""
    return torus(CHIP["TPU v5p"], [Place(0, (x, y, z)) for z in range(4) for x in range(4) for y in range(4)])
