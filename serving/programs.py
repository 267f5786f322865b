"""What runs on the device, traced and then compiled: the model over tiles of prompts, or over the last tokens of rows
with or without drafts; and the draw of what follows. A round of decoding is one call of each of the last two.

Rounds follow each other on the device: what a draw leaves of its rows is what the next round begins with, so that the
host may start rounds before it has seen what came of those before. On a GPU, only the drafts of a model wait for the
host in between.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.cache import LayerPages, PagedRows
from model.execution import Execution
from model.transformer import Definition, Output, Transformer
from serving import batch as columns
from serving.batch import Drawing, RowBatch, State, Tiles
from serving.drafting import ngram_drafts
from serving.sampling import AS_NEEDED, History, Rows, Stages, draw, log_distribution, row_is_valid
from serving.verification import no_log_probs, verify, verify_greedy

Cache = list[LayerPages]
Weights = tuple[Any, Any]
"""(params, biases) of a Definition."""

_STAGES = {
    Drawing.SAMPLED: Stages(penalties=False, bias=False, filters=False, noise=True),
    Drawing.FILTERED: Stages(penalties=False, bias=False, filters=True, noise=True),
    Drawing.FULL: Stages(penalties=True, bias=True, filters=True, noise=True),
}


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Where drafts come from: the tokens before (ngram), the model's first layers, or a model of its own."""

    kind: str
    max_draft: int
    num_layers: int | None = None
    definition: Definition | None = None
    execution: Execution | None = None


class Forward(NamedTuple):
    """What the model made of a call's tokens, for B rows and T positions that a token may be drawn at."""

    hidden_BTD: jax.Array
    """Normed, before the head."""
    drafts_BK: jax.Array
    """Tokens that the later positions stand for; K = T - 1."""
    log_q_BKV: jax.Array | None
    """The distributions that drafts were drawn from; None where they were not drawn."""
    counts_B: jax.Array
    """Drafts of each row."""
    experts: jax.Array
    """Experts that at least one token was sent to, summed over layers; 0 without experts."""


class Result(NamedTuple):
    """What a round gives the host, for B rows that emit up to T tokens each."""

    tokens_BT: jax.Array
    counts_B: jax.Array
    """Tokens emitted; -1 for a row whose logits are not finite."""
    drafted_B: jax.Array
    chosen_BT: jax.Array
    """Log-probability of each token, where a row asked for it."""
    top_ids_BTL: jax.Array
    top_values_BTL: jax.Array


class _Constants(NamedTuple):
    """What a row's request says, unpacked."""

    rows: Rows
    prompt_B: jax.Array
    limit_B: jax.Array
    stops_BS: jax.Array
    drafts_B: jax.Array
    logprobs_B: jax.Array


def _unpack(ints_BI: jax.Array, floats_BF: jax.Array) -> _Constants:
    seed_B2 = jax.lax.bitcast_convert_type(ints_BI[:, columns.SEED_HIGH : columns.SEED_LOW + 1], jnp.uint32)
    rows = Rows(
        temperature_B=floats_BF[:, columns.TEMPERATURE],
        top_k_B=ints_BI[:, columns.TOP_K],
        top_p_B=floats_BF[:, columns.TOP_P],
        min_p_B=floats_BF[:, columns.MIN_P],
        presence_B=floats_BF[:, columns.PRESENCE],
        frequency_B=floats_BF[:, columns.FREQUENCY],
        repetition_B=floats_BF[:, columns.REPETITION],
        seed_B2=seed_B2,
        coupled_B=ints_BI[:, columns.COUPLED] > 0,
        bias_ids_BJ=ints_BI[:, columns.BIASED],
        bias_values_BJ=floats_BF[:, columns.BIASES],
    )
    return _Constants(
        rows=rows,
        prompt_B=ints_BI[:, columns.PROMPT],
        limit_B=ints_BI[:, columns.LIMIT],
        stops_BS=ints_BI[:, columns.STOPS],
        drafts_B=ints_BI[:, columns.DRAFTS],
        logprobs_B=ints_BI[:, columns.LOGPROBS] > 0,
    )


