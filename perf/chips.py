"""What a chip can do: dense peaks, memory and links, each figure with its source.

Peaks are dense (no structured sparsity) and per chip; `peak_flops` gives them per JAX device. Vendor sheets often
print the sparse figure, twice as large: MFU over it would be half of the truth.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GB = 10**9
MiB = 2**20
TERA = 1e12

_GOOGLE = "Google Cloud TPU documentation, page of the chip"
_GOOGLE_7X = "Google Cloud TPU documentation, page 'TPU7x (Ironwood)', which also lists v5p and v6e"
_COMPILER = "limit printed by the TPU compiler (libtpu, ahead-of-time compilation, 2026-11)"
_SCALING_BOOK = "How to Scale Your Model (jax-ml.github.io/scaling-book), TPU table"
_BF16_PASS = "bf16 figure: JAX's default precision multiplies float32 in one bf16 pass on TPU"
_TF32 = "TF32 figure: JAX's default precision multiplies float32 in TF32 on this GPU"
_V100 = "NVIDIA Tesla V100 datasheet and Volta architecture whitepaper"
_A100 = "NVIDIA A100 datasheet and Ampere architecture whitepaper"
_H100 = "NVIDIA H100 datasheet (sparse figures halved) and Hopper architecture whitepaper"
_H200 = "NVIDIA H200 datasheet (sparse figures halved)"
_BLACKWELL = "NVIDIA Blackwell architecture technical brief, dense column"
_L4 = "NVIDIA L4 datasheet (sparse figures halved) and Ada architecture whitepaper"
_MI300X = "AMD Instinct MI300X data sheet, dense column"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip. FLOP/s, bytes and bytes/s; None where no source gives the figure.

    `peaks` maps dtype name (`bfloat16`, `float16`, `float32`, `float8`, `int8`) to dense FLOP/s of the whole chip.
    `on_chip_bytes` is VMEM for TPUs, the last-level cache for GPUs. Link rates are one direction, all links of the
    chip together: `scale_up` is ICI, NVLink or Infinity Fabric, `scale_out` the network's share of one chip.
    `usable_bytes` is memory of the chip that a program can have. `sources` names where each figure comes from.
    """

    name: str
    kinds: str
    """Regular expression that matches the whole of JAX's `device_kind`."""
    peaks: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    on_chip_bytes: int
    scale_up_bandwidth: float | None
    scale_out_bandwidth: float | None
    sources: Mapping[str, str]
    usable_bytes: int | None = None
    devices_per_chip: int = 1

    def device_peak(self, dtype: str) -> float | None:
        """Dense FLOP/s of one JAX device for a dtype name of `peaks`, None where not published."""
        peak = self.peaks.get(dtype)
        return None if peak is None else peak / self.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one JAX device. Exactly one of `value` and `reason` (why there is none) is set."""

    value: float | None
    dtype: str
    source: str | None
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.reason is None), self


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """Peak bytes/s between one JAX device and its memory, either direction. Exactly one of `value` and `reason` is set.

    `cache_bytes`: what the device can keep on the chip between two steps, and so need not read again; None if unknown.
    """

    value: float | None
    source: str | None
    reason: str | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.reason is None), self


def _peaks(**tera: float) -> Mapping[str, float]:
    return MappingProxyType({dtype: value * TERA for dtype, value in tera.items()})


def _sources(peaks: str, memory: str, links: str, **more: str) -> Mapping[str, str]:
    return MappingProxyType({"peaks": peaks, "memory": memory, "on_chip": memory, "links": links, **more})


def _gib(value: float) -> int:
    return int(value * 2**30)


_TPU_V4 = Chip(
    name="TPU v4",
    # One JAX device per chip: its two cores work as one ("megacore"), the default.
    kinds=r"TPU v4",
    peaks=_peaks(bfloat16=275, float32=275, int8=275),
    memory_bytes=32 * GB,
    memory_bandwidth=1228 * GB,
    usable_bytes=_gib(30.75),
    on_chip_bytes=2 * 16 * MiB,
    scale_up_bandwidth=6 * 45 * GB,
    scale_out_bandwidth=6 * GB,
    sources=_sources(_GOOGLE, _GOOGLE, _SCALING_BOOK, usable=_COMPILER, on_chip=_COMPILER, float32=_BF16_PASS),
)
_TPU_V5E = Chip(
    name="TPU v5e",
    kinds=r"TPU v5 ?(lite|e)",
    # fp8 is not published for v5e.
    peaks=_peaks(bfloat16=197, float32=197, int8=393),
    memory_bytes=16 * GB,
    memory_bandwidth=819 * GB,
    usable_bytes=_gib(15.75),
    on_chip_bytes=128 * MiB,
    scale_up_bandwidth=200 * GB,
    scale_out_bandwidth=3.125 * GB,
    sources=_sources(_GOOGLE, _GOOGLE, _GOOGLE, usable=_COMPILER, on_chip=_COMPILER, float32=_BF16_PASS),
)
_TPU_V5P = Chip(
    name="TPU v5p",
    kinds=r"TPU v5p?",
    peaks=_peaks(bfloat16=459, float32=459, float8=459, int8=918),
    memory_bytes=95 * GB,
    memory_bandwidth=2765 * GB,
    usable_bytes=_gib(95.73),
    on_chip_bytes=2 * 64 * MiB,
    scale_up_bandwidth=600 * GB,
    scale_out_bandwidth=6.25 * GB,
    sources=_sources(_GOOGLE_7X, _GOOGLE, _GOOGLE, usable=_COMPILER, on_chip=_COMPILER, float32=_BF16_PASS),
)
_TPU_V6E = Chip(
    name="TPU v6e",
    kinds=r"TPU v6 ?(lite|e)",
    peaks=_peaks(bfloat16=918, float32=918, float8=918, int8=1836),
    memory_bytes=32 * GB,
    memory_bandwidth=1638 * GB,
    usable_bytes=_gib(31.24),
    on_chip_bytes=128 * MiB,
    scale_up_bandwidth=400 * GB,
    scale_out_bandwidth=12.5 * GB,
    sources=_sources(_GOOGLE_7X, _GOOGLE, _GOOGLE, usable=_COMPILER, on_chip=_COMPILER, float32=_BF16_PASS),
)
_TPU_7X = Chip(
    name="TPU7x",
    kinds=r"TPU ?7x",
    peaks=_peaks(bfloat16=2307, float32=2307, float8=4614),
    memory_bytes=192 * 2**30,
    memory_bandwidth=7380 * GB,
    usable_bytes=2 * _gib(94.74),
    on_chip_bytes=2 * 64 * MiB,
    scale_up_bandwidth=600 * GB,
    scale_out_bandwidth=12.5 * GB,
    # Each of the two TensorCores is a JAX device with half of the chip's memory.
    devices_per_chip=2,
    sources=_sources(_GOOGLE_7X, _GOOGLE_7X, _GOOGLE_7X, usable=_COMPILER, on_chip=_COMPILER, float32=_BF16_PASS),
)
_V100_SXM = Chip(
    name="V100 SXM2",
    kinds=r"Tesla V100-SXM[23]-\d+GB(-LS)?",
    peaks=_peaks(float16=125, float32=15.7),
    memory_bytes=32 * GB,
    memory_bandwidth=900 * GB,
    on_chip_bytes=6 * MiB,
    scale_up_bandwidth=150 * GB,
    scale_out_bandwidth=12.5 * GB,
    sources=_sources(_V100, _V100 + " (32 GB version)", _V100, scale_out="one 100 Gb/s adapter per GPU (DGX-1)"),
)
_A100_SXM = Chip(
    name="A100 SXM 80GB",
    kinds=r"(NVIDIA )?A100-SXM4?-80GB",
    peaks=_peaks(bfloat16=312, float16=312, float32=156, int8=624),
    memory_bytes=80 * GB,
    memory_bandwidth=2039 * GB,
    on_chip_bytes=40 * MiB,
    scale_up_bandwidth=300 * GB,
    scale_out_bandwidth=25 * GB,
    sources=_sources(_A100, _A100, _A100, float32=_TF32, scale_out="one 200 Gb/s adapter per GPU (DGX A100)"),
)
_A100_SXM_40 = dataclasses.replace(
    _A100_SXM,
    name="A100 SXM 40GB",
    kinds=r"(NVIDIA )?A100-SXM4?-40GB",
    memory_bytes=40 * GB,
    memory_bandwidth=1555 * GB,
)
_A100_PCIE = dataclasses.replace(
    _A100_SXM,
    name="A100 PCIe 80GB",
    kinds=r"(NVIDIA )?A100 80GB PCIe",
    memory_bandwidth=1935 * GB,
    scale_out_bandwidth=None,
)
_A100_PCIE_40 = dataclasses.replace(
    _A100_SXM_40, name="A100 PCIe 40GB", kinds=r"(NVIDIA )?A100-PCIE-40GB", scale_out_bandwidth=None
)
_H100_SXM = Chip(
    name="H100 SXM",
    kinds=r"(NVIDIA )?H100 80GB HBM3",
    peaks=_peaks(bfloat16=989.4, float16=989.4, float32=494.7, float8=1978.9, int8=1978.9),
    memory_bytes=80 * GB,
    memory_bandwidth=3350 * GB,
    usable_bytes=81559 * MiB,
    on_chip_bytes=50 * MiB,
    scale_up_bandwidth=450 * GB,
    scale_out_bandwidth=50 * GB,
    sources=_sources(
        _H100,
        _H100,
        _H100,
        float32=_TF32,
        usable="memory.total of nvidia-smi",
        scale_out="one 400 Gb/s adapter per GPU (DGX H100)",
    ),
)
_H100_PCIE = dataclasses.replace(
    _H100_SXM,
    name="H100 PCIe",
    kinds=r"(NVIDIA )?H100 PCIe",
    peaks=_peaks(bfloat16=756, float16=756, float32=378, float8=1513, int8=1513),
    memory_bandwidth=2039 * GB,
    scale_up_bandwidth=300 * GB,
    scale_out_bandwidth=None,
)
_H100_NVL = dataclasses.replace(
    _H100_SXM,
    name="H100 NVL",
    kinds=r"(NVIDIA )?H100 NVL",
    peaks=_peaks(bfloat16=835, float16=835, float32=417.5, float8=1670.5, int8=1670.5),
    memory_bytes=94 * GB,
    memory_bandwidth=3900 * GB,
    usable_bytes=None,
    scale_up_bandwidth=300 * GB,
    scale_out_bandwidth=None,
)
_H200_SXM = dataclasses.replace(
    _H100_SXM,
    name="H200",
    kinds=r"(NVIDIA )?H200",
    memory_bytes=141 * GB,
    memory_bandwidth=4800 * GB,
    usable_bytes=None,
    sources=_sources(_H200, _H200, _H200, float32=_TF32, scale_out="one 400 Gb/s adapter per GPU (DGX H200)"),
)
_B200 = Chip(
    name="B200",
    kinds=r"(NVIDIA )?B200",
    peaks=_peaks(bfloat16=2250, float16=2250, float32=1100, float8=4500, int8=4500),
    memory_bytes=180 * GB,
    memory_bandwidth=8000 * GB,
    on_chip_bytes=126 * MiB,
    scale_up_bandwidth=900 * GB,
    scale_out_bandwidth=50 * GB,
    sources=_sources(_BLACKWELL, _BLACKWELL, _BLACKWELL, float32=_TF32, scale_out="one 400 Gb/s adapter per GPU"),
)
_GB200 = dataclasses.replace(
    _B200,
    name="GB200",
    kinds=r"(NVIDIA )?GB200",
    # The same die at 1,200 W instead of 1,000 W.
    peaks=_peaks(bfloat16=2500, float16=2500, float32=1250, float8=5000, int8=5000),
    memory_bytes=186 * GB,
)
_L4_CHIP = Chip(
    name="L4",
    kinds=r"(NVIDIA )?L4",
    peaks=_peaks(bfloat16=121, float16=121, float32=60, float8=242.5, int8=242.5),
    memory_bytes=24 * GB,
    memory_bandwidth=300 * GB,
    on_chip_bytes=48 * MiB,
    scale_up_bandwidth=None,
    scale_out_bandwidth=None,
    sources=_sources(_L4, _L4, "no NVLink", float32=_TF32),
)
_MI300X_CHIP = Chip(
    name="MI300X",
    kinds=r"(AMD )?Instinct MI300X( OAM)?",
    # float32 is the matrix rate, not XF32.
    peaks=_peaks(bfloat16=1307.4, float16=1307.4, float32=163.4, float8=2614.9, int8=2614.9),
    memory_bytes=192 * GB,
    memory_bandwidth=5300 * GB,
    on_chip_bytes=256 * MiB,
    scale_up_bandwidth=7 * 64 * GB,
    scale_out_bandwidth=50 * GB,
    sources=_sources(_MI300X, _MI300X, _MI300X, scale_out="one 400 Gb/s adapter per GPU"),
)

CHIPS = (
    _V100_SXM,
    _A100_SXM,
    _A100_SXM_40,
    _A100_PCIE,
    _A100_PCIE_40,
    _H100_SXM,
    _H100_PCIE,
    _H100_NVL,
    _H200_SXM,
    _B200,
    _GB200,
    _L4_CHIP,
    _MI300X_CHIP,
    _TPU_V4,
    _TPU_V5E,
    _TPU_V5P,
    _TPU_V6E,
    _TPU_7X,
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX names `device_kind`, None if the table has none.

    The whole name must match: `NVIDIA H100 80GB HBM3 MIG 1g.10gb` is a slice of an H100 and not in the table.
    """
    for chip in CHIPS:
        if re.fullmatch(chip.kinds, device_kind.strip()):
            return chip
    return None


