"""The compiled programs and the arrays they work on: weights and cache. Nothing is compiled after `compile`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parallel.compilation import Options, compile_program
from parallel.sharding import Placement
from serving.batch import (
    ALL_ALLOWED,
    DRAFTS,
    NUM_FLOATS,
    NUM_INTS,
    Drawing,
    RowBatch,
    State,
    Tiles,
    trial_batch,
    trial_tiles,
)
from serving.config import EngineConfig
from serving.programs import Cache, Forward, Programs, Result, Weights

_TRIALS = 4
"""Rounds that are timed as one, each begun before the one before it ends, as they are when serving."""


class Cell(NamedTuple):
    """The shape of a program: rows of a batch, context width in tokens, and drafts of a round (None: a prefill)."""

    rows: int
    width: int
    drafts: int | None

    def __str__(self) -> str:
        if self.drafts is None:
            return f"prefill of {self.rows} tiles, context {self.width}"
        return f"decode of {self.rows} rows, context {self.width}" + (f", {self.drafts} drafts" if self.drafts else "")


class Draw(NamedTuple):
    """The shape of a program that draws: rows, positions of each, and what it can do."""

    rows: int
    length: int
    drawing: Drawing

    def __str__(self) -> str:
        positions = "" if self.length == 1 else f" at {self.length} positions"
        return f"{self.drawing.name.lower()} draw of {self.rows} rows{positions}"

    @property
    def reads_tokens(self) -> bool:
        """Whether its rows' tokens so far are on the device."""
        return self.length > 1 or self.drawing is Drawing.FULL