class _Models(NamedTuple):
    target: Transformer
    draft: Transformer | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions to compile. Their first arguments are (weights, draft_weights, cache, draft_cache); the draft's are
    None and [] where drafts don't come from a model of their own. The caches are donated, and come back first."""

    definition: Definition
    execution: Execution
    drafting: Drafting | None = None
    branches: bool = True
    """The device branches by itself, so that a draw decides at each call what its rows want. A GPU asks the host at
    each branch and idles meanwhile: there, a draw does all that its `Drawing` says."""

    def prefill(self, weights, draft_weights, cache: Cache, draft_cache: Cache, batch: RowBatch, tiles: Tiles):
        """Computes tiles. Returns (cache, draft_cache, Forward at the last token of each)."""
        models = self._bind(weights, draft_weights)
        paged = PagedRows(batch.page_table_BM, tiles.starts_C, tiles.counts_C)
        if models.draft is not None:
            _, draft_cache = models.draft.extend(tiles.tokens_CT, draft_cache, paged, self.drafting.execution)
        output, cache = models.target.extend(tiles.tokens_CT, cache, paged, self.execution)
        last = jnp.maximum(tiles.counts_C - 1, 0)[:, None, None]
        hidden_C1D = jnp.take_along_axis(output.hidden_BTD, last, axis=1)
        rows = hidden_C1D.shape[0]
        none = jnp.zeros((rows, 0), jnp.int32)
        return cache, draft_cache, Forward(hidden_C1D, none, None, jnp.zeros(rows, jnp.int32), _experts(output))

    def decode(self, num_drafts: int, weights, draft_weights, cache, draft_cache, batch: RowBatch, state: State):
        """A round up to the draw: feeds each row's last token and at most `num_drafts` drafts.

        Returns (cache, draft_cache, Forward).
        """
        models, constants = self._bind(weights, draft_weights), _unpack(batch.ints_BI, batch.floats_BF)
        drafts, log_q, counts = jnp.zeros((state.length_B.shape[0], 0), jnp.int32), None, jnp.zeros_like(state.length_B)
        if num_drafts:
            # A draft past the limit could never be emitted, and its page may not exist.
            room = jnp.minimum(constants.drafts_B, constants.limit_B - state.length_B - 1)
            allowed = jnp.where(state.done_B, 0, jnp.clip(room, 0, num_drafts))
            drafts, log_q, counts, cache, draft_cache = self._propose(
                models, cache, draft_cache, batch.page_table_BM, constants, state, num_drafts, allowed
            )
        tokens = jnp.concatenate([state.last_B[:, None], drafts], axis=1)
        paged = PagedRows(batch.page_table_BM, state.length_B - 1, jnp.where(state.done_B, 0, counts + 1))
        output, cache = models.target.extend(tokens, cache, paged, self.execution)
        return cache, draft_cache, Forward(output.hidden_BTD, drafts, log_q, counts, _experts(output))

    def draw(self, drawing: Drawing, weights, batch: RowBatch, state: State, forward: Forward, mask_BU):
        """The tokens that the model emits after the drafts it accepts: one more than those. `mask_BU` is read where
        everything may be wanted (Drawing.FULL) and None elsewhere.

        Returns (Result, the rows' State after it).
        """
        constants = _unpack(batch.ints_BI, batch.floats_BF)
        logits_BTV = self.definition.bind(*weights).logits(forward.hidden_BTD, self.execution)
        drafts = (forward.drafts_BK, forward.log_q_BKV, forward.counts_B)
        if drawing is Drawing.GREEDY:
            verified = verify_greedy(logits_BTV, forward.drafts_BK, forward.counts_B)
        elif drawing is Drawing.FULL:
            history = History(state.tokens_BW, constants.prompt_B, state.length_B)
            # A row under a grammar takes no drafts: its mask is that of its one position.
            mask_BTU = jnp.broadcast_to(mask_BU[:, None], (*logits_BTV.shape[:2], mask_BU.shape[-1]))
            verified = verify(
                logits_BTV,
                *drafts,
                constants.rows,
                history,
                mask_BTU,
                stages=AS_NEEDED if self.branches else _STAGES[drawing],
                with_log_probs=True,
                wants_log_probs_B=constants.logprobs_B & ~state.done_B if self.branches else None,
            )
        else:
            # Without penalties, no one looks at the tokens before.
            nothing = History(jnp.zeros((len(state.last_B), 0), jnp.int32), constants.prompt_B, state.length_B)
            verified = verify(logits_BTV, *drafts, constants.rows, nothing, stages=_STAGES[drawing])
        log_probs = verified.log_probs
        if log_probs is None:
            log_probs = no_log_probs(*verified.tokens_BT.shape)
        emitted = jnp.where(state.done_B, 0, jnp.where(verified.valid_B, verified.count_B, -1))
        drafted = jnp.where(state.done_B, 0, forward.counts_B)
        result = Result(verified.tokens_BT, emitted, drafted, *log_probs)
        return result, _advance(state, constants, verified.tokens_BT, emitted)

    def _bind(self, weights: Weights, draft_weights: Weights | None) -> _Models:
        draft = None if draft_weights is None else self.drafting.definition.bind(*draft_weights)
        return _Models(self.definition.bind(*weights), draft)

    def _propose(self, models, cache, draft_cache, page_table, constants, state, num_drafts, allowed):
        """(drafts [B, K], log q [B, K, V] or None, how many of them [B], cache, draft_cache)."""
        kind = self.drafting.kind
        if kind == "ngram":
            drafts, found = ngram_drafts(state.tokens_BW, state.length_B, num_drafts)
            return drafts, None, jnp.minimum(found, allowed), cache, draft_cache
        # A model of its own has not seen the last draft of the round before where all were accepted: it takes the
        # last two tokens each time. The model's first layers have, since the check computes all layers.
        block = 2 if kind == "model" else 1
        own = models.draft if kind == "model" else models.target
        execution = self.drafting.execution if kind == "model" else self.execution
        B, V = allowed.shape[0], self.definition.config.vocab_size

        def run(index, carry):
            cache, tokens, log_q, sound_B = carry
            length = state.length_B + index
            start = jnp.maximum(length - block, 0)
            counts = jnp.where(index < allowed, length - start, 0)
            fed = jnp.take_along_axis(tokens, start[:, None] + jnp.arange(block), axis=1)
            output, cache = own.extend(
                fed, cache, PagedRows(page_table, start, counts), execution, num_layers=self.drafting.num_layers
            )
            last = jnp.take_along_axis(output.hidden_BTD, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
            logits = own.logits(last, execution)[:, 0]
            history = History(tokens, constants.prompt_B, length)
            distribution = log_distribution(logits, constants.rows, history, None)
            drawn = draw(distribution, constants.rows, length)
            # A draft past the width of the tokens is one that `allowed` rules out.
            tokens = tokens.at[jnp.arange(B), length].set(drawn, mode="drop")
            # Drafts before one without a distribution stay: whether that one fails depends on what they are, and in
            # the texts of which they were dropped for it, the plain draw of the same noise would be biased.
            sound_B = sound_B + ((sound_B == index) & row_is_valid(distribution))
            return cache, tokens, log_q.at[:, index].set(distribution), sound_B

        log_q = jnp.zeros((B, num_drafts, V), jnp.float32)
        start = (draft_cache if kind == "model" else cache, state.tokens_BW, log_q, jnp.zeros((B,), jnp.int32))
        used, tokens, log_q, sound_B = jax.lax.fori_loop(0, jnp.max(allowed), run, start)
        ahead = jnp.minimum(state.length_B[:, None] + jnp.arange(num_drafts), tokens.shape[1] - 1)
        drafts = jnp.take_along_axis(tokens, ahead, axis=1)
        counts = jnp.minimum(sound_B, allowed)
        return (drafts, log_q, counts, cache, used) if kind == "model" else (drafts, log_q, counts, used, draft_cache)


def _advance(state: State, constants: _Constants, tokens_BT: jax.Array, emitted_B: jax.Array) -> State:
    """The rows with the tokens they emitted, up to a stop token (which they keep) and to their limit."""
    T = tokens_BT.shape[1]
    index_T = jnp.arange(T)
    counted_BT = index_T < emitted_B[:, None]
    stops_BT = counted_BT & jnp.any(tokens_BT[..., None] == constants.stops_BS[:, None], axis=-1)
    length_B = state.length_B + jnp.maximum(emitted_B, 0)
    done_B = state.done_B | (emitted_B < 0) | jnp.any(stops_BT, axis=1) | (length_B >= constants.limit_B)
    last_B = jnp.where(emitted_B > 0, _at(tokens_BT, jnp.maximum(emitted_B - 1, 0)), state.last_B)
    tokens_BW = state.tokens_BW
    if tokens_BW is not None:
        position_BT = jnp.where(counted_BT, state.length_B[:, None] + index_T, tokens_BW.shape[1])
        tokens_BW = tokens_BW.at[jnp.arange(len(last_B))[:, None], position_BT].set(tokens_BT, mode="drop")
    return State(tokens_BW, last_B, length_B, done_B)


def _at(tokens_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens_BT, index_B[:, None], axis=1)[:, 0]


def _experts(output: Output) -> jax.Array:
    if output.moe is None:
        return jnp.zeros((), jnp.int32)
    return jnp.sum(output.moe.load_E > 0, dtype=jnp.int32)
