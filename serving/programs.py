"""What runs on the device: a prefill of tiles, and rounds of decoding with or without drafts. Traced, then compiled.

A row's tokens so far are on the device for the length of a call: the penalties and the n-gram drafts read them, and
each round's tokens are added to them.
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
from serving.batch import ALL_ALLOWED, DecodeBatch, PrefillBatch
from serving.drafting import ngram_drafts
from serving.request import MAX_TOP_LOGPROBS
from serving.sampling import History, Rows, draw, log_distribution, row_is_valid
from serving.verification import no_log_probs, verify, verify_greedy

Cache = list[LayerPages]
Weights = tuple[Any, Any]
"""(params, biases) of a Definition."""


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Where drafts come from: the tokens before (ngram), the model's first layers, or a model of its own."""

    kind: str
    max_draft: int
    num_layers: int | None = None
    definition: Definition | None = None
    execution: Execution | None = None


class State(NamedTuple):
    """Rows between rounds, and between calls: tokens so far, the last of them, how many, and whether a row takes no
    more. Only penalties and drafts read `tokens_BW`."""

    tokens_BW: jax.Array
    last_B: jax.Array
    length_B: jax.Array
    done_B: jax.Array


class Result(NamedTuple):
    """What a call gives the host, for R rounds of B rows that emit up to T tokens each."""

    tokens_RBT: jax.Array
    counts_RB: jax.Array
    """Tokens emitted; -1 for a row whose logits are not finite."""
    drafted_RB: jax.Array
    chosen_RBT: jax.Array
    """Log-probability of each token, where a row asked for it."""
    top_ids_RBTL: jax.Array
    top_values_RBTL: jax.Array
    experts_R: jax.Array
    """Experts that at least one token was sent to, summed over layers; 0 without experts."""

    @classmethod
    def empty(cls, rounds: int, rows: int, length: int) -> Result:
        def full(fill, dtype, *tail: int) -> jax.Array:
            return jnp.full((rounds, rows, *tail), fill, dtype)

        tops = (length, MAX_TOP_LOGPROBS)
        return cls(
            tokens_RBT=full(-1, jnp.int32, length),
            counts_RB=full(0, jnp.int32),
            drafted_RB=full(0, jnp.int32),
            chosen_RBT=full(0, jnp.float32, length),
            top_ids_RBTL=full(0, jnp.int32, *tops),
            top_values_RBTL=full(0, jnp.float32, *tops),
            experts_R=jnp.zeros((rounds,), jnp.int32),
        )

    def put(self, round_: jax.Array | int, *parts: jax.Array) -> Result:
        """With a round's parts, in the order of the fields."""
        return Result(*(whole.at[round_].set(part) for whole, part in zip(self, parts, strict=True)))


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
    rounds: int
    drafting: Drafting | None = None

    def prefill(self, weights, draft_weights, cache: Cache, draft_cache: Cache, batch: PrefillBatch, mask_CU):
        """Computes tiles; draws the next token of each row whose tile ends its known tokens.

        Returns (cache, draft_cache, Result of one round).
        """
        models = self._bind(weights, draft_weights)
        starts, counts, ends = batch.spans_C3.T
        paged = PagedRows(batch.page_table_CM, starts, counts)
        if models.draft is not None:
            _, draft_cache = models.draft.extend(batch.tile_CT, draft_cache, paged, self.drafting.execution)
        output, cache = models.target.extend(batch.tile_CT, cache, paged, self.execution)
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        output = output._replace(hidden_BTD=jnp.take_along_axis(output.hidden_BTD, last, axis=1))
        constants = _unpack(batch.ints_CI, batch.floats_CF)
        state = State(batch.tokens_CW, jnp.zeros_like(starts), batch.ints_CI[:, columns.LENGTH], ends == 0)
        no_drafts = jnp.zeros((starts.shape[0], 0), jnp.int32)
        parts = self._check(models.target, output, no_drafts, None, jnp.zeros_like(starts), constants, state, mask_CU)
        return cache, draft_cache, Result.empty(1, starts.shape[0], 1).put(0, *parts)

    def decode(self, num_drafts: int, weights, draft_weights, cache, draft_cache, batch: DecodeBatch, mask_BU, rounds):
        """Up to `rounds` rounds, fewer where every row is done; each feeds a row's last token and at most `num_drafts`
        drafts, and emits one token more than it accepts.

        Returns (cache, draft_cache, Result, the rows' State: what a call that follows this one begins with).
        """
        models = self._bind(weights, draft_weights)
        constants = _unpack(batch.ints_BI, batch.floats_BF)
        length = batch.ints_BI[:, columns.LENGTH] if batch.length_B is None else batch.length_B
        done = length >= constants.limit_B
        last = _at(batch.tokens_BW, length - 1) if batch.last_B is None else batch.last_B
        state = State(batch.tokens_BW, last, length, done if batch.done_B is None else done | batch.done_B)
        result = Result.empty(self.rounds, length.shape[0], num_drafts + 1)

        def again(carry) -> jax.Array:
            return (carry[0] < rounds) & ~jnp.all(carry[3].done_B)

        def run(carry):
            index, cache, draft_cache, state, result = carry
            cache, draft_cache, parts = self._round(
                models, cache, draft_cache, batch.page_table_BM, constants, state, num_drafts, mask_BU
            )
            return index + 1, cache, draft_cache, _advance(state, constants, *parts[:2]), result.put(index, *parts)

        start = (jnp.zeros((), jnp.int32), cache, draft_cache, state, result)
        _, cache, draft_cache, state, result = jax.lax.while_loop(again, run, start)
        return cache, draft_cache, result, state

    def _bind(self, weights: Weights, draft_weights: Weights | None) -> _Models:
        draft = None if draft_weights is None else self.drafting.definition.bind(*draft_weights)
        return _Models(self.definition.bind(*weights), draft)

    def _round(self, models, cache, draft_cache, page_table, constants, state, num_drafts, mask_BU):
        drafts, log_q, counts = jnp.zeros((state.length_B.shape[0], 0), jnp.int32), None, jnp.zeros_like(state.length_B)
        if num_drafts:
            # A draft past the limit could never be emitted, and its page may not exist.
            room = jnp.minimum(constants.drafts_B, constants.limit_B - state.length_B - 1)
            allowed = jnp.where(state.done_B, 0, jnp.clip(room, 0, num_drafts))
            drafts, log_q, counts, cache, draft_cache = self._propose(
                models, cache, draft_cache, page_table, constants, state, num_drafts, allowed
            )
        tokens = jnp.concatenate([state.last_B[:, None], drafts], axis=1)
        paged = PagedRows(page_table, state.length_B - 1, jnp.where(state.done_B, 0, counts + 1))
        output, cache = models.target.extend(tokens, cache, paged, self.execution)
        parts = self._check(models.target, output, drafts, log_q, counts, constants, state, mask_BU)
        return cache, draft_cache, parts

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

    def _check(self, model, output: Output, drafts, log_q, counts, constants: _Constants, state: State, mask_BU):
        """Parts of a `Result`: the tokens that the model emits after the drafts it accepts."""
        logits_BTV = self._logits(model, output.hidden_BTD)
        asked_B = constants.logprobs_B & ~state.done_B
        plain = ~jnp.any(asked_B) & jnp.all(constants.rows.plain_greedy_B) & jnp.all(mask_BU == ALL_ALLOWED)

        def greedy(logits_BTV):
            verified = verify_greedy(logits_BTV, drafts, counts)
            return verified._replace(log_probs=no_log_probs(*verified.tokens_BT.shape))

        def general(logits_BTV):
            history = History(state.tokens_BW, constants.prompt_B, state.length_B)
            # A row under a grammar takes no drafts: its mask is that of its one position.
            mask_BTU = jnp.broadcast_to(mask_BU[:, None], (*logits_BTV.shape[:2], mask_BU.shape[-1]))
            return verify(
                logits_BTV,
                drafts,
                log_q,
                counts,
                constants.rows,
                history,
                mask_BTU,
                with_log_probs=True,
                wants_log_probs_B=asked_B,
            )

        verified = jax.lax.cond(plain, greedy, general, logits_BTV)
        emitted = jnp.where(state.done_B, 0, jnp.where(verified.valid_B, verified.count_B, -1))
        drafted = jnp.where(state.done_B, 0, counts)
        return verified.tokens_BT, emitted, drafted, *verified.log_probs, _experts(output)

    def _logits(self, model: Transformer, hidden_BTD: jax.Array) -> jax.Array:
        return model.logits(hidden_BTD, self.execution)