def chip_name(device_kind: str) -> str:
    """Its name in the table, or as JAX has it."""
    chip = find_chip(device_kind)
    return device_kind if chip is None else chip.name


def unknown_chip_reason(device_kind: str) -> str:
    """Why a device has no peak: the text that goes beside a null utilisation."""
    known = ", ".join(chip.name for chip in CHIPS)
    return f"no peak is known for device kind '{device_kind}'; chips known: {known}"


def peak_flops(device: jax.Device, dtype, *, local_devices: int = 1) -> Peak:
    """Dense matmul peak of one JAX device for operands of `dtype`.

    `local_devices` counts the devices of this process that the run uses. Accelerators ignore it; virtual CPU devices
    share one machine, so each has its share of the measured peak. On a CPU the first call measures (under 2 s).
    """
    name = jnp.dtype(dtype).name
    kind = "float8" if name.startswith("float8") else name
    if device.platform == "cpu":
        return _cpu_peak(name, local_devices)
    chip = find_chip(device.device_kind)
    if chip is None:
        return Peak(None, name, None, unknown_chip_reason(device.device_kind))
    value = chip.device_peak(kind)
    if value is None:
        published = ", ".join(sorted(chip.peaks))
        return Peak(None, name, None, f"no dense {kind} peak is published for {chip.name}; published: {published}")
    source = f"{chip.name} {kind} dense: {chip.sources['peaks']}"
    if kind in chip.sources:
        source += f"; {chip.sources[kind]}"
    if chip.devices_per_chip > 1:
        source += f"; 1 of {chip.devices_per_chip} devices of the chip"
    return Peak(value, name, source)


