"""What the TPU kernels can take, how they cut a call into tiles, and what a tile needs of a core's memories."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels.attention.masks import Masks
from kernels.attention.tpu_steps import count
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.attention import AttentionCase

_MIB = 2**20
# Vector memory that a kernel may take, which the compiler is told: half of the least that a core of v5e, v5p, v6e or
# tpu7x has (64 MiB on v5p and tpu7x). Untold, the compiler stops at 16 MiB on v5e.
VMEM_BYTES = 32 * _MIB
# Scalar memory for the table of steps; a core has 1 MiB.
SMEM_BYTES = 512 * 2**10
LANES = 128
WIDEST = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
    """queries and keys of one step, multiples of 128, and the query heads of one kv head that share its keys."""

    queries: int
    keys: int
    heads: int


@dataclasses.dataclass(frozen=True)
class AllTiles:
    """Of the forward pass, of the gradient of queries, and of that of keys and values."""

    forward: Tiles
    d_queries: Tiles
    d_keys: Tiles


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tiles depend on; `share` query heads read one kv head, `itemsize` bytes of an element of q, k and v."""

    masks: Masks
    batch: int
    share: int
    key_dim: int
    value_dim: int
    itemsize: int


def choose_tiles(shape: Shape) -> AllTiles:
    """Static in the shapes, so that equal calls add in equal order. ValueError where the table of steps outgrows scalar
    memory."""
    return AllTiles(*(_choose(shape, need) for need in (forward_bytes, d_queries_bytes, d_keys_bytes)))


def _choose(shape: Shape, need) -> Tiles:
    # Products in float32 take several passes over operands in parts, which need room.
    largest = 512 if shape.itemsize == 2 else 256
    heads = max(n for n in (1, 2, 3, 4) if shape.share % n == 0)
    wanted = Tiles(_length(shape.masks.num_queries, largest), _length(shape.masks.num_keys, largest), heads)
    while need(shape, wanted) > VMEM_BYTES and wanted.heads > 1:
        fewer = max(n for n in range(1, wanted.heads) if shape.share % n == 0)
        wanted = dataclasses.replace(wanted, heads=fewer)
    check(shape, wanted, need)
    return wanted


