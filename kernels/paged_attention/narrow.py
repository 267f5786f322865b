"""What the Hopper kernels do with pages of 8 bits: registers full of bfloat16 from what lies in shared memory.

Two neighbouring codes are read as one element of 16 bits, in the layout of a product's left operand, and come apart
into two arrays: the even columns and the odd. So a product over a head is the sum of two products over its halves
(where the right operand's rows come in the same order), a transposed read is the one that the hardware has for 16 bits,
and no code changes its thread. Codes are exact in bfloat16.

Kernels call these by the module's name, so that tests can put plain ones in their place: the interpreter knows neither
inline code nor products of what is in registers.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

# LLVM's dialect, for inline code, has no public name.
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

# Each makes two bfloat16 of the even (odd) bytes of a word.
# An int8 less its sign bit is the mantissa of 128 + x; the sign bit alone makes 128 or 256 of the same exponent.
_INT8 = """
    prmt.b32 a, $1, 0x43, $2;
    and.b32 b, a, 0xff7fff7f;
    and.b32 a, a, 0xff80ff80;
    sub.bf16x2 $0, b, a;
"""
# The exponent and mantissa of e4m3 in those of bfloat16 make a number 2^120 times too small, subnormal ones too.
_E4M3 = """
    shl.b32 a, $1, $2;
    shr.u32 b, a, 4;
    and.b32 b, b, 0x07f007f0;
    lop3.b32 a, a, 0x80008000, b, 0xea;
    mov.b32 b, 0x7b807b80;
    mul.bf16x2 $0, a, b;
"""
# The last operand says which bytes: a selection of bytes, a shift.
_CODE = {"int8": (_INT8, (0x4240, 0x4341)), "float8_e4m3fn": (_E4M3, (8, 0))}


def transforms(head_dim: int) -> tuple:
    """Of 8-bit shared memory whose rows are `head_dim` wide."""
    width = min(128, head_dim)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)


def load(smem) -> tuple[jax.Array, jax.Array]:
    """(even, odd) columns of codes [keys, H] as bfloat16 [keys, H / 2]."""
    keys, width = smem.shape
    return _load(smem, (keys, width // 2), transposed=False)


def load_transposed(smem) -> tuple[jax.Array, ...]:
    """The columns of codes [keys, H] as rows of bfloat16 arrays, the even ones before the odd: [H / 2, keys] twice, or
    of H = 64 [64, keys], since fewer rows make no product."""
    keys, width = smem.shape
    return _load(smem, (max(width // 2, 64), keys), transposed=True)


def _load(smem, shape: tuple[int, int], *, transposed: bool) -> tuple[jax.Array, ...]:
    width, (text, selections) = smem.shape[1], _CODE[jnp.dtype(smem.dtype).name]
    half = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    # Both halves beside each other, in one array.
    count = 1 if transposed and width == 64 else 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms(width)),), return_type=(half,) * count)
    def read(_, ref):
        pairs = fragmented_array.FragmentedArray.load_tiled(
            _pairs(ref, transposed, count == 1),
            min(128, width),
            is_signed=True,
            layout=fragmented_array.WGMMA_LAYOUT,
        )
        i32 = ir.IntegerType.get_signless(32)
        given = [utils.c(selection, i32) for selection in selections]
        if count == 1:
            # Rows 16w to 16w + 15 are those of warp w: the first two have the even elements, the others the odd.
            warp = arith.remui(utils.warp_idx(sync=False), utils.c(4, i32))
            first = arith.cmpi(arith.CmpIPredicate.ult, warp, utils.c(2, i32))
            given = [arith.select(first, *given)]
        return tuple(_unpack(pairs, text, selection) for selection in given)

    return read(smem)


def _pairs(ref: ir.Value, transposed: bool, repeated: bool) -> ir.Value:
    """The same memory, of half as many columns of 16 bits; `repeated`: twice, one after the other."""
    given = ir.MemRefType(ref.type)
    strides, _ = given.get_strides_and_offset()
    strides = [*(stride // 2 for stride in strides[:-1]), 1]
    shape, element = [*given.shape[:-1], given.shape[-1] // 2], ir.IntegerType.get_signless(16)
    if repeated:
        shape[1], strides[1] = 2, 0
    layout = ir.StridedLayoutAttr.get(0, strides)
    pairs = ir.MemRefType.get(shape, element, layout, given.memory_space)
    pairs = utils.ptr_as_memref(utils.memref_ptr(ref), pairs)
    return utils.memref_transpose(pairs, (1, 0, 3, 2)) if transposed else pairs


def _unpack(pairs: fragmented_array.FragmentedArray, text: str, selection: ir.Value):
    word, two = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    registers = np.empty_like(pairs.registers)
    for index, register in np.ndenumerate(pairs.registers):
        text_in_scope = "{\n.reg .b32 a, b;" + text + "}"
        # An immediate where the selection is a constant.
        made = llvm.inline_asm(word, [utils.bitcast(register, word), selection], text_in_scope, "=r,r,ri")
        registers[index] = utils.bitcast(made, two)
    return fragmented_array.FragmentedArray(_registers=registers, _layout=pairs.layout, _is_signed=None)


def scores_of(even, odd, b_smem) -> jax.Array:
    """even · b[:half] + odd · b[half:], float32."""
    half = b_smem.shape[0] // 2

    def multiply(acc):
        plgpu.wgmma(acc, even, b_smem.at[pl.ds(0, half)])
        plgpu.wgmma(acc, odd, b_smem.at[pl.ds(half, half)])
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((even.shape[0], b_smem.shape[1]), jnp.float32))


def products(parts, b_smem) -> tuple[jax.Array, ...]:
    """part · b of each of `parts`, float32."""

    def multiply(*accs):
        for acc, part in zip(accs, parts, strict=True):
            plgpu.wgmma(acc, part, b_smem)
        return tuple(acc[...] for acc in accs)

    accs = [plgpu.ACC((part.shape[0], b_smem.shape[1]), jnp.float32) for part in parts]
    return pl.run_scoped(multiply, *accs)


def split(x):
    """An array whose last axis has the even columns first, then the odd. (By slices, which XLA computes in what uses
    them; it makes a launch of its own of a transposition.)"""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def join(x):
    """The inverse of `split`."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return jnp.swapaxes(halves, -1, -2).reshape(x.shape)
