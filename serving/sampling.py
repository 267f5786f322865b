"""Logits to the distribution of the next token, and a token from it.

`log_distribution` is the only function that does the first: plain decoding, the verifier, the token after the accepted
drafts, the draft models and the reported log-probabilities all call it, so that they can't disagree about the order of
the stages. Everything here is traced inside a compiled program, in float32, and no row's result depends on another's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from serving.request import MAX_TOP_LOGPROBS

# Streams of random numbers at one position of one row. They are disjoint, so that what decides over a draft is
# independent of the noise that the draft was drawn with.
DRAW, ACCEPT, RESIDUAL = 0, 1, 2

# A subnormal temperature may be flushed to zero by the device, so it counts as zero everywhere.
_SMALLEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)
_BITS_PER_WORD = 32
# Tokens per block in `top_log_probs`: about the square root of a large vocabulary, so both its sorts are small.
_BLOCK = 256


class Rows(NamedTuple):
    """Sampling parameters of the B rows of a batch; `SamplingParams` says what each means."""

    temperature_B: jax.Array
    """float32; 0 for the most likely token."""
    top_k_B: jax.Array
    """int32; 0 for all."""
    top_p_B: jax.Array
    min_p_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    repetition_B: jax.Array
    """float32, as the three above it."""
    seed_B2: jax.Array
    """uint32 [B, 2]: `seed_words` of each row's seed."""
    coupled_B: jax.Array
    """bool: the request gave a seed, so its text must be the one without speculation (see `serving.verification`)."""
    bias_ids_BJ: jax.Array
    """int32; -1 where there is none."""
    bias_values_BJ: jax.Array
    """float32."""

    @property
    def greedy_B(self) -> jax.Array:
        return self.temperature_B < _SMALLEST_TEMPERATURE

    @property
    def plain_greedy_B(self) -> jax.Array:
        """The row's token is the argmax of the model's own logits."""
        penalised_B = (self.repetition_B != 1) | (self.frequency_B != 0) | (self.presence_B != 0)
        return self.greedy_B & ~penalised_B & ~jnp.any(self.bias_ids_BJ >= 0, axis=1)


class History(NamedTuple):
    """The tokens before the one to draw, as the penalties count them."""

    tokens_BW: jax.Array
    """int32: a row's tokens from position 0; anything beyond its length."""
    prompt_length_B: jax.Array
    """int32."""
    length_B: jax.Array
    """int32: prompt and generated tokens that count."""
    appended_BA: jax.Array | None = None
    """int32: drafts that count as generated tokens too, after those of `tokens_BW`."""


class Stages(NamedTuple):
    """Stages that may be left out where no row wants them: True and False say which are traced. With None the device
    decides, at every call: on a GPU each of these costs a round trip to the host, which can start nothing meanwhile."""

    penalties: bool | None = None
    bias: bool | None = None
    filters: bool | None = None
    """top-k, top-p, min-p."""
    noise: bool | None = None
    """Of the draw, for rows that are not greedy."""


AS_NEEDED = Stages()
"""The device decides about all."""


def _stage(
    static: bool | None, wanted: jax.Array, run: Callable[[jax.Array], jax.Array], scores_BV: jax.Array
) -> jax.Array:
    if static is None:
        return jax.lax.cond(wanted, run, lambda x: x, scores_BV)
    return run(scores_BV) if static else scores_BV


def seed_words(seed: int) -> tuple[int, int]:
    """The two 32-bit words of a 64-bit seed, as `Rows.seed_B2` holds them."""
    unsigned = seed % 2**64
    return unsigned >> 32, unsigned % 2**32