def peak_bandwidth(device: jax.Device, *, local_devices: int = 1) -> Bandwidth:
    """Peak memory bandwidth of one JAX device, bytes/s read plus written.

    `local_devices` as for `peak_flops`: virtual CPU devices share the machine's. On a CPU the first call measures
    (under 1.5 s).
    """
    if device.platform == "cpu":
        machine, source = measure_cpu_bandwidth()
        if local_devices > 1:
            source += f"; divided over {local_devices} virtual devices"
        # Any of the virtual devices may have all of the caches.
        return Bandwidth(machine / local_devices, source, cache_bytes=_cpu_caches())
    chip = find_chip(device.device_kind)
    if chip is None:
        return Bandwidth(None, None, unknown_chip_reason(device.device_kind))
    source = f"{chip.name} memory: {chip.sources['memory']}"
    if chip.devices_per_chip > 1:
        source += f"; 1 of {chip.devices_per_chip} devices of the chip"
    share = chip.devices_per_chip
    return Bandwidth(chip.memory_bandwidth / share, source, cache_bytes=chip.on_chip_bytes // share)


CPU_DTYPES = ("bfloat16", "float16", "float32")


def _cpu_peak(dtype: str, local_devices: int) -> Peak:
    if dtype not in CPU_DTYPES:
        return Peak(None, dtype, None, f"the peak of a CPU is measured for {', '.join(CPU_DTYPES)}, not for {dtype}")
    machine, source = measure_cpu(dtype)
    if local_devices > 1:
        source += f"; divided over {local_devices} virtual devices"
    return Peak(machine / local_devices, dtype, source)


@functools.cache
def measure_cpu(dtype: str) -> tuple[float, str]:
    """Matmul FLOP/s of the whole machine and how they were obtained; measured once per process.

    No training step may exceed the result, so it is the larger of two rates over several square products: the best
    by the wall clock, and the best per CPU-second times the cores, which holds when other processes take the cores
    now and not later. float32 is measured beside narrower dtypes: a CPU that emulates bf16 runs the float32 parts of
    a step faster (EPYC Turin, 2 cores, jaxlib 0.10.2: 490 GFLOP/s float32, 461 bf16).
    """
    device, cores = jax.local_devices(backend="cpu")[0], _usable_cores()
    dtypes = tuple(dict.fromkeys((dtype, "float32")))
    bursts = [burst for kind in dtypes for burst in _bursts(device, kind)]
    wall = max(burst.best_rate for burst in bursts)
    # A burst on few threads has clocks and caches that all cores together do not have: prefer bursts that spread.
    spread = [burst for burst in bursts if burst.cpu_seconds >= 0.6 * cores * burst.seconds] or bursts
    by_cpu = max(burst.flops / burst.cpu_seconds for burst in spread) * cores
    source = (
        f"measured: best of {', '.join(dtypes)} matmuls up to {max(burst.size for burst in bursts)}³ on {cores:g} CPU "
        f"cores ({wall / 1e9:.0f} GFLOP/s by the wall clock, {by_cpu / 1e9:.0f} by CPU time × cores)"
    )
    return max(wall, by_cpu), source


class _Burst(NamedTuple):
    """Products of one size in a row: FLOPs, wall and CPU seconds of all, and the FLOP/s of the fastest."""

    size: int
    flops: float
    seconds: float
    cpu_seconds: float
    best_rate: float


def _bursts(device: jax.Device, dtype: str) -> list[_Burst]:
    """Square matmuls in a dtype, about half a second of them."""
    bursts: list[_Burst] = []
    matmul = jax.jit(jnp.matmul)
    for size in (512, 1024, 2048):
        # A slow machine would spend seconds on the large products, and reaches its peak on small ones.
        if bursts and 2.0 * size**3 / bursts[-1].best_rate > 0.1:
            break
        with jax.default_device(device):
            x = jnp.full((size, size), 1 / size, dtype)
            matmul(x, x).block_until_ready()
            # The kernel accounts a running thread's CPU time once a tick (up to 10 ms): shorter bursts would miss it.
            bursts.append(_burst(lambda x=x: matmul(x, x).block_until_ready(), size, seconds=0.12))
    return bursts


def _burst(product: Callable[[], object], size: int, seconds: float) -> _Burst:
    start, cpu_start = time.perf_counter(), time.process_time()
    fastest, count, before = math.inf, 0, start
    while before - start < seconds or count < 2:
        product()
        now = time.perf_counter()
        fastest, count, before = min(fastest, now - before), count + 1, now
    flops = 2.0 * size**3
    return _Burst(size, flops * count, before - start, time.process_time() - cpu_start, flops / fastest)


def _usable_cores() -> float:
    """Cores that this process may use: its affinity, and on Linux the quota of its control group."""
    if sys.platform != "linux":
        return float(os.cpu_count() or 1)
    cores = float(len(os.sched_getaffinity(0)))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, float(math.ceil(int(quota) / int(period))))
    return cores


