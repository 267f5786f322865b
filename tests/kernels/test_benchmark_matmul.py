"""The benchmark of few-bit products: what it measures on an H100, and one row of its table on this machine."""

import pytest

from benchmarks import matmul
from benchmarks.matmul import FORMATS, IMPLS, WORKS, Work, build, lacking, measure
from kernels.target import Target

H100 = Target("gpu", (9, 0))


def test_what_is_measured_on_an_h100(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert len({work.name for work in WORKS}) == len(WORKS) and {work.format for work in WORKS} == set(FORMATS)
    kernels = {work.format for work in WORKS if lacking("pallas", work, H100) is None}
    assert kernels == set(FORMATS) - {"bf16", "training in bf16"}
    assert all(lacking("xla", work, H100) is None for work in WORKS)


@pytest.mark.parametrize("name", ["int8, scales of rows", "weights of int4", "training in fp8"])
def test_a_row_of_the_table(monkeypatch, name):
    monkeypatch.setattr(Work, "num_copies", 2)
    work = Work(name, 8, 128, 64)
    row = measure(work, build("xla", work), repeats=1)
    assert row["tflops"] == pytest.approx(work.flops() / row["microseconds"] / 1e6)
    assert row["weight_tb_per_second"] == pytest.approx(work.weight_bytes() / row["microseconds"] / 1e6)
    assert name == "training in fp8" or row["relative_error"] < 1e-2
    assert name in matmul._line({"work": work.name, "impl": "xla", **row})


def test_bytes_of_a_weight():
    shape = (1, 4096, 14336)
    values = 4096 * 14336
    assert Work("bf16", *shape).weight_bytes() == 2 * values
    assert Work("weights of int4", *shape).weight_bytes() == values / 2 + 4 * values / 128
    assert Work("fp8, scales of blocks", *shape).weight_bytes() == values + 4 * values / 128**2
    assert Work("fp8, one scale", *shape).weight_bytes() == values + 4


def test_it_says_what_it_measures_on_another_device(capsys):
    with pytest.raises(SystemExit) as stopped:
        matmul.main([])
    assert stopped.value.code == 2 and "measures NVIDIA GPUs" in capsys.readouterr().err
    assert lacking("torch", Work("weights of int8", 1, 128, 64), H100) in ("not installed", "has no such product")
    assert set(IMPLS) == {"pallas", "xla", "torch"}
