"""HLO text, read: hand-written lines with known answers, and whole programs of four compilers."""

import collections

import pytest

from perf.hlo import Array, arrays, parse
from perf.hlo_cost import collectives, flops, has_product, memory_bytes, valid_positions
from perf.replica_groups import replica_groups
from tests.perf.hlo_programs import program, text


def module(body: str, *others: str, header: str = "HloModule jit_f, is_scheduled=true, num_partitions=8"):
    return parse(header + "\n\n" + "\n\n".join([*others, "ENTRY %main (p: f32[8]) -> f32[8] {\n" + body + "\n}\n"]))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("f32[8,128]{1,0:T(8,128)S(1)}", [Array("f32", (8, 128), 1)]),
        (
            "(bf16[2]{0}, /*index=1*/s4[3,5]{1,0}, token[])",
            [Array("bf16", (2,)), Array("s4", (3, 5)), Array("token", ())],
        ),
        ("((f8e4m3fn[4]{0}), u32[]{:S(2)})", [Array("f8e4m3fn", (4,)), Array("u32", (), 2)]),
        ("s32[<=16]{0}", [Array("s32", (16,))]),
    ],
)
def test_results(result, expected):
    assert list(arrays(result)) == expected


def test_bytes_of_an_array():
    assert [Array(dtype, (3, 5)).num_bytes for dtype in ("f32", "bf16", "pred", "s4", "f8e4m3fn")] == [
        60,
        30,
        15,
        8,
        15,
    ]
    assert Array("token", ()).num_bytes == 0
    with pytest.raises(ValueError, match="HLO dtype 'what' has no known width"):
        _ = Array("what", ()).num_bytes


# Of a mesh of 2 × 4: axis a has the distance 4, axis b the distance 1.
ROWS, COLUMNS = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        # The mesh is laid over the devices 0 4 1 5 2 6 3 7.
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", COLUMNS),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ],
)
def test_replica_groups(written, expected):
    assert replica_groups(f", channel_id=3, replica_groups={written}, dimensions={{0}}", 8) == expected


def test_replica_groups_that_are_not_there():
    assert replica_groups(", channel_id=3", 8) is None
    with pytest.raises(ValueError, match="unknown form: 'ring 5'"):
        replica_groups("replica_groups=ring 5", 8)


def test_an_instruction():
    found = module(
        "  %p = f32[8]{0} parameter(0)\n"
        "  %c = f32[] constant(2.5)\n"
        "  ROOT %f.1 = (f32[8]{0:T(1024)}, u32[]) fusion(%p, /*index=1*/%c), kind=kLoop, calls=%body, "
        'metadata={op_name="jit(f)/mlp/a(\\"b\\")" source_file="m.py" source_line=7}, '
        'backend_config={"window_config":{"estimated_cycles":"1234"},"x":[{"y":"{"}]}',
        "%body (q: f32[8]) -> f32[8] {\n  ROOT %q = f32[8]{0} parameter(0)\n}",
    )
    entry = found.entry_computation
    one = entry.root
    assert (found.name, found.num_devices, one.name, one.opcode) == ("jit_f", 8, "f.1", "fusion")
    assert one.operands == ("p", "c") and one.results == (Array("f32", (8,)), Array("u32", ()))
    assert (one.scope, one.source, one.estimated_cycles) == ('jit(f)/mlp/a(\\"b\\")', "m.py:7", 1234)
    assert [callee.name for callee in found.callees(one)] == ["body"] and one.called == {"calls": ("body",)}
    assert entry.by_name["c"].literal == "2.5" and entry.operand_bytes(one) == 36


def test_the_largest_number_is_no_estimate():
    assert (
        module(
            '  ROOT %a = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"9223372036854775807"}'
        ).entry_computation.root.estimated_cycles
        is None
    )


def test_a_kernel_with_line_breaks_does_not_end_its_computation():
    found = module(
        "  %p = f32[8]{0} parameter(0)\n"
        '  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={\n"
        '  "a": {"b": 1\n'
        "}}\n"
        "}, backend_config={\n"
        "}\n"
        "  ROOT %r = f32[8]{0} negate(%k)"
    )
    assert [one.opcode for one in found.entry_computation.instructions] == ["parameter", "custom-call", "negate"]
    assert found.entry_computation.by_name["k"].target == "tpu_custom_call"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}", "not HLO text: it begins with '{' where 'HloModule NAME' is required"),
        (
            "HloModule jit_f\n\n%a (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n",
            "has no ENTRY computation",
        ),
        (
            "HloModule jit_f\n\nENTRY %a (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n",
            "ends within computation a",
        ),
    ],
)
def test_other_text_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given)


def test_truncated_text_is_refused():
    whole = text("slices_v5e")
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ValueError, match="HLO"):
            parse(whole[: int(share * len(whole))])


