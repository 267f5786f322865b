"""Speculation that changes no distribution: which drafts stay, and the token that follows them.

Plain decoding is the case of no drafts and goes the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from serving.request import MAX_TOP_LOGPROBS
from serving.sampling import (
    AS_NEEDED,
    DRAW,
    RESIDUAL,
    History,
    Rows,
    Stages,
    draw_from_stream,
    log_distribution,
    row_is_valid,
    top_log_probs,
    uniform,
)


class LogProbs(NamedTuple):
    """Log-probabilities, under the target, at each of the T positions; meaningful where a token was emitted."""

    chosen_BT: jax.Array
    top_ids_BTk: jax.Array
    top_values_BTk: jax.Array


class Verified(NamedTuple):
    """What a round emits. A row's first `count_B` tokens are its text; the others mean nothing."""

    tokens_BT: jax.Array
    """int32."""
    count_B: jax.Array
    """int32: accepted drafts and one more, 1 to T."""
    accepted_B: jax.Array
    """int32."""
    valid_B: jax.Array
    """bool: False where one of the positions that were reached had no distribution (see `sampling.row_is_valid`)."""
    log_probs: LogProbs | None
    """None unless asked for; zeros where no row of the batch wants them."""


def verify(
    logits_BTV: jax.Array,
    drafts_BK: jax.Array,
    draft_log_probs_BKV: jax.Array | None,
    num_drafts_B: jax.Array,
    rows: Rows,
    history: History,
    mask_BTU: jax.Array | None = None,
    *,
    stages: Stages = AS_NEEDED,
    with_log_probs: bool = False,
    wants_log_probs_B: jax.Array | None = None,
) -> Verified:
    """Emit the accepted drafts of each row and one more token, T = K + 1 at most.

    `logits_BTV[:, t]` are the target's after `history` and the first t drafts: they decide over absolute position
    `history.length_B + t`. `num_drafts_B` (0 to K) drafts of a row count. `draft_log_probs_BKV` is the distribution
    that each draft was drawn from, as `log_distribution` and `draw` gave it; None for drafts that were not drawn
    (n-grams). `mask_BTU` is as in `log_distribution`, for each position, and `stages` are its own. `with_log_probs`
    (static) adds those to the result; where `wants_log_probs_B` is given, they are computed only in calls in which a
    row wants them.

    Two exact rules, by row:
    - coupled or greedy: the target draws its own token at each position, and a draft is accepted if it is that token.
      The text is the one of plain decoding. Drafts drawn with the same seed share its noise, and so often agree.
    - else: draft d is accepted with probability min(1, p(d) / q(d)); one that is not is replaced by a token drawn in
      proportion to max(p - q, 0). Leviathan et al., arXiv 2211.17192, theorem in appendix A.1. This accepts the most
      that any rule can, and the text has the distribution of plain decoding, but is not the same text.
    """
    num_positions = logits_BTV.shape[1]
    assert num_positions == drafts_BK.shape[1] + 1, (logits_BTV.shape, drafts_BK.shape)
    running_B = jnp.ones(num_drafts_B.shape, bool)
    valid_B, accepted_B = running_B, jnp.zeros_like(num_drafts_B)
    tokens, log_probs = [], []
    for t in range(num_positions):
        mask_BU = None if mask_BTU is None else mask_BTU[:, t]
        seen = history._replace(appended_BA=drafts_BK[:, :t]) if t else history
        log_p_BV = log_distribution(logits_BTV[:, t], rows, seen, mask_BU, stages)
        position_B = history.length_B + t
        if t < num_positions - 1:
            log_q_BV = None if draft_log_probs_BKV is None else draft_log_probs_BKV[:, t]
            drafted_B = t < num_drafts_B
            token_B, kept_B = _decide(
                log_p_BV, log_q_BV, drafts_BK[:, t], drafted_B, rows, position_B, logits_BTV[:, t], stages
            )
        else:
            own = jnp.full_like(position_B, DRAW)
            token_B = _draw(log_p_BV, rows, position_B, own, logits_BTV[:, t], stages)
            kept_B = jnp.zeros_like(running_B)
        # A position that is not reached may hold anything: it follows a draft that was rejected.
        valid_B = valid_B & (row_is_valid(log_p_BV) | ~running_B)
        running_B = running_B & kept_B
        accepted_B = accepted_B + running_B
        tokens.append(token_B)
        if with_log_probs:
            log_probs.append(_log_probs(log_p_BV, token_B, wants_log_probs_B))
    stacked = LogProbs(*(jnp.stack(parts, axis=1) for parts in zip(*log_probs, strict=True))) if log_probs else None
    return Verified(jnp.stack(tokens, axis=1), accepted_B + 1, accepted_B, valid_B, stacked)


