"""Loss on the held-out documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax

from data import Corpus, EvaluationBatches
from model.transformer import Definition
from parallel.distributed import process_info
from training.feed import to_device
from training.resolve import Resolved
from training.state import TrainState, abstract_params
from training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean nats per token, and nats in bits per UTF-8 byte; the latter only if every held-out byte was counted."""

    loss: float
    bits_per_byte: float | None


class Evaluator:
    """Compiled once, on the first call."""

    def __init__(self, resolved: Resolved, corpus: Corpus):
        assert corpus.heldout is not None
        self._resolved, self._corpus = resolved, corpus
        process = process_info()
        rows = resolved.run.data.batch_size // resolved.run.accumulation
        self._batches = EvaluationBatches(corpus.heldout, rows, process.index, process.count)
        self._step: Callable | None = None

    def __call__(self, state: TrainState, batches: int | None = None) -> Evaluation:
        """Over the first `batches` batches, None for all."""
        resolved = self._resolved
        total = len(self._batches) if batches is None else min(batches, len(self._batches))
        sums = []
        for number in range(total):
            batch = to_device(self._batches[number], resolved.placement, resolved.run.layers.document_mask)
            if self._step is None:
                self._step = _compile(resolved, resolved.spec.definition, batch)
            sums.append(self._step(state.params, state.biases, batch))
        # One transfer at the end: the device never waits for the host.
        fetched = jax.device_get(sums)
        nats, weight = (math.fsum(float(pair[i]) for pair in fetched) for i in (0, 1))
        whole = total == len(self._batches)
        bits = nats / math.log(2) / self._corpus.heldout_bytes if whole else None
        return Evaluation(nats / max(weight, 1.0), bits)


def _compile(resolved: Resolved, definition: Definition, batch: dict[str, jax.Array]) -> Callable:
    params, biases = abstract_params(definition, resolved.placement)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    replicated = resolved.placement.sharding()
    step = jax.jit(make_eval_step(resolved.spec), out_shardings=(replicated, replicated))
    return step.lower(params, biases, shapes).compile()