def loop(limit: str, begin: str, step: str, direction: str = "LT"):
    return module(
        f"  %begin = s32[] constant({begin})\n  %copy = s32[] copy(%begin)\n  %x = f32[8]{{0}} parameter(0)\n"
        "  %given = (f32[8]{0}, s32[]) tuple(%x, %copy)\n"
        "  ROOT %while.1 = (f32[8]{0}, s32[]) while(%given), condition=%condition, body=%body",
        "%condition (t: (f32[8], s32[])) -> pred[] {\n  %t = (f32[8]{0}, s32[]) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%t), index=1\n  %limit = s32[] constant({limit})\n"
        f"  ROOT %c = pred[] compare(%i, %limit), direction={direction}\n}}",
        "%body (t: (f32[8], s32[])) -> (f32[8], s32[]) {\n  %t = (f32[8]{0}, s32[]) parameter(0)\n"
        "  %y = f32[8]{0} get-tuple-element(%t), index=0\n  %i = s32[] get-tuple-element(%t), index=1\n"
        f"  %step = s32[] constant({step})\n  %next = s32[] add(%i, %step)\n"
        "  ROOT %r = (f32[8]{0}, s32[]) tuple(%y, %next)\n}",
    )


@pytest.mark.parametrize(
    ("limit", "begin", "step", "expected"), [(20, 0, 1, 20), (8, 0, 2, 4), (9, 0, 2, 5), (7, 2, 1, 5), (3, 5, 1, 0)]
)
def test_trip_count(limit, begin, step, expected):
    found = loop(str(limit), str(begin), str(step))
    assert found.trip_count(found.entry_computation.root) == expected


def test_a_trip_count_that_can_not_be_read_is_none():
    found = loop("8", "0", "1", direction="NE")
    assert found.trip_count(found.entry_computation.root) is None


def trips(name):
    return [program(name).trip_count(one) for _, one in program(name).instructions() if one.opcode == "while"]


def test_loops_of_programs():
    """20 layers, 4 pieces of the loss; in windowed einsums over 16 chips, 4 turns of two steps in both directions."""
    assert sorted(trips("train_v5e_4x4")) == [4] * 16 + [20] * 2
    assert trips("train_v5p_4x4x4") == [20, 4, 20]
    assert trips("decode_v5e") == [8] and trips("cpu") == [5]


def test_collectives_once_each():
    """As many as benchmarks/results/tpu_memory.json has for these programs; 19 copies of one are one."""
    kinds = collections.Counter(one.kind for one in collectives(program("train_v5e_4x4")))
    assert kinds == {"all-gather": 11, "all-reduce": 5, "collective-permute": 75}
    kinds = collections.Counter(one.kind for one in collectives(program("train_v5p_4x4x4")))
    assert kinds == {"all-gather": 19, "all-reduce": 8, "reduce-scatter": 5, "collective-permute": 2}
    kinds = collections.Counter(one.kind for one in collectives(program("cpu")))
    assert kinds == {"all-gather": 3}


def test_collectives_in_their_forms():
    found = collectives(
        module(
            "  %p = bf16[4]{0} parameter(0)\n  %r = f32[2]{0} parameter(1)\n"
            "  %ag.2 = bf16[8]{0} all-gather(%p), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0)\n"
            "  %a2a.1 = s32[8,1]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}\n"
            "  %a2a.2 = s32[8,1]{1,0} all-to-all(%a2a.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}\n"
            "  %cp = (f32[2]{0}, f32[2]{0}, u32[]{:S(2)}) collective-permute-start(%r), channel_id=3, "
            "source_target_pairs={{0,1},{1,0}}\n"
            "  %cpd = f32[2]{0} collective-permute-done(%cp)\n"
            "  %ags = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%p), channel_id=8, replica_groups=[2,4]<=[8]\n"
            "  %rs = f32[2]{0} reduce-scatter(%q), channel_id=11, replica_groups={{0,1,2,3},{4,5,6,7}}\n"
            "  %q = f32[8]{0} parameter(2)\n"
            "  ROOT %x = (f32[], /*index=1*/f32[3]{0}) all-reduce(%p, %q), channel_id=9, "
            "replica_groups=mesh['a'=4,'b'=2] {'a','b'}",
            "%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {\n  %p.1 = f32[8,4]{1,0} parameter(0)\n"
            "  ROOT %ar = f32[8,4]{1,0} all-reduce(%p.1), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}\n}",
            "%async_collective_fusion.1 (p: bf16[4]) -> bf16[8] {\n  %p.2 = bf16[4]{0} parameter(0)\n"
            "  ROOT %ag.1 = bf16[8]{0} all-gather(%p.2), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0)\n}",
        )
    )
    assert [(one.kind, one.group_size, one.num_bytes) for one in found] == [
        ("reduce-scatter", 4, 128),
        ("all-gather", 2, 16),
        ("all-to-all", 8, 32),
        ("all-to-all", 8, 32),
        ("collective-permute", None, 8),
        ("all-gather", 4, 32),
        ("reduce-scatter", 4, 32),
        ("all-reduce", 8, 16),
    ]
    assert found[4].pairs == ((0, 1), (1, 0)) and found[5].shapes == (Array("bf16", (16,)),)