def verify_greedy(logits_BTV: jax.Array, drafts_BK: jax.Array, num_drafts_B: jax.Array) -> Verified:
    """`verify` of rows that are all greedy, without penalties, bias, mask or log-probabilities: it reads the logits
    once."""
    scores_BTV = logits_BTV.astype(jnp.float32)
    tokens_BT = jnp.argmax(scores_BTV, axis=-1).astype(jnp.int32)
    # argmax takes a NaN where there is one, which XLA's maximum on a CPU leaves out of long rows; a row of -inf alone
    # has no token.
    sound_BT = jnp.isfinite(jnp.take_along_axis(scores_BTV, tokens_BT[..., None], axis=-1)[..., 0])
    index_K = jnp.arange(drafts_BK.shape[1])
    kept_BK = (drafts_BK == tokens_BT[:, :-1]) & (index_K < num_drafts_B[:, None])
    accepted_B = jnp.sum(jnp.cumprod(kept_BK.astype(jnp.int32), axis=1), axis=1)
    reached_BT = jnp.arange(tokens_BT.shape[1]) <= accepted_B[:, None]
    return Verified(tokens_BT, accepted_B + 1, accepted_B, jnp.all(sound_BT | ~reached_BT, axis=1), None)


def _decide(
    log_p_BV: jax.Array,
    log_q_BV: jax.Array | None,
    draft_B: jax.Array,
    drafted_B: jax.Array,
    rows: Rows,
    position_B: jax.Array,
    logits_BV: jax.Array,
    stages: Stages,
) -> tuple[jax.Array, jax.Array]:
    """The token at one position, and whether it is the draft, so that the next position counts too."""
    by_ratio_B = drafted_B & ~rows.coupled_B & ~rows.greedy_B
    residual_BV = _residual(log_p_BV, log_q_BV, draft_B)
    scores_BV = jnp.where(by_ratio_B[:, None], residual_BV, log_p_BV)
    # The draft was drawn with the noise of the DRAW stream, so its replacement needs other noise.
    own_B = _draw(scores_BV, rows, position_B, jnp.where(by_ratio_B, RESIDUAL, DRAW), logits_BV, stages)
    lucky_B = uniform(rows, position_B) < _acceptance(log_p_BV, log_q_BV, draft_B)
    kept_B = drafted_B & jnp.where(by_ratio_B, lucky_B, own_B == draft_B)
    return jnp.where(kept_B, draft_B, own_B), kept_B


def _draw(
    scores_BV: jax.Array,
    rows: Rows,
    position_B: jax.Array,
    stream_B: jax.Array,
    logits_BV: jax.Array,
    stages: Stages,
) -> jax.Array:
    """As `draw_from_stream`. The greedy choice among the model's own logits is made on those: normalising rounds two
    of them into a tie now and then, and `verify_greedy` doesn't normalise."""
    drawn_B = draw_from_stream(scores_BV, rows, position_B, stream_B, stages)
    best_B = jnp.argmax(jnp.where(scores_BV > -jnp.inf, logits_BV.astype(jnp.float32), -jnp.inf), axis=1)
    return jnp.where(rows.plain_greedy_B, best_B.astype(jnp.int32), drawn_B)


def _acceptance(log_p_BV: jax.Array, log_q_BV: jax.Array | None, draft_B: jax.Array) -> jax.Array:
    """min(1, p(d) / q(d)), float32 [B]; NaN, which accepts nothing, where the draft's distribution is not one."""
    log_ratio_B = _at(log_p_BV, draft_B)
    if log_q_BV is not None:
        log_ratio_B = log_ratio_B - _at(log_q_BV, draft_B)
    return jnp.exp(jnp.minimum(log_ratio_B, 0.0))


def _residual(log_p_BV: jax.Array, log_q_BV: jax.Array | None, draft_B: jax.Array) -> jax.Array:
    """log max(p - q, 0), not normalised, float32 [B, V]."""
    if log_q_BV is None:
        # All of q is on the draft, and p nowhere exceeds that.
        is_draft_BV = jnp.arange(log_p_BV.shape[1]) == draft_B[:, None]
        residual_BV = jnp.where(is_draft_BV, -jnp.inf, log_p_BV)
    else:
        # log(p - q) = log p + log(1 - q/p) keeps its digits where p and q are close.
        above_BV = log_p_BV > log_q_BV
        gap_BV = jnp.where(above_BV, log_q_BV - log_p_BV, -1.0)
        residual_BV = jnp.where(above_BV, log_p_BV + jnp.log(-jnp.expm1(gap_BV)), -jnp.inf)
    # Empty where p = q up to rounding, or where the draft model's row is NaN: then nothing is taken off p.
    empty_B1 = ~jnp.any(residual_BV > -jnp.inf, axis=1, keepdims=True)
    return jnp.where(empty_B1, log_p_BV, residual_BV)


def no_log_probs(batch: int, length: int) -> LogProbs:
    """What stands for log-probabilities that no row wants."""
    tops = (batch, length, MAX_TOP_LOGPROBS)
    return LogProbs(jnp.zeros((batch, length)), jnp.zeros(tops, jnp.int32), jnp.zeros(tops))


def _log_probs(log_p_BV: jax.Array, token_B: jax.Array, wants_B: jax.Array | None) -> tuple[jax.Array, ...]:
    if wants_B is None:
        return top_log_probs(log_p_BV, token_B)
    shapes = jax.eval_shape(top_log_probs, log_p_BV, token_B)
    nothing = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    return jax.lax.cond(jnp.any(wants_B), lambda: top_log_probs(log_p_BV, token_B), lambda: tuple(nothing))


def _at(log_probs_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