def log_distribution(
    logits_BV: jax.Array,
    rows: Rows,
    history: History,
    mask_BU: jax.Array | None = None,
    stages: Stages = AS_NEEDED,
) -> jax.Array:
    """Natural-log probabilities of the next token, float32 [B, V], normalised; -inf where a token is excluded.

    Stages, in order: repetition penalty (prompt and output), frequency and presence penalty (output), logit bias,
    grammar mask, temperature, top-k, top-p, min-p. `mask_BU` is a bit mask, uint32 [B, ceil(V / 32)]: bit v % 32 of
    word v // 32 is set where token v is allowed; None allows all.

    top-p counts within what top-k left. Tokens tied with the last one kept are all kept, so the result doesn't depend
    on the order of the vocabulary; values tie when they are equal in float32. Rows of temperature 0 go through no
    stage after the mask: their log-probabilities are the model's own.

    A row with a NaN or +inf logit, or with no token left, is NaN throughout: see `row_is_valid`. -inf is legal.
    """
    scores_BV = logits_BV.astype(jnp.float32)
    # Rows that ask for nothing must cost nothing, so the stages run only if some row wants them.
    penalised = jnp.any((rows.repetition_B != 1) | (rows.frequency_B != 0) | (rows.presence_B != 0))
    scores_BV = _stage(stages.penalties, penalised, lambda x: _penalise(x, rows, history), scores_BV)
    if rows.bias_ids_BJ.shape[1]:
        biased = jnp.any(rows.bias_ids_BJ >= 0)
        scores_BV = _stage(stages.bias, biased, lambda x: _add_bias(x, rows), scores_BV)
    if mask_BU is not None:
        # NaN and +inf pass even where masked, so that the row is found out below.
        scores_BV = jnp.where(_unpack(mask_BU, scores_BV.shape[1]) | ~(scores_BV < jnp.inf), scores_BV, -jnp.inf)

    peak_B1 = jnp.max(scores_BV, axis=1, keepdims=True)
    temperature_B = jnp.where(rows.greedy_B, 1.0, rows.temperature_B)
    # The peak is taken off first: a tiny temperature then gives -inf for the others, never inf - inf.
    scores_BV = (scores_BV - peak_B1) / temperature_B[:, None]
    filtered = jnp.any(~rows.greedy_B & (_cuts_k(rows, scores_BV.shape[1]) | (rows.top_p_B < 1) | (rows.min_p_B > 0)))
    scores_BV = _stage(stages.filters, filtered, lambda x: _filter(x, rows, stages.filters), scores_BV)
    log_total_B1 = jnp.log(jnp.sum(jnp.exp(scores_BV), axis=1, keepdims=True))
    # max() carries NaN and +inf here, and is -inf where nothing is left.
    return jnp.where(jnp.isfinite(peak_B1), scores_BV - log_total_B1, jnp.nan)


def row_is_valid(log_probs_BV: jax.Array) -> jax.Array:
    """Whether a row of `log_distribution` is a distribution, bool [B]; what is drawn from one that isn't is junk."""
    return ~jnp.isnan(log_probs_BV[:, 0])


def draw(log_probs_BV: jax.Array, rows: Rows, position_B: jax.Array) -> jax.Array:
    """The token at absolute position `position_B`, int32 [B]: the most likely one where the temperature is 0.

    The noise is a function of (seed, position, token id) alone, so a row's token is the same in any batch and at any
    place in it. Log-probabilities within float32 rounding of each other (1e-6 for a flat distribution) tie, and the
    lowest id wins.
    """
    return draw_from_stream(log_probs_BV, rows, position_B, jnp.full_like(position_B, DRAW))


def draw_from_stream(
    scores_BV: jax.Array, rows: Rows, position_B: jax.Array, stream_B: jax.Array, stages: Stages = AS_NEEDED
) -> jax.Array:
    """`draw` with the noise of stream `stream_B`, from log-probabilities that need not be normalised."""

    def noisy(scores_BV: jax.Array) -> jax.Array:
        noise_BV = jax.vmap(lambda key: _gumbel(key, scores_BV.shape[1]))(_keys(rows, position_B, stream_B))
        return jnp.where(rows.greedy_B[:, None], scores_BV, scores_BV + noise_BV)

    # The argmax inside the branches would read less, but two of them on one array are one more kernel to compile.
    scores_BV = _stage(stages.noise, ~jnp.all(rows.greedy_B), noisy, scores_BV)
    return jnp.argmax(scores_BV, axis=1).astype(jnp.int32)


def uniform(rows: Rows, position_B: jax.Array) -> jax.Array:
    """Numbers in [0, 1) of the stream that decides over drafts, float32 [B], multiples of 2^-24."""
    bits_B = jax.vmap(jax.random.bits)(_keys(rows, position_B, jnp.full_like(position_B, ACCEPT)))
    return (bits_B >> 8).astype(jnp.float32) * 2.0**-24


