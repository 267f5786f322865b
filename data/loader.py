"""Batches by step: one global order of samples, of which each host reads its own rows.

Sample i of the run is row `shuffle(epoch, i mod rows)`, with epoch = i div rows and a permutation computed from the
seed, the epoch and the index alone (Grain's index shuffle). Step s takes samples s·B to (s+1)·B, an epoch's end inside
a batch or not, and host p of P takes the p-th of P equal parts of those. So neither the number of hosts nor a restart
changes the stream, and a position in it is one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from grain import python as grain

from data.config import DataConfig
from data.rows import Batch, Rows, rows_per_host


class Loader:
    """Iterator of (step, batch): `batch` holds this host's rows, [B / process_count, T] (see rows.Batch).

    Batches are made ahead in a background thread, `config.prefetch` of them at most. What goes wrong there is raised
    by the `next` that wanted that batch. Ends after `config.epochs` passes, at the last full batch.
    """

    def __init__(
        self,
        rows: Rows,
        config: DataConfig,
        *,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Raises ValueError if the batch does not divide over the hosts, or if the epochs do not fill one batch."""
        assert 0 <= process_index < process_count, f"host {process_index} of {process_count}"
        assert start_step >= 0, start_step
        size = rows_per_host(config.batch_size, process_count)
        samples = grain.MapDataset.source(rows).shuffle(seed=config.seed).repeat(config.epochs)
        if len(samples) < config.batch_size:
            raise ValueError(
                f"{len(rows)} rows of data.sequence_length={config.sequence_length} in data.epochs={config.epochs} do "
                f"not fill data.batch_size={config.batch_size}; lower one of the two, raise data.epochs or add data"
            )
        self.num_steps: int | None = None if config.epochs is None else len(samples) // config.batch_size
        self.next_step = start_step
        self._identity = _identity(rows, config)
        parts = samples.batch(size, drop_remainder=True)
        # Part j of `size` rows is host j mod P's of step j div P. Every host stops at the last step that all have.
        stop = (len(samples) // config.batch_size) * process_count
        parts = parts[start_step * process_count + process_index : stop : process_count]
        # One thread: it only copies memory, and the interpreter lock would hold up a second.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
        self._batches = iter(parts.to_iter_dataset(options))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[int, Batch]:
        batch = next(self._batches)
        step, self.next_step = self.next_step, self.next_step + 1
        return step, batch

    def state(self) -> dict[str, Any]:
        """Position after the last batch handed out, for JSON; the same on every host. See `step_of_state`."""
        return {**self._identity, "next_step": self.next_step}

    def close(self) -> None:
        """Ends the background thread. Another `next` raises ValueError; closing twice is allowed."""
        self._batches.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _identity(rows: Rows, config: DataConfig) -> dict[str, Any]:
    """All that the stream depends on."""
    return {**rows.identity, "batch_size": config.batch_size, "seed": config.seed}


def step_of_state(state: Mapping[str, Any], rows: Rows, config: DataConfig) -> int:
    """`start_step` that continues a `Loader.state()`.

    Raises ValueError if the state is of another corpus or other settings, saying what differs.
    """
    expected = _identity(rows, config)
    missing = sorted({*expected, "next_step"} - set(state))
    if missing:
        raise ValueError(f"the checkpoint's data state has no {', '.join(missing)}; it has {sorted(state)}")
    differing = [
        f"{name}: {state[name]!r} then, {value!r} now" for name, value in expected.items() if state[name] != value
    ]
    if differing:
        raise ValueError(
            f"the checkpoint was trained on another token stream ({'; '.join(differing)}); "
            "restore those settings and files, or start a new run"
        )
    return int(state["next_step"])


def row_hashes(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint64 [B]: a hash of each row's content, all arrays of it.

    The hash of a global batch over several hosts is `combine_hashes` of their row hashes, concatenated by host.
    """
    names = sorted(batch)
    columns = [np.asarray(batch[name]) for name in names]
    hashes = [
        hashlib.blake2b(b"".join(_canonical(column[i]).tobytes() for column in columns), digest_size=8).digest()
        for i in range(len(columns[0]))
    ]
    return np.frombuffer(b"".join(hashes), "<u8")


def _canonical(values: np.ndarray) -> np.ndarray:
    return values.astype("<f4" if np.issubdtype(values.dtype, np.floating) else "<i4")


def combine_hashes(hashes: np.ndarray) -> str:
    """Hex digest of a global batch from the row hashes of all hosts, in order of rows."""
    return hashlib.blake2b(np.asarray(hashes, "<u8").tobytes(), digest_size=8).hexdigest()


def batch_hash(batch: Mapping[str, np.ndarray]) -> str:
    """Hex digest of a batch that one host holds whole."""
    return combine_hashes(row_hashes(batch))
