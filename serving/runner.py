"""The compiled programs and the arrays they work on: weights and cache. Nothing is compiled after `compile`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parallel.compilation import Options, compile_program
from parallel.sharding import Placement
from serving.batch import DRAFTS, NUM_FLOATS, NUM_INTS, DecodeBatch, PrefillBatch, trial_batch
from serving.config import EngineConfig
from serving.programs import Cache, Programs, Result, Weights


class Cell(NamedTuple):
    """The shape of a program: rows of a batch, context width in tokens, and drafts of a round (None: a prefill)."""

    rows: int
    width: int
    drafts: int | None

    def __str__(self) -> str:
        if self.drafts is None:
            return f"prefill of {self.rows} tiles, context {self.width}"
        return f"decode of {self.rows} rows, context {self.width}" + (f", {self.drafts} drafts" if self.drafts else "")


def plan_cells(engine: EngineConfig, max_context: int, drafts: int, max_draft_batch: int) -> tuple[Cell, ...]:
    """Every program that serving needs, those first that a first request needs."""
    widths = [width for width in engine.widths if width < max_context]
    # The last width holds the longest context, in whole pages.
    widths.append(-(-max_context // engine.page_size) * engine.page_size)
    cells = []
    for width in widths:
        for tiles in engine.tile_counts:
            cells.append(Cell(tiles, width, None))
        for rows in engine.batch_sizes:
            cells.append(Cell(rows, width, 0))
            if drafts and rows <= max_draft_batch:
                cells.append(Cell(rows, width, drafts))
    smallest = {None: engine.tile_counts[0]}

    def fits(cell: Cell) -> bool:
        return cell.rows * cell.width <= engine.cell_tokens or cell.rows == smallest.get(
            cell.drafts, engine.batch_sizes[0]
        )

    return tuple(cell for cell in cells if fits(cell))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling took."""

    seconds: float
    programs: int
    scratch_bytes: int
    """Largest memory that a program needs beside its arguments, on one device."""


