"""Host rows to global device arrays, and what the meter needs to know of them."""

from __future__ import annotations

import numpy as np

from data.rows import Batch as HostBatch
from parallel.sharding import Placement, from_host_rows
from training.step import Batch


def batch_names(document_mask: bool) -> tuple[str, ...]:
    """Arrays that a step takes. Without document masks a row is one sequence: no segments."""
    masked = ("segments",) if document_mask else ()
    return ("tokens", "targets", "positions", "weights", *masked)


def to_device(batch: HostBatch, placement: Placement, document_mask: bool) -> Batch:
    """Global [B, T] arrays from this host's rows, split over the mesh axes of `batch`."""
    if not document_mask:
        length = batch["tokens"].shape[1]
        batch = {**batch, "positions": np.broadcast_to(np.arange(length, dtype=np.int32), batch["tokens"].shape)}
    return {
        name: from_host_rows(np.ascontiguousarray(batch[name]), placement, "batch", "sequence")
        for name in batch_names(document_mask)
    }


def document_lengths(batch: HostBatch) -> np.ndarray:
    """Lengths of the documents in this host's rows, int64 [documents]; padding is left out."""
    segments = batch["segments"].astype(np.int64)
    width = int(segments.max(initial=0)) + 1
    numbers = segments + width * np.arange(len(segments))[:, None]
    counts = np.bincount(numbers.ravel(), minlength=width * len(segments)).reshape(-1, width)[:, 1:]
    return counts[counts > 0]