_BLOCK_BYTES = 4 * MiB
# The best moment of this many seconds counts, since any step may meet such a one. On this project's two-core virtual
# machines, busy with other work, moments by the wall clock gave 14 to 42 GB/s, and by CPU time 69 to 85.
_MOMENT = 0.01


@functools.cache
def measure_cpu_bandwidth() -> tuple[float, str]:
    """Memory bytes/s (read plus written) of the whole machine and how they were obtained; measured once per process.

    No step may exceed the result, so it is the best of copies and of reads alone, by all usable cores and by one, over
    arrays well beyond the caches. Each thread's rate is per second of its own CPU time, which holds when other
    processes take the cores now and not later. It can't be told how much of the bandwidth itself they take: measure
    when nothing else runs.
    """
    cores, caches = max(int(_usable_cores()), 1), _cpu_caches() or 0
    # Sources and targets are four times the caches together; touching them takes longer than all else.
    size = max(64 * MiB, 2 * caches)
    rates: dict[str, float] = {}
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        parts = list(pool.map(_blocks, [math.ceil(size / cores / _BLOCK_BYTES)] * cores))
        for name, work, moved in (("copied", _copy, 2 * _BLOCK_BYTES), ("read", _read, _BLOCK_BYTES)):
            for chosen in (parts, parts[:1]) if cores > 1 else (parts,):
                stop = time.perf_counter() + 0.2
                ends = list(pool.map(lambda part, work=work, stop=stop: _repeat(work, part, stop), chosen))
                rate = sum(_best_moment(times, moved) for times in ends)
                rates[name] = max(rates.get(name, 0.0), rate)
    source = (
        f"measured: best {_MOMENT * 1e3:.0f} ms of CPU time over {2 * size / MiB:.0f} MiB, {cores} CPU cores ("
        + ", ".join(f"{rate / 1e9:.1f} GB/s {name}" for name, rate in rates.items())
        + ")"
    )
    return max(rates.values()), source