def plan_cells(
    engine: EngineConfig, max_context: int, drafts: int, max_draft_batch: int, *, live_decode: bool, live_prefill: bool
) -> tuple[Cell, ...]:
    """Every program that serving needs. `live_decode`, `live_prefill`: these cost what is live, so that one width
    serves all; but for the fewest tiles, whose keys are cut into parts by the width to fill the chip."""
    # The last width holds the longest context, in whole pages.
    widest = -(-max_context // engine.page_size) * engine.page_size
    widths = [*(width for width in engine.widths if width < widest), widest]
    blocks = (0, drafts) if drafts else (0,)

    def shapes(sizes: tuple[int, ...], live: bool, several: bool) -> list[tuple[int, int]]:
        """Rows and widths; `several` widths of the fewest rows even if the cost is that of what is live."""
        fitting = [
            (rows, width)
            for width in widths
            for rows in sizes
            if live or rows == sizes[0] or rows * width <= engine.cell_tokens
        ]
        return [(r, w) for r, w in fitting if not live or w == widest or (several and r == sizes[0])]

    cells = [Cell(*shape, None) for shape in shapes(engine.tile_counts, live_prefill, True)]
    for rows, width in shapes(engine.batch_sizes, live_decode, False):
        small = rows <= max_draft_batch or rows == engine.batch_sizes[0]
        cells += [Cell(rows, width, block) for block in blocks if not block or small]
    return tuple(cells)


def plan_draws(cells: tuple[Cell, ...], *, branches: bool) -> tuple[Draw, ...]:
    """What draws after each cell: two programs where the device branches by itself, since the second then does only
    what is wanted, and for rows that a prompt alone may have, of which one token is drawn."""
    decode = {(cell.rows, 1 + cell.drafts) for cell in cells if cell.drafts is not None}
    prefill = {(cell.rows, 1) for cell in cells if cell.drafts is None}
    few = (Drawing.GREEDY, Drawing.FULL)
    return tuple(
        Draw(*shape, drawing)
        for shape in sorted(decode | prefill)
        for drawing in (few if branches or shape not in decode else Drawing)
    )


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
        self.cells, self.draws = cells, plan_draws(cells, branches=programs.branches)
        # Whole pages, so that the widest cell holds it.
        self.context = max(cell.width for cell in cells)
        self._words = -(-programs.definition.config.vocab_size // 32)
        if placement is None:
            self._replicated = jax.sharding.SingleDeviceSharding(device)
        else:
            self._replicated = placement.sharding()
        self._make_caches = compile_zeros(caches)
        self._caches = caches
        self._seconds: dict[Cell, float] = {}
        self._compiled: dict[Cell | Draw, jax.stages.Compiled] = {}
        self._everything: dict[int, jax.Array] = {}
        # Stands for tokens that nothing reads: 8 MB that need not be sent for 256 rows of 8192.
        self._no_tokens: dict[int, jax.Array] = {}

    # Compilation

    def compile(self, progress: Callable[[str], None], wait: Callable[[], object]) -> Compiled:
        """Compiles every cell, several at once, while the next are traced. `progress` gets a line for each.

        `wait` returns when the device has nothing else to do, such as taking weights: on a GPU, XLA times the
        candidates for each product on it.
        """
        began = time.monotonic()
        total = len(self.cells) + len(self.draws)
        workers = max(1, min(total, os.cpu_count() or 1, 8))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures: dict[concurrent.futures.Future, Cell | Draw] = {}
            for shape, lowered in self._lower_all():
                futures[pool.submit(self._compile, lowered, wait)] = shape
                # What ended early failed, as a damaged file does: there is no reason to trace the others.
                for future in [future for future in futures if future.done()]:
                    future.result()
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                shape = futures[future]
                self._compiled[shape], seconds = future.result()
                progress(f"compiled {done} of {total}: {shape}, {seconds:.1f} s")
        for rows in {cell.rows for cell in self.cells}:
            self._everything[rows] = jax.device_put(np.full((rows, self._words), ALL_ALLOWED), self._replicated)
        analyses = [compiled.memory_analysis() for compiled in self._compiled.values()]
        scratch = max((a.temp_size_in_bytes + a.generated_code_size_in_bytes for a in analyses if a), default=0)
        return Compiled(time.monotonic() - began, total, scratch)

    def _compile(self, lowered: jax.stages.Lowered, wait: Callable[[], object]) -> tuple[jax.stages.Compiled, float]:
        wait()
        began = time.monotonic()
        return compile_program(lowered, self._options), time.monotonic() - began

    def _lower_all(self) -> Iterator[tuple[Cell | Draw, jax.stages.Lowered]]:
        forwards: dict[tuple[int, int], Forward] = {}
        for cell in self.cells:
            lowered = self._lower(cell)
            forwards[cell.rows, 1 + (cell.drafts or 0)] = self._forward_of(lowered)
            yield cell, lowered
        for draw in self.draws:
            yield draw, self._lower_draw(draw, forwards[draw.rows, draw.length])

    def lower_round(self, cell: Cell) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """The two programs of a greedy round without drafts, traced: up to the draw, and the draw."""
        assert cell.drafts == 0, cell
        lowered = self._lower(cell)
        draw = min(draw for draw in self.draws if draw[:2] == (cell.rows, 1))
        return lowered, self._lower_draw(draw, self._forward_of(lowered))

    def _forward_of(self, lowered: jax.stages.Lowered) -> Forward:
        """Shapes of what a cell's program leaves for the draw."""
        return jax.tree.map(lambda leaf: self._like(leaf.shape, leaf.dtype), lowered.out_info[2])

    def _lower(self, cell: Cell) -> jax.stages.Lowered:
        arguments = (*self._abstract, *self._caches)
        cache, draft_cache = (jax.tree.map(lambda leaf: leaf.sharding, part) for part in self._caches)
        outputs, batch = (cache, draft_cache, self._replicated), self._abstract_batch(cell.rows, cell.width)
        if cell.drafts is None:
            shape = (cell.rows, self._engine.tile_tokens)
            tiles = Tiles(self._like(shape, np.int32), *[self._like(shape[:1], np.int32)] * 2)
            return jax.jit(self._programs.prefill, donate_argnums=(2, 3), out_shardings=outputs).lower(
                *arguments, batch, tiles
            )
        decode = jax.jit(self._programs.decode, static_argnums=(0,), donate_argnums=(3, 4), out_shardings=outputs)
        return decode.lower(cell.drafts, *arguments, batch, self._abstract_state(cell.rows, cell.drafts > 0))

    def _lower_draw(self, draw: Draw, forward: Forward) -> jax.stages.Lowered:
        mask = self._like((draw.rows, self._words), np.uint32) if draw.drawing is Drawing.FULL else None
        # Nothing of a page table is read, and one that is not there need not fit.
        batch = self._abstract_batch(draw.rows, 0)
        run = jax.jit(self._programs.draw, static_argnums=(0,), out_shardings=self._replicated)
        state = self._abstract_state(draw.rows, draw.reads_tokens)
        return run.lower(draw.drawing, self._abstract[0], batch, state, forward, mask)

    def _like(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _abstract_batch(self, rows: int, width: int) -> RowBatch:
        ints, floats = self._like((rows, NUM_INTS), np.int32), self._like((rows, NUM_FLOATS), np.float32)
        pages = width // self._engine.page_size
        return RowBatch(ints, floats, self._like((rows, pages), np.int32) if pages else None)

    def _abstract_state(self, rows: int, tokens: bool) -> State:
        whole = self._like((rows, self.context), np.int32) if tokens else None
        return State(whole, *[self._like((rows,), np.int32)] * 2, self._like((rows,), np.bool_))

    def load(self, weights: Weights, draft_weights: Weights | None) -> None:
        """Takes the weights, and makes the caches beside them."""
        self._weights = (weights, draft_weights)
        self.reset()
        for rows in {draw.rows for draw in self.draws if draw.reads_tokens}:
            self._no_tokens[rows] = jax.device_put(np.zeros((rows, self.context), np.int32), self._replicated)

    def warm_up(self, record_time: Callable[[int, int, float], None] | None) -> None:
        """Runs every program, since the first run of one is slower. `record_time` gets the time of a round of each
        decode program: rows, drafts, seconds."""
        forwards: dict[tuple[int, int], tuple[RowBatch, State, Forward]] = {}
        for cell in self.cells:
            batch, state = trial_batch(cell.rows, cell.width, self._engine.page_size)
            if cell.drafts is None:
                tiles = trial_tiles(cell.rows, self._engine.tile_tokens, cell.width)
                jax.block_until_ready(self.prefill(cell, batch, tiles))
                began = time.monotonic()
                forward = jax.block_until_ready(self.prefill(cell, batch, tiles))
                self._seconds[cell] = time.monotonic() - began
            else:
                forward = jax.block_until_ready(self.decode(cell, batch, state))
            forwards[cell.rows, 1 + (cell.drafts or 0)] = batch, state, forward
        for draw in self.draws:
            jax.block_until_ready(self.draw(draw.drawing, *forwards[draw.rows, draw.length], None))
        for cell in self.cells:
            # One draft length is compiled, and fewer drafts take fewer passes of the draft model: each is timed.
            for drafts in range(1 if cell.drafts else 0, (cell.drafts or 0) + 1) if cell.drafts is not None else ():
                seconds = self._time_rounds(cell, drafts)
                if record_time is not None:
                    record_time(cell.rows, drafts, seconds)

    def _time_rounds(self, cell: Cell, drafts: int) -> float:
        """Seconds of a greedy round."""
        batch, state = trial_batch(cell.rows, cell.width, self._engine.page_size)
        batch.ints_BI[:, DRAFTS] = drafts
        began = time.monotonic()
        for _ in range(_TRIALS):
            forward = self.decode(cell, batch, state)
            result, _ = self.draw(Drawing.GREEDY, batch, state, forward, None)
        jax.block_until_ready(result)
        return (time.monotonic() - began) / _TRIALS

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

    def place(self, arrays: Any) -> Any:
        """Arrays of several calls, sent once."""
        return jax.device_put(arrays, self._replicated)

    def prefill(self, cell: Cell, batch: RowBatch, tiles: Tiles) -> Forward:
        """Starts a prefill; what it gives is still on its way, as with the other calls."""
        return self._extend(cell, batch, tiles)

    def decode(self, cell: Cell, batch: RowBatch, state: State) -> Forward:
        """Starts a round."""
        return self._extend(cell, batch, self._with_tokens(state, cell.drafts > 0))

    def _extend(self, cell: Cell, *arguments) -> Forward:
        held = (*self._weights, self._cache, self._draft_cache)
        self._cache, self._draft_cache, forward = self._compiled[cell](*held, *arguments)
        return forward

    def draw(
        self, drawing: Drawing, batch: RowBatch, state: State, forward: Forward, mask: np.ndarray | None
    ) -> tuple[Result, State]:
        """Starts the draw after a prefill or a round. `mask` is that of grammars, which Drawing.FULL alone takes. The
        state is that of the next round."""
        assert mask is None or drawing is Drawing.FULL
        rows, length = forward.hidden_BTD.shape[:2]
        draw = min(draw for draw in self.draws if draw[:2] == (rows, length) and draw.drawing >= drawing)
        if draw.drawing is Drawing.FULL and mask is None:
            mask = self._everything[rows]
        state = self._with_tokens(state, draw.reads_tokens)
        batch = batch._replace(page_table_BM=None)
        return self._compiled[draw](self._weights[0], batch, state, forward, mask)

    def _with_tokens(self, state: State, read: bool) -> State:
        if not read:
            return state._replace(tokens_BW=None)
        return state._replace(tokens_BW=self._no_tokens[len(state.last_B)]) if state.tokens_BW is None else state


def compile_zeros(caches: tuple[Cache, Cache]) -> jax.stages.Compiled:
    """A program that makes zeroed caches of these shapes and shardings."""

    def zeros():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), caches)

    return jax.jit(zeros, out_shardings=jax.tree.map(lambda a: a.sharding, caches)).lower().compile()