def _length(number: int, largest: int) -> int:
    """A length of tiles that covers `number` with little beyond, since short tiles fill the processor badly."""
    return min(range(LANES, largest + 1, LANES), key=lambda n: (-(-number // n) * n * (1 + LANES / n), -n))


def check(shape: Shape, tiles: Tiles, need) -> None:
    """ValueError, naming the tile, for one that the shapes or a core's memories rule out; `need` is one of the
    functions below."""
    if tiles.queries % LANES or tiles.keys % LANES or min(tiles.queries, tiles.keys) < LANES:
        raise ValueError(f"attention {tiles}: queries and keys must be multiples of {LANES}")
    if tiles.heads < 1 or shape.share % tiles.heads:
        raise ValueError(f"attention {tiles}: heads must divide the {shape.share} query heads of a kv head")
    if (needed := need(shape, tiles)) > VMEM_BYTES:
        raise ValueError(
            f"attention {tiles} with widths {shape.key_dim}/{shape.value_dim} needs {needed / _MIB:.1f} MiB of vector "
            f"memory, and may take {VMEM_BYTES / _MIB:.0f} MiB; give it fewer queries, keys or heads"
        )
    if (needed := table_bytes(shape, tiles)) > SMEM_BYTES:
        raise ValueError(
            f"attention {tiles} over {shape.masks.num_queries} queries and {shape.masks.num_keys} keys needs a table "
            f"of {needed / 2**10:.0f} KiB in scalar memory, and may take {SMEM_BYTES / 2**10:.0f} KiB; give it more "
            "queries and keys, or split the batch"
        )


def table_bytes(shape: Shape, tiles: Tiles) -> int:
    rows = shape.batch if shape.masks.by_data else 1
    return 4 * (1 + rows) * count(shape.masks, tiles.queries, tiles.keys)


def forward_bytes(shape: Shape, tiles: Tiles) -> int:
    """Blocks are twice there, one in use and one being copied; scores and weights of all heads may live at a time."""
    size, heads = shape.itemsize, tiles.heads
    q = heads * _matrix(tiles.queries, shape.key_dim, size)
    k = _matrix(tiles.keys, shape.key_dim, size)
    v = _matrix(shape.value_dim, tiles.keys, size)
    out = heads * _matrix(shape.value_dim, tiles.queries, size)
    state = heads * (_matrix(shape.value_dim, tiles.queries, 4) + 2 * _matrix(1, tiles.queries, 4))
    return 2 * (q + k + v + out + _marks(shape, tiles)) + state + _live(tiles, size, 2)


def d_queries_bytes(shape: Shape, tiles: Tiles) -> int:
    size, heads = shape.itemsize, tiles.heads
    q = heads * (_matrix(tiles.queries, shape.key_dim, size) + _matrix(tiles.queries, shape.value_dim, size))
    k = _matrix(tiles.keys, shape.key_dim, size) + _matrix(shape.key_dim, tiles.keys, size)
    v = _matrix(tiles.keys, shape.value_dim, size)
    dq = heads * _matrix(shape.key_dim, tiles.queries, 4)
    rows = 2 * heads * _matrix(1, tiles.queries, 4)
    return 2 * (q + k + v + dq + rows + _marks(shape, tiles)) + dq + _live(tiles, size, 4)


def d_keys_bytes(shape: Shape, tiles: Tiles) -> int:
    size, heads = shape.itemsize, tiles.heads
    q = heads * (_matrix(tiles.queries, shape.key_dim, size) + _matrix(tiles.queries, shape.value_dim, size))
    kv = _matrix(tiles.keys, shape.key_dim, size) + _matrix(tiles.keys, shape.value_dim, size)
    totals = _matrix(tiles.keys, shape.key_dim, 4) + _matrix(tiles.keys, shape.value_dim, 4)
    rows = 2 * heads * _matrix(1, tiles.queries, 4)
    return 2 * (q + 2 * kv + rows + _marks(shape, tiles)) + totals + _live(tiles, size, 4)


def _live(tiles: Tiles, itemsize: int, arrays: int) -> int:
    """`arrays` of scores' size in float32, for as many heads as the compiler interleaves, and one to multiply. Float32
    operands are split into parts of bfloat16."""
    parts = 1 if itemsize == 2 else 3
    return tiles.heads * tiles.queries * tiles.keys * (4 * arrays + 2 * parts)


def _marks(shape: Shape, tiles: Tiles) -> int:
    kinds = shape.masks.segments + shape.masks.positions
    return kinds * (_matrix(1, tiles.queries, 4) + _matrix(1, tiles.keys, 4))


def _matrix(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a matrix in vector memory: padded to 128 columns, and to 8 rows of 4 bytes."""
    sublanes = 8 * 4 // itemsize
    return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * itemsize


def shape_of(case: AttentionCase, batch: int = 1) -> Shape:
    positions = case.positions and (case.causal or case.window is not None)
    masks = Masks(case.query_length, case.kv_length, case.causal, case.window, case.segments, positions)
    share, itemsize = case.num_heads // case.num_kv_heads, 4 if case.dtype == "float32" else 2
    return Shape(masks, batch, share, case.key_dim, case.value_dim, itemsize)


def unsupported(case: AttentionCase, target: Target) -> str | None:
    """Why the kernels can't compute this; None where they can."""
    if target.platform != "tpu":
        return f"the kernel is written for TPU, and the target is {target}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel takes bfloat16 and float32, not {case.dtype}"
    if max(case.key_dim, case.value_dim) > WIDEST or case.key_dim % 8 or case.value_dim % 8:
        return (
            f"the TPU kernel takes widths of at most {WIDEST} that are multiples of 8, not "
            f"{case.key_dim}/{case.value_dim}"
        )
    if 0 in (case.query_length, case.kv_length):
        return f"the TPU kernel needs a query and a key, not {case.query_length} and {case.kv_length} of them"
    try:
        choose_tiles(shape_of(case))
    except ValueError as error:
        return str(error)
    return None