def _blocks(count: int) -> np.ndarray:
    """float32 [2, count, block]: sources and targets, each page of them touched."""
    return np.ones((2, count, _BLOCK_BYTES // 4), np.float32)


def _copy(part: np.ndarray, index: int) -> None:
    np.copyto(part[1, index % part.shape[1]], part[0, index % part.shape[1]])


def _read(part: np.ndarray, index: int) -> None:
    block = part.reshape(-1, part.shape[-1])[index % (2 * part.shape[1])]
    np.dot(block, block)


def _repeat(work: Callable[[np.ndarray, int], None], part: np.ndarray, stop: float) -> list[float]:
    """CPU time of the thread when each of its blocks was done, the start first."""
    ends = [time.thread_time()]
    while time.perf_counter() < stop or len(ends) < 3:
        work(part, len(ends))
        ends.append(time.thread_time())
    return ends


def _best_moment(times: list[float], block_bytes: int) -> float:
    """Largest bytes/s of one thread over consecutive blocks that took a moment or more."""
    best, first = 0.0, 0
    for last in range(1, len(times)):
        while times[last] - times[first + 1] >= _MOMENT:
            first += 1
        # The whole run, where that is all there is.
        if times[last] - times[first] >= min(_MOMENT, times[-1] - times[0]):
            best = max(best, (last - first) * block_bytes / (times[last] - times[first]))
    return best


@functools.cache
def _cpu_caches() -> int | None:
    """Last-level caches of the cores that this process may use; None where the system does not say."""
    if sys.platform != "linux":
        return None
    return cpu_cache_bytes(os.sched_getaffinity(0), Path("/sys/devices/system/cpu"))


def cpu_cache_bytes(cores: Iterable[int], folder: Path) -> int | None:
    """Last-level caches of these cores together, from Linux's `folder`; None where it does not list them."""
    caches: dict[tuple[int, str], int] = {}
    for core in cores:
        for index in (folder / f"cpu{core}" / "cache").glob("index*"):
            size = (index / "size").read_text().strip()
            key = (int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip())
            caches[key] = int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
    last = max((level for level, _ in caches), default=None)
    return None if last is None else sum(size for (level, _), size in caches.items() if level == last)