def test_the_compiler_names_a_single_ring():
    scatters = [one for one in collectives(program("train_v5p_4x4x4")) if one.kind == "reduce-scatter"]
    gathers = [one for one in collectives(program("train_v5p_4x4x4")) if one.kind == "all-gather"]
    assert len(scatters) == 5 and any(one.one_ring for one in gathers)


# (image, kernel, output, stride, low padding, dilation of the image, of the kernel): pairs counted by hand.
@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((8, 1, 8, 1, 0, 1, 1), 8),
        # A contraction over the axis: one output, all of the kernel.
        ((8, 8, 1, 1, 0, 1, 1), 8),
        # A batch axis as a padded, reversed window: each output meets one element.
        ((1, 2, 2, 1, 1, 1, 1), 2),
        ((16, 16, 16, 15, 0, 16, 1), 16),
        # 3 wide, padded by 1: 2 + 3 + 3 + 2.
        ((4, 3, 4, 1, 1, 1, 1), 10),
        ((4, 2, 2, 2, 0, 1, 2), 3),
    ],
)
def test_window_positions(window, expected):
    image, kernel, output, stride, low, dilate, spread = window
    places = [o * stride + k * spread - low for o in range(output) for k in range(kernel)]
    brute = sum(0 <= place <= (image - 1) * dilate and place % dilate == 0 for place in places)
    assert valid_positions(*window) == brute == expected


def test_flops_of_products():
    found = module(
        "  %a = f32[16,64]{1,0} parameter(0)\n  %b = f32[64,32]{1,0} parameter(1)\n"
        "  %d = f32[16,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  %x = bf16[8,2048,256]{2,1,0} parameter(2)\n  %w = bf16[256,512,1]{1,0,2} parameter(3)\n"
        '  %g = (f32[32,16]{1,0}, s8[4096]{0}) custom-call(%b, %a), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}\n'
        "  ROOT %c = bf16[8,2048,512]{2,1,0} convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf"
    )
    entry = found.entry_computation
    assert flops(found, entry, entry.by_name["g"]) == 2 * 32 * 16 * 64 and has_product(found, entry.by_name["g"])
    assert flops(found, entry, entry.by_name["d"]) == 2 * 16 * 32 * 64
    assert flops(found, entry, entry.root) == 2 * 8 * 2048 * 512 * 256


def test_bytes_of_a_fusion():
    """A slice of a cache is read and written in place, VMEM is free, the rest is read whole."""
    found = module(
        "  %cache = bf16[8,1024]{1,0} parameter(0)\n  %new = bf16[1,1024]{1,0} parameter(1)\n"
        "  %near = bf16[1,1024]{1,0:S(1)} parameter(2)\n  %i = s32[] parameter(3)\n"
        "  %f = bf16[8,1024]{1,0} fusion(%cache, %new, %i), calls=%update\n"
        "  %g = bf16[1,1024]{1,0} fusion(%cache, %near, %i), calls=%take\n"
        "  %h = bf16[1,1024]{1,0:S(1)} add(%near, %new)\n"
        "  ROOT %s = bf16[1,1024]{1,0} dynamic-slice(%cache, %i, %i)",
        "%update (c: bf16[8,1024]) -> bf16[8,1024] {\n  %c = bf16[8,1024]{1,0} parameter(0)\n"
        "  %n = bf16[1,1024]{1,0} parameter(1)\n  %j = s32[] parameter(2)\n"
        "  ROOT %u = bf16[8,1024]{1,0} dynamic-update-slice(%c, %n, %j, %j)\n}",
        "%take (c: bf16[8,1024]) -> bf16[1,1024] {\n  %c = bf16[8,1024]{1,0} parameter(0)\n"
        "  %n = bf16[1,1024]{1,0} parameter(1)\n  %j = s32[] parameter(2)\n"
        "  %t = bf16[1,1024]{1,0} dynamic-slice(%c, %j, %j)\n  ROOT %a = bf16[1,1024]{1,0} add(%t, %n)\n}",
    )
    entry = found.entry_computation
    row = 2 * 1024
    assert memory_bytes(found, entry, entry.by_name["f"]) == 2 * row + 4
    assert memory_bytes(found, entry, entry.by_name["g"]) == 2 * row + 4
    assert memory_bytes(found, entry, entry.by_name["h"]) == row
    assert memory_bytes(found, entry, entry.root) == 2 * row


def test_text_of_other_compilers():
    """No estimates, and the same structure."""
    gpu, cpu = program("gpu"), program("cpu")
    kernel = gpu.entry_computation.by_name["mpmd_map.3"]
    assert kernel.target == "mosaic_gpu_v2" and kernel.results == (Array("bf16", (128, 8, 4, 128)),)
    assert {one.kind for one in collectives(cpu)} == {"all-gather"} and cpu.num_devices == 4
    for found in (gpu, cpu):
        assert all(one.estimated_cycles is None for _, one in found.instructions())