class Runner:
    """Runs prefill and decode calls over caches of its own, which are donated from call to call. One thread calls it.

    `caches`: shapes, dtypes and shardings of the model's cache and of the draft model's, which may be empty.
    """

    def __init__(
        self,
        programs: Programs,
        weights: Weights,
        draft_weights: Weights | None,
        caches: tuple[Cache, Cache],
        *,
        cells: tuple[Cell, ...],
        engine: EngineConfig,
        placement: Placement | None,
        device: jax.Device,
        options: Options,
    ) -> None:
        self._programs, self._engine, self._options = programs, engine, options
        self._weights, self._draft_weights = weights, draft_weights
        self.cells = cells
        self._vocab = programs.definition.config.vocab_size
        self._words = -(-self._vocab // 32)
        if placement is None:
            self._replicated = jax.sharding.SingleDeviceSharding(device)
        else:
            self._replicated = placement.sharding()
        self._make_caches = compile_zeros(caches)
        self._cache, self._draft_cache = self._make_caches()
        self._compiled: dict[Cell, jax.stages.Compiled] = {}
        self._everything: dict[int, jax.Array] = {}

    # Compilation

    def compile(self, progress: Callable[[str], None]) -> Compiled:
        """Compiles every cell, several at once. `progress` gets a line for each."""
        began = time.monotonic()
        lowered = {}
        workers = max(1, min(len(self.cells), os.cpu_count() or 1, 8))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            # Tracing holds the interpreter's lock, compiling does not: one thread traces ahead of the others.
            futures = {}
            for cell in self.cells:
                lowered[cell] = self._lower(cell)
                futures[pool.submit(self._finish, lowered.pop(cell))] = cell
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                cell = futures[future]
                self._compiled[cell], seconds = future.result()
                progress(f"compiled {done} of {len(self.cells)}: {cell}, {seconds:.1f} s")
        for rows in {cell.rows for cell in self.cells}:
            self._everything[rows] = jax.device_put(
                np.full((rows, self._words), 0xFFFFFFFF, np.uint32), self._replicated
            )
        analyses = [compiled.memory_analysis() for compiled in self._compiled.values()]
        scratch = max((a.temp_size_in_bytes + a.generated_code_size_in_bytes for a in analyses if a), default=0)
        return Compiled(time.monotonic() - began, len(self.cells), scratch)

    def _finish(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
        began = time.monotonic()
        return compile_program(lowered, self._options), time.monotonic() - began

    def _lower(self, cell: Cell) -> jax.stages.Lowered:
        state = jax.tree.map(_abstract, (self._weights, self._draft_weights, self._cache, self._draft_cache))
        batch, mask = self._abstract_batch(cell), self._like((cell.rows, self._words), np.uint32)
        outputs = (
            jax.tree.map(lambda leaf: leaf.sharding, state[2]),
            jax.tree.map(lambda leaf: leaf.sharding, state[3]),
            self._replicated,
        )
        if cell.drafts is None:
            fn = jax.jit(self._programs.prefill, donate_argnums=(2, 3), out_shardings=outputs)
            return fn.lower(*state, batch, mask)
        decode = jax.jit(self._programs.decode, static_argnums=(0,), donate_argnums=(3, 4), out_shardings=outputs)
        return decode.lower(cell.drafts, *state, batch, mask, self._like((), np.int32))

    def _like(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _abstract_batch(self, cell: Cell) -> DecodeBatch | PrefillBatch:
        rows, pages = cell.rows, cell.width // self._engine.page_size
        common = (
            self._like((rows, NUM_INTS), np.int32),
            self._like((rows, NUM_FLOATS), np.float32),
            self._like((rows, pages), np.int32),
            self._like((rows, cell.width), np.int32),
        )
        if cell.drafts is not None:
            return DecodeBatch(*common)
        tile = self._like((rows, self._engine.tile_tokens), np.int32)
        return PrefillBatch(*common, tile, self._like((rows, 3), np.int32))

    def warm_up(self, record_time: Callable[[int, int, float], None] | None) -> None:
        """Runs every program, since the first run of one is slower. `record_time` gets the time of a round of each
        decode program: rows, drafts, seconds."""
        size = self._engine.page_size
        for cell in self.cells:
            if cell.drafts is None:
                batch = trial_batch(cell.rows, cell.width, size, self._engine.tile_tokens)
                jax.block_until_ready(self.prefill(cell, batch, None))
                continue
            batch = trial_batch(cell.rows, cell.width, size, None)
            # One draft length is compiled, and fewer drafts take fewer passes of the draft model: each is timed.
            for drafts in range(cell.drafts + 1) if cell.drafts else (0,):
                batch.ints_BI[:, DRAFTS] = drafts
                jax.block_until_ready(self.decode(cell, batch, None, 1))
                if record_time is not None and (drafts or not cell.drafts):
                    began = time.monotonic()
                    jax.block_until_ready(self.decode(cell, batch, None, 1))
                    record_time(cell.rows, drafts, time.monotonic() - began)

    # Calls

    @property
    def intact(self) -> bool:
        """The caches are there: a call that fails on the device takes those that were donated to it along."""
        return not any(array.is_deleted() for array in jax.tree.leaves((self._cache, self._draft_cache)))

    def reset(self) -> None:
        """Empty caches in the place of those that are lost."""
        self._cache, self._draft_cache = [], []
        self._cache, self._draft_cache = self._make_caches()

    def cell(self, rows: int, width: int, drafts: int | None) -> Cell | None:
        """Smallest cell for `rows` rows of `width` tokens with exactly `drafts` drafts; None where there is none."""
        fitting = [c for c in self.cells if c.drafts == drafts and c.rows >= rows and c.width >= width]
        return min(fitting, key=lambda c: (c.rows * c.width, c.rows), default=None)

    def prefill(self, cell: Cell, batch: PrefillBatch, mask: np.ndarray | None) -> Result:
        """Starts a prefill; the result's arrays are still on their way."""
        return self._call(cell, batch, mask)

    def decode(self, cell: Cell, batch: DecodeBatch, mask: np.ndarray | None, rounds: int) -> Result:
        """Starts up to `rounds` rounds of decoding; the result's arrays are still on their way."""
        return self._call(cell, batch, mask, np.int32(rounds))

    def _call(self, cell: Cell, batch, mask: np.ndarray | None, *more) -> Result:
        if mask is None:
            mask = self._everything[cell.rows]
        state = (self._weights, self._draft_weights, self._cache, self._draft_cache)
        self._cache, self._draft_cache, result = self._compiled[cell](*state, batch, mask, *more)
        return result


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def compile_zeros(caches: tuple[Cache, Cache]) -> jax.stages.Compiled:
    """A program that makes zeroed caches of these shapes and shardings."""

    def zeros():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), caches)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda a: a.sharding, caches)).lower().compile()