def _advance(state: State, constants: _Constants, tokens_BT: jax.Array, emitted_B: jax.Array) -> State:
    """The rows with the tokens they emitted, up to a stop token (which they keep) and to their limit."""
    T, W = tokens_BT.shape[1], state.tokens_BW.shape[1]
    index_T = jnp.arange(T)
    counted_BT = index_T < emitted_B[:, None]
    stops_BT = counted_BT & jnp.any(tokens_BT[..., None] == constants.stops_BS[:, None], axis=-1)
    position_BT = jnp.where(counted_BT, state.length_B[:, None] + index_T, W)
    row_B = jnp.arange(tokens_BT.shape[0])[:, None]
    length_B = state.length_B + jnp.maximum(emitted_B, 0)
    done_B = state.done_B | (emitted_B < 0) | jnp.any(stops_BT, axis=1) | (length_B >= constants.limit_B)
    last_B = jnp.where(emitted_B > 0, _at(tokens_BT, jnp.maximum(emitted_B - 1, 0)), state.last_B)
    return State(state.tokens_BW.at[row_B, position_BT].set(tokens_BT, mode="drop"), last_B, length_B, done_B)


def _at(tokens_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tokens_BT, index_B[:, None], axis=1)[:, 0]


def _experts(output: Output) -> jax.Array:
    if output.moe is None:
        return jnp.zeros((), jnp.int32)
    return jnp.sum(output.moe.load_E > 0, dtype=jnp.int32)
