"""Traces as timelines: real ones of this machine's CPU, and made ones of accelerators with known answers."""

import random

import pytest

from perf.intervals import clip, foremost, innermost, intersect, subtract, total, union
from perf.trace import Memory, find_trace, module_name, read_note, read_trace
from tests.perf.xspace import Op, gpu_step, marks, space, write


def moments(spans) -> set[int]:
    return {at for start, end in spans for at in range(start, end)}


def random_pieces(draw: random.Random) -> list[tuple[int, int, int, str]]:
    starts = [draw.randint(0, 20) for _ in range(draw.randint(1, 8))]
    return [(at, at + draw.randint(1, 10), draw.randint(0, 3), f"op{i}") for i, at in enumerate(starts)]


def test_unions_intersections_and_differences_are_those_of_sets():
    draw = random.Random(0)
    for _ in range(300):
        first, second = (union((start, end) for start, end, _, _ in random_pieces(draw)) for _ in range(2))
        assert moments(intersect(first, second)) == moments(first) & moments(second)
        assert moments(subtract(first, second)) == moments(first) - moments(second)
        assert total(first) == len(moments(first))
        assert moments((a, b) for a, b, _ in clip([(*span, 0) for span in first], (5, 12))) == moments(first) & set(
            range(5, 12)
        )


def test_each_moment_goes_to_the_foremost_op():
    draw = random.Random(1)
    for _ in range(300):
        pieces = random_pieces(draw)
        owned = foremost(pieces)
        for at in range(32):
            active = [piece for piece in pieces if piece[0] <= at < piece[1]]
            owners = [item for start, end, item in owned if start <= at < end]
            least = min((rank for _, _, rank, _ in active), default=None)
            assert len(owners) == bool(active)
            assert all(owner in [item for _, _, rank, item in active if rank == least] for owner in owners)


def nested(draw: random.Random, start: int, end: int, depth: int) -> list[tuple[int, int, str]]:
    pieces, at = [(start, end, f"{start}-{end}-{depth}")], start
    while depth and at < end - 1 and draw.random() < 0.8:
        first = draw.randint(at, end - 1)
        last = draw.randint(first + 1, end)
        pieces += nested(draw, first, last, depth - 1)
        at = last
    return pieces


def test_self_time_is_what_nested_events_leave():
    draw = random.Random(2)
    for _ in range(300):
        pieces = nested(draw, 0, 30, 3)
        own = innermost(pieces)
        assert total(union((start, end) for start, end, _ in own)) == sum(end - start for start, end, _ in own) == 30
        for at in range(30):
            active = [piece for piece in pieces if piece[0] <= at < piece[1]]
            (owner,) = [item for start, end, item in own if start <= at < end]
            shortest = min(end - start for start, end, _ in active)
            assert owner in [item for start, end, item in active if end - start == shortest]


KERNELS = (("nvjet_gemm", "dot.1", 0, 300), ("loop_add", "loop_add_fusion", 350, 100), ("nvjet_gemm", "dot.1", 500, 90))


def gpu_trace(folder, *starts: int, host=()):
    ops = [op for start in starts for op in gpu_step(start, KERNELS)]
    return write(folder, {"/device:GPU:0": {"Stream #13(Compute)": ops}, "/host:CPU": {"python": list(host)}})


def test_runs_of_a_gpu_program_are_found_by_an_op_that_runs_once(tmp_path):
    """dot.1 occurs twice in each run, the fusion once; the first run begins with its first kernel."""
    timeline = read_trace(gpu_trace(tmp_path, 1000, 2000, 3000))
    (device,) = timeline.devices
    assert timeline.platform == "gpu"
    assert [(run.start, run.end) for run in device.executions] == [(1000, 2300), (2350, 3300), (3350, 3590)]


def test_marks_of_steps_say_how_often_a_program_ran(tmp_path):
    """An op of every second step only is rarer than the steps."""
    rare = Op("memset", 1700, 10, {"hlo_op": "memset.1", "hlo_module": "jit_step", "program_id": 7})
    ops = [op for start in (1000, 2000) for op in gpu_step(start, (("first", "add.0", 0, 50), *KERNELS))] + [rare]
    planes = {"/device:GPU:0": {"Stream #1": ops}}
    without = read_trace(write(tmp_path / "a", planes))
    assert len(without.devices[0].executions) == 1
    host = {"python": marks((5, 900, 50), (6, 1900, 50), inputs=[(800, 90)])}
    timeline = read_trace(write(tmp_path / "b", {**planes, "/host:CPU": host}))
    assert [(run.start, run.end) for run in timeline.devices[0].executions] == [(1000, 1710), (2000, 2590)]
    assert timeline.steps == ((5, (900, 950)), (6, (1900, 1950)))
    assert timeline.marks["input"] == ((800, 890),)


def test_derived_lines_of_a_gpu_are_not_counted_again(tmp_path):
    ops = gpu_step(1000, KERNELS)
    lines = {
        "Stream #1": ops,
        "XLA Modules": [Op("jit_step", 1000, 600)],
        "XLA Ops": ops,
        "Steps": [Op("1", 1000, 600)],
    }
    timeline = read_trace(write(tmp_path, {"/device:GPU:0": lines}))
    assert len(timeline.devices[0].pieces) == len(ops)