def top_log_probs(
    log_probs_BV: jax.Array, token_B: jax.Array, k: int = MAX_TOP_LOGPROBS
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of `token_B` [B], and ids and log-probabilities of the k most likely tokens [B, k], falling.

    Where fewer than k tokens are possible, or the vocabulary is smaller, the values end in -inf (and the ids mean
    nothing there).
    """
    chosen_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
    # The k largest lie in the k blocks of largest maxima: sorting 128 x 128k values whole takes about 10 ms on an H100.
    num_blocks = max(k, -(-log_probs_BV.shape[1] // _BLOCK))
    padding = ((0, 0), (0, num_blocks * _BLOCK - log_probs_BV.shape[1]))
    blocks_BGM = jnp.pad(log_probs_BV, padding, constant_values=-jnp.inf).reshape(-1, num_blocks, _BLOCK)
    _, best_Bk = jax.lax.top_k(jnp.max(blocks_BGM, axis=2), k)
    # In the order of the vocabulary, so that the lowest id comes first among equals.
    best_Bk = jnp.sort(best_Bk, axis=1)
    candidates_BkM = jnp.take_along_axis(blocks_BGM, best_Bk[:, :, None], axis=1)
    values_Bk, index_Bk = jax.lax.top_k(candidates_BkM.reshape(-1, k * _BLOCK), k)
    ids_Bk = jnp.take_along_axis(best_Bk, index_Bk // _BLOCK, axis=1) * _BLOCK + index_Bk % _BLOCK
    return chosen_B, ids_Bk, values_Bk


def _penalise(scores_BV: jax.Array, rows: Rows, history: History) -> jax.Array:
    batch, vocab = scores_BV.shape
    tokens_BW, index_W = history.tokens_BW, jnp.arange(history.tokens_BW.shape[1])
    counts = index_W < history.length_B[:, None]
    generated = counts & (index_W >= history.prompt_length_B[:, None])
    if history.appended_BA is not None:
        tokens_BW = jnp.concatenate([tokens_BW, history.appended_BA], axis=1)
        appended = jnp.ones(history.appended_BA.shape, bool)
        counts, generated = (jnp.concatenate([kept, appended], axis=1) for kept in (counts, generated))
    # What doesn't count is sent to an id outside the vocabulary, which the scatter drops.
    ids_BW = jnp.where(counts & (tokens_BW >= 0), tokens_BW, vocab)
    row_B1 = jnp.arange(batch)[:, None]
    seen_BV = jnp.zeros((batch, vocab), bool).at[row_B1, ids_BW].set(True, mode="drop")
    output_BV = jnp.zeros((batch, vocab), jnp.int32).at[row_B1, ids_BW].add(generated.astype(jnp.int32), mode="drop")

    factor_B1 = rows.repetition_B[:, None]
    repeated_BV = jnp.where(scores_BV > 0, scores_BV / factor_B1, scores_BV * factor_B1)
    scores_BV = jnp.where(seen_BV & (factor_B1 != 1), repeated_BV, scores_BV)
    scores_BV = scores_BV - rows.frequency_B[:, None] * output_BV
    return scores_BV - rows.presence_B[:, None] * (output_BV > 0)


def _add_bias(scores_BV: jax.Array, rows: Rows) -> jax.Array:
    ids_BJ = jnp.where(rows.bias_ids_BJ >= 0, rows.bias_ids_BJ, scores_BV.shape[1])
    row_B1 = jnp.arange(scores_BV.shape[0])[:, None]
    return scores_BV.at[row_B1, ids_BJ].add(rows.bias_values_BJ, mode="drop")


def _unpack(mask_BU: jax.Array, vocab: int) -> jax.Array:
    """Bool [B, V] of a bit mask."""
    batch, words = mask_BU.shape
    assert words == -(-vocab // _BITS_PER_WORD), f"mask of {words} words for a vocabulary of {vocab}"
    bits_BUI = (mask_BU[:, :, None] >> jnp.arange(_BITS_PER_WORD, dtype=jnp.uint32)) & 1
    return bits_BUI.reshape(batch, -1)[:, :vocab] != 0


def _cuts_k(rows: Rows, vocab: int) -> jax.Array:
    return (rows.top_k_B > 0) & (rows.top_k_B < vocab)


def _filter(scores_BV: jax.Array, rows: Rows, static: bool | None) -> jax.Array:
    """top-k, top-p and min-p of scores whose maximum is 0; each keeps what is at or above a threshold.

    The thresholds are found exactly, two bits at a time, without sorting the vocabulary.
    """
    vocab = scores_BV.shape[1]
    sampled_B = ~rows.greedy_B
    k_B = jnp.where(sampled_B & _cuts_k(rows, vocab), rows.top_k_B, vocab)
    p_B = jnp.where(sampled_B, rows.top_p_B, 1.0)
    # log(0) = -inf keeps all.
    floor_B = jnp.where(sampled_B, jnp.log(rows.min_p_B), -jnp.inf)

    scores_BV = _stage(static, jnp.any(k_B < vocab), lambda x: _top_k(x, k_B), scores_BV)
    scores_BV = _stage(static, jnp.any(p_B < 1), lambda x: _top_p(x, p_B), scores_BV)
    return jnp.where(scores_BV >= floor_B[:, None], scores_BV, -jnp.inf)


def _top_k(scores_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    def enough(thresholds: list[jax.Array]) -> list[jax.Array]:
        kept = [(scores_BV >= _from_ordered(threshold_B)[:, None]).astype(jnp.int32) for threshold_B in thresholds]
        return [count_B >= k_B for count_B in _sums(kept)]

    low_B = jnp.full(k_B.shape, _to_ordered(jnp.float32(-jnp.inf)))
    threshold_B = _from_ordered(_largest(enough, low_B, jnp.ones_like(low_B)))
    return jnp.where(scores_BV >= threshold_B[:, None], scores_BV, -jnp.inf)


def _top_p(scores_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Thresholds on the probabilities relative to the largest: one array to read in each pass."""
    share_BV = jnp.exp(scores_BV)
    target_B = p_B * jnp.sum(share_BV, axis=1)

    def enough(thresholds: list[jax.Array]) -> list[jax.Array]:
        kept = [jnp.where(share_BV >= _from_ordered(threshold_B)[:, None], share_BV, 0.0) for threshold_B in thresholds]
        # Rounded sums of fewer non-negative terms in the same order are never larger: the predicate is monotone.
        return [sum_B >= target_B for sum_B in _sums(kept)]

    high = _to_ordered(jnp.float32(1.0)) + 1
    threshold_B = _from_ordered(_largest(enough, jnp.zeros_like(p_B, jnp.int32), jnp.full(p_B.shape, high)))
    # 1 is all of the mass, whatever its sum was rounded to; the maximum stays, whatever exp(0) was rounded to.
    keep_BV = (share_BV >= threshold_B[:, None]) | (p_B >= 1)[:, None] | (scores_BV >= 0)
    return jnp.where(keep_BV, scores_BV, -jnp.inf)


def _sums(terms: list[jax.Array]) -> list[jax.Array]:
    """Sums over the vocabulary of several arrays [B, V], which are computed and read in one pass."""
    zero = jnp.zeros((), terms[0].dtype)
    return jax.lax.reduce(terms, [zero] * len(terms), lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,))


