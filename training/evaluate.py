"""Loss on the held-out documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax

from data import Corpus, EvaluationBatches
from parallel.distributed import process_info
from training.feed import to_device
from training.resolve import Resolved
from training.state import TrainState, abstract_weights
from training.step import Batch, make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean nats per token, and nats in bits per UTF-8 byte; the latter only if every held-out byte was counted."""

    loss: float
    bits_per_byte: float | None


class Evaluator:
    """The evaluation step and its fixed list of batches."""

    def __init__(self, resolved: Resolved, corpus: Corpus):
        assert corpus.heldout is not None
        self._resolved, self._corpus = resolved, corpus
        process = process_info()
        rows = resolved.run.data.batch_size // resolved.run.accumulation
        self._batches = EvaluationBatches(corpus.heldout, rows, process.index, process.count)
        self._step: Callable | None = None

    @property
    def compiled(self) -> bool:
        return self._step is not None

    def compile(self) -> None:
        resolved = self._resolved
        weights, biases = abstract_weights(resolved.spec.definition, resolved.placement)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._batch(0))
        step = jax.jit(make_eval_step(resolved.spec), out_shardings=resolved.placement.sharding())
        self._step = step.lower(weights, biases, shapes).compile()

    def __call__(self, state: TrainState, batches: int | None = None) -> Evaluation:
        """Over the first `batches` batches, None for all. Compile first."""
        assert self._step is not None
        total = len(self._batches) if batches is None else min(batches, len(self._batches))
        weights = state.weights
        sums = [self._step(weights, state.biases, self._batch(number)) for number in range(total)]
        # One transfer at the end: the device never waits for the host.
        fetched = jax.device_get(sums)
        nats, weight = (math.fsum(float(pair[i]) for pair in fetched) for i in (0, 1))
        whole = total == len(self._batches)
        bits = nats / math.log(2) / self._corpus.heldout_bytes if whole else None
        return Evaluation(nats / max(weight, 1.0), bits)

    def _batch(self, number: int) -> Batch:
        return to_device(self._batches[number], self._resolved.placement, self._resolved.run.layers.document_mask)