def test_a_tpu_names_ops_by_their_text(tmp_path):
    lines = {
        "XLA Modules": [Op("jit_step(123)", 100, 900), Op("jit_step(123)", 1100, 900)],
        "XLA Ops": [
            Op("%while.3 = (s32[], bf16[8,128]{1,0}) while(%tuple)", 100, 500),
            Op("%fusion.1 = bf16[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput", 150, 100),
            Op("%fusion.1 = bf16[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput", 300, 100),
        ],
        "Async XLA Ops": [Op("%all-gather-start.2 = (bf16[8,128]) all-gather-start(%p)", 200, 300)],
        "Steps": [Op("1", 100, 900)],
    }
    timeline = read_trace(write(tmp_path, {"/device:TPU:0": lines, "/device:TPU:0 SparseCore 0": {"x": []}}))
    (device,) = timeline.devices
    assert timeline.platform == "tpu"
    assert [(run.module, run.start, run.end) for run in device.executions] == [
        ("jit_step", 100, 1000),
        ("jit_step", 1100, 2000),
    ]
    own: dict[str, int] = {}
    for start, end, event in device.pieces:
        own[event.op] = own.get(event.op, 0) + end - start
    # The loop's own time is what its body leaves; another line's ops take nothing from it.
    assert own == {"while.3": 300, "fusion.1": 200, "all-gather-start.2": 300}


def test_threads_of_a_cpu_are_sorted_by_device(tmp_path):
    def op(name: str, start: int, length: int, device: int, run: int) -> Op:
        stats = {"hlo_op": name, "hlo_module": "jit_f", "device_ordinal": device, "run_id": str(run), "program_id": 1}
        return Op(name, start, length, stats)

    threads = {
        "tf_XLAEigen/1": [op("while.1", 0, 100, 0, 5), op("dot.2", 20, 30, 0, 5), Op("end: dot.2", 50, 1)],
        "tf_XLAEigen/2": [op("dot.2", 10, 40, 1, 5), op("add.1", 60, 20, 0, 5), op("dot.2", 200, 40, 1, 6)],
        "python": [Op("$loop.py:1 run", 0, 1000), Op("backend_compile_and_load", 5, 7)],
    }
    timeline = read_trace(write(tmp_path, {"/host:CPU": threads}))
    assert timeline.platform == "cpu" and [device.ordinal for device in timeline.devices] == [0, 1]
    assert sorted((event.op, start, end) for start, end, event in timeline.devices[0].pieces) == [
        ("add.1", 60, 80),
        ("dot.2", 20, 50),
        ("while.1", 0, 20),
        ("while.1", 50, 100),
    ]
    assert [(run.start, run.end) for run in timeline.devices[1].executions] == [(10, 50), (200, 240)]
    assert timeline.compiles == (("backend_compile_and_load", (5, 12)),)


def test_allocations_are_read(tmp_path):
    def block(name: str, at: int, used: int, size: int) -> Op:
        return Op(name, at, 1, {"allocator_name": "GPU_0_bfc", "bytes_allocated": used, "allocation_bytes": size})

    host = [block("MemoryAllocation", 10, 100, 60), block("MemoryDeallocation", 5, 40, 8), Op("MemoryAllocation", 1, 1)]
    timeline = read_trace(gpu_trace(tmp_path, 1000, host=host))
    assert timeline.memory == (Memory(5, "GPU_0_bfc", 40, 8, True), Memory(10, "GPU_0_bfc", 100, 60, False))


def test_a_truncated_trace_says_what_was_readable(tmp_path):
    planes = {
        "/host:metadata": {"x": [Op("a", 0, 1)]},
        "/device:GPU:0": {"Stream #1": gpu_step(0, KERNELS)},
        "/host:CPU": {"python": [Op("b", 0, 1)]},
    }
    data = space(planes)
    path = tmp_path / "cut.xplane.pb"
    path.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"readable: 2 planes \(/host:metadata, /device:GPU:0\), and not the rest"):
        read_trace(path)
    path.write_bytes(data[:10])
    with pytest.raises(ValueError, match="nothing is readable"):
        read_trace(path)


@pytest.mark.parametrize("content", [b'{"traceEvents": []}', b"\xff" * 100, random.Random(0).randbytes(500)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.xplane.pb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no whole trace of jax\.profiler: nothing is readable"):
        read_trace(path)


def test_an_empty_file_and_a_trace_without_devices_are_refused(tmp_path):
    path = tmp_path / "empty.xplane.pb"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty: the capture did not end"):
        read_trace(path)
    with pytest.raises(ValueError, match="its planes are /host:CPU, /device:CUSTOM:x; those read are"):
        read_trace(
            write(tmp_path, {"/host:CPU": {"python": marks((1, 0, 5))}, "/device:CUSTOM:x": {"l": [Op("a", 0, 1)]}})
        )


def test_the_newest_trace_of_a_folder_is_taken(tmp_path):
    with pytest.raises(ValueError, match=r"has no trace .*it has: notes\.txt"):
        (tmp_path / "notes.txt").write_text("x")
        find_trace(tmp_path)
    path = gpu_trace(tmp_path / "steps-1-2", 0)
    (tmp_path / "steps-1-2" / "capture.json").write_text('{"kind": "train"}')
    assert find_trace(tmp_path) == find_trace(path) == path
    assert read_note(path) == {"kind": "train"}
    (tmp_path / "steps-1-2" / "capture.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=r"capture\.json is no note of a capture"):
        read_note(path)


def test_module_names():
    assert module_name("jit_step(123)") == "jit_step" and module_name("jit_step") == "jit_step"
