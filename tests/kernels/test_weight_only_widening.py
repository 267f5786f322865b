"""What brings weights of few bits to registers, of which the interpreter knows nothing: the words that each thread
loads, and the PTX that widens them, run word by word."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip(f"the kernel needs JAX 0.11, and this is JAX {jax.__version__}", allow_module_level=True)

from kernels.quantized_matmul.weight_only_fragments import _WIDEN, _load
from quantization.qarray import quantize, to_fragments

# Every byte in every place of a word, beside its neighbours.
RANDOM = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
WORDS = np.concatenate(
    [np.arange(2**16, dtype=np.uint32) * np.uint32(0x10001), np.arange(2**16, dtype=np.uint32), RANDOM]
)
HALVES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
BYTES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def halves(word, dtype):
    return word[..., None].view(np.uint16).view(dtype)


def word_of(low, high):
    return np.stack([low, high], -1).view(np.uint16).view(np.uint32)[..., 0]


def permuted(a, b, selector):
    """PTX prmt.b32 without its sign mode."""
    source = np.concatenate([x[..., None].view(np.uint8) for x in np.broadcast_arrays(a, b)], -1)
    return np.stack([source[..., selector >> (4 * i) & 7] for i in range(4)], -1).view(np.uint32)[..., 0]


def looked_up(a, b, c, table):
    """PTX lop3.b32: the bit of `table` that the bits of a, b, c number."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def execute(text, word):
    """The registers $0, $1, .. that the PTX `text` makes of `word`, which is the last of them."""
    count = max(int(n) for n in re.findall(r"[$](\d)", text))
    registers = {f"${count}": word}

    def value(name):
        return registers[name] if name in registers else np.asarray(int(name, 0), np.uint32)

    for line in (part.strip() for part in text.strip("{}\n ").split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        group = re.fullmatch(r"\{(\w+), (\w+)\}, (\S+)", rest)
        if group:
            assert name == "mov.b32"
            both = value(group[3])[..., None].view(np.uint16)
            registers[group[1]], registers[group[2]] = both[..., 0], both[..., 1]
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        operands = [value(source) for source in sources]
        kind = name.split(".")[-1]
        match name.split("."):
            case ["mov", "b32"]:
                result = operands[0]
            case ["shr", "b32"]:
                result = operands[0] >> operands[1]
            case ["and", "b32"]:
                result = operands[0] & operands[1]
            case ["xor", "b32"]:
                result = operands[0] ^ operands[1]
            case ["prmt", "b32"]:
                result = permuted(operands[0], operands[1], int(operands[2]))
            case ["lop3", "b32"]:
                result = looked_up(*operands[:3], int(operands[3]))
            case ["sub", "bf16x2" | "f16x2"]:
                a, b = (halves(np.broadcast_to(x, word.shape).copy(), HALVES[kind[:-2]]) for x in operands)
                result = (a.astype(np.float32) - b.astype(np.float32)).astype(a.dtype).view(np.uint32)[..., 0]
            case ["cvt", "rn", "f16x2", "e4m3x2" | "e5m2x2"]:
                two = operands[0][..., None].view(np.uint8).view(BYTES[kind[:-2]])
                result = two.astype(np.float16).view(np.uint32)[..., 0]
            case ["cvt", "f32", "f16"]:
                result = operands[0].view(np.float16).astype(np.float32)
            case ["cvt", "rn", "bf16x2", "f32"]:
                # The first operand becomes the upper half.
                result = word_of(*(x.astype(ml_dtypes.bfloat16) for x in operands[::-1]))
            case _:
                raise AssertionError(f"unknown instruction {name}")
        registers[target] = result
    return [registers[f"${i}"] for i in range(count)]


@pytest.mark.parametrize("w_dtype, dtype", _WIDEN)
def test_a_word_becomes_its_elements(w_dtype, dtype):
    wide = HALVES["bf16" if dtype == "bfloat16" else "f16"]
    actual = np.stack([halves(register, wide) for register in execute(_WIDEN[w_dtype, dtype], WORDS)], 1)
    if w_dtype == "int4":
        nibbles = np.stack([(WORDS >> np.uint32(4 * i) & np.uint32(15)).astype(np.int8) - 8 for i in range(8)], -1)
        # Of a register the low half is one of the first four, the high half the one sixteen bits above.
        expected = np.stack([nibbles[:, :4], nibbles[:, 4:]], -1)
    else:
        expected = WORDS[:, None].view(np.uint8).view(jnp.dtype(w_dtype)).reshape(-1, 2, 2)
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))


def loaded(buffer, *arguments):
    """What `_load` makes of a buffer [blocks, lines, 256]: of each register [128 threads, 2], in the layout's order."""
    from jax._src.interpreters import mlir
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import func

    memory = buffer.reshape(-1).view(np.uint8)
    results = []
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        element = ir.IntegerType.get_signless(8 * buffer.itemsize)
        ref = ir.MemRefType.get(buffer.shape, element, memory_space=utils.smem())
        with ir.InsertionPoint(module.body):
            block = func.FuncOp("load", ir.FunctionType.get([ref], [])).add_entry_block()
        with ir.InsertionPoint(block):
            array = _load(block.arguments[0], *arguments)
            for register in array.registers.flat:
                # bitcast, broadcast, extractvalue, inline_asm, extract, load, getelementptr, addi.
                chain = [register.owner]
                for operand in (0, 0, 0, 0, 0, 0, 1):
                    chain.append(chain[-1].operands[operand].owner)
                pair = ir.DenseI64ArrayAttr(chain[2].attributes["position"])[0]
                word = ir.DenseI64ArrayAttr(chain[4].attributes["static_position"])[0]
                stride, place = (
                    ir.IntegerAttr(constant.operands[1].owner.attributes["value"]).value
                    for constant in (chain[7].operands[0].owner, chain[7])
                )
                assert str(chain[6].attributes["elem_type"]) == "i8"
                starts = stride * np.arange(128) + place + 4 * word
                words = memory[starts[:, None] + np.arange(4)].view(np.uint32)[:, 0]
                text = ir.StringAttr(chain[3].attributes["asm_string"]).value
                results.append(halves(execute(text, words)[pair], HALVES["bf16"]).astype(np.float32))
    return results


@pytest.mark.parametrize("w_dtype", ["int4", "int8"])
@pytest.mark.parametrize("block, start, size", [(0, 0, 128), (1, 128, 64), (1, 32, 32), (0, 192, 32)])
def test_a_thread_has_its_elements_of_the_operand(w_dtype, block, start, size):
    w = quantize(jax.random.normal(jax.random.key(0), (256, 128)), w_dtype, (64, 1))
    buffer = np.asarray(to_fragments(w).values).reshape(2, -1, 256)
    registers = loaded(buffer, block, start, size, w_dtype, "bfloat16")
    assert len(registers) == size // 4
    values, thread = np.asarray(w.values.astype(jnp.float32)), np.arange(128)[:, None]
    for i, actual in enumerate(registers):
        # PTX ISA, fragments of wgmma's A in registers: rows of A are columns of w.
        column = 64 * block + 16 * (thread // 32) + 8 * (i % 2) + thread % 32 // 4
        row = start + 8 * (i // 2) + 2 * (thread % 4) + np.arange(2)
        np.testing.assert_array_equal(actual, values[row, column])