def _largest(predicate: Callable[[list[jax.Array]], list[jax.Array]], low_B: jax.Array, high_B: jax.Array) -> jax.Array:
    """Largest integer in [low, high) where a predicate holds, int32 [B]: it holds at low and, once false, stays so.

    `predicate` is asked about three integers at once, the next two bits of the distance to low: a pass over the
    vocabulary takes as long for three as for one.
    """
    distance_B = (high_B - low_B).astype(jnp.uint32)

    def narrow(index, base_B):
        shift = 30 - 2 * index.astype(jnp.uint32)
        steps = [base_B | (jnp.uint32(digit) << shift) for digit in (1, 2, 3)]
        inside = [step_B < distance_B for step_B in steps]
        asked = [low_B + jnp.where(i, step_B, 0).astype(jnp.int32) for i, step_B in zip(inside, steps, strict=True)]
        holds = [i & answer for i, answer in zip(inside, predicate(asked), strict=True)]
        return base_B | (sum(hold.astype(jnp.uint32) for hold in holds) << shift)

    # The fixed number of passes spares a device the question after each.
    base_B = jax.lax.fori_loop(0, 16, narrow, jnp.zeros(low_B.shape, jnp.uint32))
    return low_B + base_B.astype(jnp.int32)


def _to_ordered(x: jax.Array) -> jax.Array:
    """float32 to int32 of the same order (-0.0 just below 0.0)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_ordered(i: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(i < 0, i ^ 0x7FFFFFFF, i), jnp.float32)


def _keys(rows: Rows, position_B: jax.Array, stream_B: jax.Array) -> jax.Array:
    """One key per row, of (seed, stream, position). The generator is named: another default must change no text."""
    keys_B = jax.random.wrap_key_data(rows.seed_B2, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(keys_B, stream_B), position_B)


def _gumbel(key: jax.Array, size: int) -> jax.Array:
    """Standard Gumbel noise in [-2.8, 22.9], float32 [size].

    From 32 random bits rather than the 23 of `jax.random.gumbel`, whose largest value is 16.6: of 128k tokens one
    exceeds that in 0.8% of draws. Finite everywhere, so that no excluded token (-inf) can win.
    """
    u = (jax.random.bits(key, (size,)).astype(jnp.float32) + 0.5) * 2.0**-32
    # log1p keeps the precision near u = 0, which is where the largest noise comes from.
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))
