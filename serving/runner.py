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
from serving.batch import ALL_ALLOWED, DRAFTS, NUM_FLOATS, NUM_INTS, DecodeBatch, PrefillBatch, trial_batch
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


def plan_cells(
    engine: EngineConfig, max_context: int, drafts: int, max_draft_batch: int, *, ragged: bool
) -> tuple[Cell, ...]:
    """Every program that serving needs. `ragged`: decoding costs what is live, so that one width serves all."""
    # The last width holds the longest context, in whole pages.
    widest = -(-max_context // engine.page_size) * engine.page_size
    widths = [*(width for width in engine.widths if width < widest), widest]
    blocks = (0, drafts) if drafts else (0,)

    def fits(rows: int, width: int, smallest: int) -> bool:
        return rows == smallest or rows * width <= engine.cell_tokens

    cells = [
        Cell(tiles, width, None)
        for width in widths
        for tiles in engine.tile_counts
        if fits(tiles, width, engine.tile_counts[0])
    ]
    for width in [widest] if ragged else widths:
        for rows in engine.batch_sizes:
            if ragged or fits(rows, width, engine.batch_sizes[0]):
                small = rows <= max_draft_batch or rows == engine.batch_sizes[0]
                cells += [Cell(rows, width, block) for block in blocks if not block or small]
    return tuple(cells)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling took."""

    seconds: float
    programs: int
    scratch_bytes: int
    """Largest memory that a program needs beside its arguments, on one device."""


class Runner:
    """Runs prefill and decode calls over caches of its own, which are donated from call to call. One thread calls it.

    `abstract`: shapes, dtypes and shardings of the weights, and of the draft model's where it has one; the weights
    themselves come later, by `load`. `caches`: the same of the model's cache and of the draft model's, or [].
    """

    def __init__(
        self,
        programs: Programs,
        abstract: tuple[Weights, Weights | None],
        caches: tuple[Cache, Cache],
        *,
        cells: tuple[Cell, ...],
        engine: EngineConfig,
        placement: Placement | None,
        device: jax.Device,
        options: Options,
    ) -> None:
        self._programs, self._engine, self._options = programs, engine, options
        self._abstract, self._weights = abstract, None
        self.cells = cells
        self._words = -(-programs.definition.config.vocab_size // 32)
        if placement is None:
            self._replicated = jax.sharding.SingleDeviceSharding(device)
        else:
            self._replicated = placement.sharding()
        self._make_caches = compile_zeros(caches)
        self._caches = caches
        self._seconds: dict[Cell, float] = {}
        self._compiled: dict[Cell, jax.stages.Compiled] = {}
        self._everything: dict[int, jax.Array] = {}
        # Stands for tokens that nothing reads: 8 MB that need not be sent for 256 rows of 8192.
        self._no_tokens: dict[tuple[int, int], jax.Array] = {}

    # Compilation

    def compile(self, progress: Callable[[str], None], wait: Callable[[], object]) -> Compiled:
        """Compiles every cell, several at once, while the next are traced. `progress` gets a line for each.

        `wait` returns when the device has nothing else to do, such as taking weights: on a GPU, XLA times the
        candidates for each product on it.
        """
        began = time.monotonic()
        workers = max(1, min(len(self.cells), os.cpu_count() or 1, 8))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures: dict[concurrent.futures.Future, Cell] = {}
            for cell in self.cells:
                futures[pool.submit(self._compile, self._lower(cell), wait)] = cell
                # What ended early failed, as a damaged file does: there is no reason to trace the others.
                for future in [future for future in futures if future.done()]:
                    future.result()
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                cell = futures[future]
                self._compiled[cell], seconds = future.result()
                progress(f"compiled {done} of {len(self.cells)}: {cell}, {seconds:.1f} s")
        for rows in {cell.rows for cell in self.cells}:
            self._everything[rows] = jax.device_put(np.full((rows, self._words), ALL_ALLOWED), self._replicated)
        analyses = [compiled.memory_analysis() for compiled in self._compiled.values()]
        scratch = max((a.temp_size_in_bytes + a.generated_code_size_in_bytes for a in analyses if a), default=0)
        return Compiled(time.monotonic() - began, len(self.cells), scratch)

    def _compile(self, lowered: jax.stages.Lowered, wait: Callable[[], object]) -> tuple[jax.stages.Compiled, float]:
        wait()
        began = time.monotonic()
        return compile_program(lowered, self._options), time.monotonic() - began

    def _lower(self, cell: Cell) -> jax.stages.Lowered:
        state = (*self._abstract, *self._caches)
        batch, mask = self._abstract_batch(cell), self._like((cell.rows, self._words), np.uint32)
        outputs: tuple = (
            jax.tree.map(lambda leaf: leaf.sharding, state[2]),
            jax.tree.map(lambda leaf: leaf.sharding, state[3]),
            self._replicated,
        )
        if cell.drafts is None:
            fn = jax.jit(self._programs.prefill, donate_argnums=(2, 3), out_shardings=outputs)
            return fn.lower(*state, batch, mask)
        outputs = (*outputs, self._replicated)
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
            return DecodeBatch(*common, *[self._like((rows,), np.int32)] * 2, self._like((rows,), np.bool_))
        tile = self._like((rows, self._engine.tile_tokens), np.int32)
        return PrefillBatch(*common, tile, self._like((rows, 3), np.int32))

    def load(self, weights: Weights, draft_weights: Weights | None) -> None:
        """Takes the weights, and makes the caches beside them."""
        self._weights = (weights, draft_weights)
        self.reset()
        for rows, width in {(cell.rows, cell.width) for cell in self.cells if cell.drafts is not None}:
            self._no_tokens[rows, width] = jax.device_put(np.zeros((rows, width), np.int32), self._replicated)

    def warm_up(self, record_time: Callable[[int, int, float], None] | None) -> None:
        """Runs every program, since the first run of one is slower. `record_time` gets the time of a round of each
        decode program: rows, drafts, seconds."""
        size = self._engine.page_size
        for cell in self.cells:
            if cell.drafts is None:
                batch = trial_batch(cell.rows, cell.width, size, self._engine.tile_tokens)
                jax.block_until_ready(self.prefill(cell, batch, None))
                began = time.monotonic()
                jax.block_until_ready(self.prefill(cell, batch, None))
                self._seconds[cell] = time.monotonic() - began
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
        """The caches are there: a call that fails on the device takes those that were donated to it along, or leaves
        arrays whose reading fails."""
        caches = (self._cache, self._draft_cache)
        if any(array.is_deleted() for array in jax.tree.leaves(caches)):
            return False
        try:
            jax.block_until_ready(caches)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def reset(self) -> None:
        """Empty caches in the place of those that are lost."""
        self._cache, self._draft_cache = [], []
        self._cache, self._draft_cache = self._make_caches()

    def cell(self, rows: int, width: int, drafts: int | None) -> Cell | None:
        """Smallest cell for `rows` rows of `width` tokens with exactly `drafts` drafts; None where there is none."""
        fitting = [c for c in self.cells if c.drafts == drafts and c.rows >= rows and c.width >= width]
        return min(fitting, key=lambda c: (c.rows * c.width, c.rows), default=None)

    def split(self, count: int, width: int) -> list[Cell]:
        """Prefill cells that hold `count` tiles of contexts of `width` together, in the least time."""
        sizes = {cell.rows for cell in self.cells if cell.drafts is None}
        cells = [cell for size in sizes if (cell := self.cell(size, width, None)) is not None]
        assert cells, f"no prefill program holds a context of {width}"
        # best[n]: seconds and cells of n tiles. A cell that was never timed counts as its rows.
        best: list[tuple[float, list[Cell]]] = [(0.0, [])]
        for tiles in range(1, count + 1):
            options = []
            for cell in cells:
                seconds, rest = best[max(tiles - cell.rows, 0)]
                options.append((seconds + self._seconds.get(cell, float(cell.rows)), [cell, *rest]))
            best.append(min(options, key=lambda option: option[0]))
        return best[count][1]

    def prefill(self, cell: Cell, batch: PrefillBatch, mask: np.ndarray | None) -> Result:
        """Starts a prefill; the result's arrays are still on their way."""
        (result,) = self._call(cell, batch, mask)
        return result

    def decode(
        self, cell: Cell, batch: DecodeBatch, mask: np.ndarray | None, rounds: int
    ) -> tuple[Result, DecodeBatch]:
        """Starts up to `rounds` rounds of decoding; the result's arrays are still on their way. The batch returned
        begins where this one ends."""
        if batch.tokens_BW is None:
            batch = batch._replace(tokens_BW=self._no_tokens[cell.rows, cell.width])
        result, state = self._call(cell, batch, mask, np.int32(rounds))
        return result, batch._replace(**state._asdict())

    def _call(self, cell: Cell, batch, mask: np.ndarray | None, *more) -> list:
        if mask is None:
            mask = self._everything[cell.rows]
        state = (*self._weights, self._cache, self._draft_cache)
        self._cache, self._draft_cache, *results = self._compiled[cell](*state, batch, mask, *more)
        return results


def compile_zeros(caches: tuple[Cache, Cache]) -> jax.stages.Compiled:
    """A program that makes zeroed caches of these shapes and shardings."""

    def zeros():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), caches)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda a: a.sharding, caches)).lower().compile()
