"""Weights of few bits from shared memory to registers, widened to what tensor cores multiply."""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from kernels import hopper
from kernels.quantized_matmul.weight_only_tiles import TILE

# Each widens one word to pairs of elements. An integer is put into the low bits of a float whose own last place is
# worth one, and what that float stands for without it is subtracted: exact, without a conversion.
_INT4 = """{{
.reg .b32 a, b, c, d, least;
mov.b32 least, {least};
shr.b32 b, $4, 4; shr.b32 c, $4, 8; shr.b32 d, $4, 12;
lop3.b32 a, $4, 0x000f000f, {one}, 0xea; lop3.b32 b, b, 0x000f000f, {one}, 0xea;
lop3.b32 c, c, 0x000f000f, {one}, 0xea; lop3.b32 d, d, 0x000f000f, {one}, 0xea;
sub.{type}x2 $0, a, least; sub.{type}x2 $1, b, least; sub.{type}x2 $2, c, least; sub.{type}x2 $3, d, least;
}}"""
# bfloat16's fraction has only seven bits: the sign bit goes to the exponent, where it doubles 128, and is taken back.
_INT8_TO_BFLOAT16 = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0x43, 0x4140; prmt.b32 b, $2, 0x43, 0x4342;
and.b32 c, a, 0xff80ff80; and.b32 d, b, 0xff80ff80; and.b32 a, a, 0xff7fff7f; and.b32 b, b, 0xff7fff7f;
sub.bf16x2 $0, a, c; sub.bf16x2 $1, b, d;
}"""
_INT8_TO_FLOAT16 = """{
.reg .b32 a, b, c;
xor.b32 c, $2, 0x80808080;
prmt.b32 a, c, 0x64, 0x4140; prmt.b32 b, c, 0x64, 0x4342;
mov.b32 c, 0x64806480;
sub.f16x2 $0, a, c; sub.f16x2 $1, b, c;
}"""
_FLOAT8_TO_FLOAT16 = """{{
.reg .b16 a, b;
mov.b32 {{a, b}}, $2; cvt.rn.f16x2.{type}x2 $0, a; cvt.rn.f16x2.{type}x2 $1, b;
}}"""
_FLOAT8_TO_BFLOAT16 = """{{
.reg .b16 a, b, c, d; .reg .b32 s, t; .reg .f32 p, q, r, u;
mov.b32 {{a, b}}, $2; cvt.rn.f16x2.{type}x2 s, a; cvt.rn.f16x2.{type}x2 t, b;
mov.b32 {{a, b}}, s; mov.b32 {{c, d}}, t;
cvt.f32.f16 p, a; cvt.f32.f16 q, b; cvt.f32.f16 r, c; cvt.f32.f16 u, d;
cvt.rn.bf16x2.f32 $0, q, p; cvt.rn.bf16x2.f32 $1, u, r;
}}"""
_WIDEN = {
    ("int4", "bfloat16"): _INT4.format(type="bf16", one="0x43004300", least="0x43084308"),
    ("int4", "float16"): _INT4.format(type="f16", one="0x64006400", least="0x64086408"),
    ("int8", "bfloat16"): _INT8_TO_BFLOAT16,
    ("int8", "float16"): _INT8_TO_FLOAT16,
    ("float8_e4m3fn", "bfloat16"): _FLOAT8_TO_BFLOAT16.format(type="e4m3"),
    ("float8_e4m3fn", "float16"): _FLOAT8_TO_FLOAT16.format(type="e4m3"),
    ("float8_e5m2", "bfloat16"): _FLOAT8_TO_BFLOAT16.format(type="e5m2"),
    ("float8_e5m2", "float16"): _FLOAT8_TO_FLOAT16.format(type="e5m2"),
}


def fragment(w_smem, block: int, start: int, size: int, *, w_dtype, dtype) -> jax.Array:
    """[64, size] of `dtype` (bfloat16 or float16): rows start.. of a block of 64 columns of the weight, transposed,
    without scales; exact. Multiples of sixteen rows.

    `w_smem` [blocks, lines, 256] is a buffer in the order of `quantization.qarray.to_fragments`.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((TILE, size), dtype, layout=hopper.MATRIX),
    )
    def load(ctx, ref):
        del ctx
        return _load(ref, block, start, size, jnp.dtype(w_dtype).name, jnp.dtype(dtype).name)

    return load(w_smem)


def _load(ref, block: int, start: int, size: int, w_dtype: str, dtype: str):
    """A Mosaic GPU array, from a buffer that is one too."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get())
    word_elements = 8 if w_dtype == "int4" else 4
    pairs_of_word = llvm.StructType.get_literal([word] * (word_elements // 2))
    constraints = ",".join(["=r"] * (word_elements // 2) + ["r"])
    memref = ir.MemRefType(ref.type)
    block_bytes = memref.shape[1] * memref.shape[2] * utils.bitwidth(memref.element_type) // 8

    base = utils.memref_ptr(ref)
    own = arith.muli(arith.remui(utils.thread_idx(), utils.c(128, word)), utils.c(16, word))

    def load_words(first: int, count: int) -> list:
        """Words of a thread from its `first` in the block on: four follow each other, and then it is the next one's
        turn."""
        place = block * block_bytes + first // 4 * 128 * 16 + first % 4 * 4
        offset = arith.addi(own, utils.c(place, word))
        address = llvm.getelementptr(base.type, base, [offset], [-(2**31)], byte, llvm.GEPNoWrapFlags.none)
        words = llvm.load(ir.VectorType.get((count,), word), address, alignment=4 * count)
        return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(count)]

    # Of sixteen rows a thread has eight elements: two pairs in each of its two columns.
    first, end = (row // 16 * 8 // word_elements for row in (start, start + size))
    pairs = []
    while first < end:
        count = min(4 - first % 4, end - first)
        for one in load_words(first, count):
            wide = llvm.inline_asm(pairs_of_word, [one], _WIDEN[w_dtype, dtype], constraints)
            for i in range(word_elements // 2):
                register = vector.broadcast(ir.VectorType.get((1,), word), llvm.extractvalue(word, wide, [i]))
                pairs.append(vector.bitcast(pair, register))
        first += count
    layout = fragmented_array.WGMMA_LAYOUT
    # Its order: eight rows after eight rows, and of each the columns of the first eight before those of the second.
    registers = np.array(pairs, dtype=object).reshape(layout.registers_shape((TILE, size)))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
