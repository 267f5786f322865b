"""What the distribution of the next token should be: NumPy, float64, sorting, one row at a time; and how samples are
held against it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from serving.sampling import Rows, seed_words

ORDER = ("temperature", "top_k", "top_p", "min_p")
# A right sampler fails a test this seldom; all seeds are fixed, so it fails always or never.
FALSE_ALARM = 1e-6


@dataclasses.dataclass(frozen=True)
class Params:
    """One row's parameters, as `serving.request.SamplingParams` has them."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int = 0
    coupled: bool = False
    bias: tuple[tuple[int, float], ...] = ()


def rows_of(params: list[Params], num_bias: int = 2) -> Rows:
    def column(name: str, dtype=np.float32) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], dtype)

    padded = [(*p.bias, *[(-1, 0.0)] * (num_bias - len(p.bias))) for p in params]
    return Rows(
        temperature_B=column("temperature"),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p"),
        min_p_B=column("min_p"),
        presence_B=column("presence"),
        frequency_B=column("frequency"),
        repetition_B=column("repetition"),
        seed_B2=np.array([seed_words(p.seed) for p in params], np.uint32),
        coupled_B=column("coupled", bool),
        bias_ids_BJ=np.array([[token for token, _ in row] for row in padded], np.int32).reshape(len(params), num_bias),
        bias_values_BJ=np.array([[value for _, value in row] for row in padded], np.float32).reshape(-1, num_bias),
    )


def repeated_rows(params: Params, count: int, first_seed: int = 0, num_bias: int = 2) -> Rows:
    """`count` rows of the same parameters, each with a seed of its own."""
    one = rows_of([params], num_bias)
    rows = Rows(*(np.repeat(column, count, axis=0) for column in one))
    seeds = np.stack([np.full(count, 7), first_seed + np.arange(count)], axis=1)
    return rows._replace(seed_B2=seeds.astype(np.uint32))


def packed(allowed: np.ndarray) -> np.ndarray:
    """Bool [..., V] to the bit mask uint32 [..., ceil(V / 32)]."""
    vocab = allowed.shape[-1]
    words = -(-vocab // 32)
    padded = np.concatenate([allowed, np.zeros((*allowed.shape[:-1], words * 32 - vocab), bool)], axis=-1)
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def scores(logits, params: Params, prompt, output, allowed) -> np.ndarray:
    """Logits after penalties, bias and mask."""
    x = np.array(logits, np.float64)
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition if x[token] > 0 else x[token] * params.repetition
    for token in set(output):
        x[token] -= params.frequency * list(output).count(token) + params.presence
    for token, value in params.bias:
        x[token] += value
    return np.where(allowed, x, -np.inf)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def distribution(logits, params: Params, prompt=(), output=(), allowed=True, order=ORDER) -> tuple[np.ndarray, float]:
    """Probabilities [V], and how near some stage came to a different choice.

    `order` is there to be wrong on purpose.
    """
    x = scores(logits, params, prompt, output, allowed)
    if params.temperature == 0:
        return softmax(x), math.inf
    margin = math.inf
    for stage in order:
        if stage == "temperature":
            x = x / params.temperature
            continue
        p = softmax(x)
        falling = np.sort(p)[::-1]
        if stage == "top_k" and 0 < params.top_k < len(x):
            x = np.where(p >= falling[params.top_k - 1], x, -np.inf)
        elif stage == "top_p" and params.top_p < 1:
            mass = np.cumsum(falling)
            last = min(int(np.searchsorted(mass, params.top_p)), len(x) - 1)
            x = np.where(p >= falling[last], x, -np.inf)
            margin = min(margin, np.abs(mass - params.top_p).min())
        elif stage == "min_p" and params.min_p > 0:
            x = np.where(p >= params.min_p * p.max(), x, -np.inf)
            margin = min(margin, np.abs(p / p.max() - params.min_p).min() / params.min_p)
    return softmax(x), margin


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """p-value of Pearson's test, where each [...] of [..., V] has its own law; 0 if the impossible happened."""
    if np.any(counts[expected == 0]):
        return 0.0
    statistic, freedom = 0.0, 0
    for observed, wanted in zip(
        counts.reshape(-1, counts.shape[-1]), expected.reshape(-1, expected.shape[-1]), strict=True
    ):
        observed, wanted = _pooled(observed, wanted)
        statistic += float(((observed - wanted) ** 2 / wanted).sum())
        freedom += max(len(wanted) - 1, 0)
    return float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0


def _pooled(observed: np.ndarray, wanted: np.ndarray, enough: float = 20) -> tuple[np.ndarray, np.ndarray]:
    """The cells with the rare ones in one: the statistic follows its law only where each expects some tens."""
    order = np.argsort(-wanted)
    observed, wanted = observed[order], wanted[order]
    common = int(np.count_nonzero(wanted >= enough))
    if 0 < wanted[common:].sum() < enough:
        common -= 1
    if common < 0:
        return observed[:0], wanted[:0]
    observed, wanted = (np.append(x[:common], x[common:].sum()) for x in (observed, wanted))
    return observed[wanted > 0], wanted[wanted > 0]


def total_variation(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Distance of the empirical distribution, and what a right sampler stays below but for one time in a million.

    Its mean is at most sqrt(cells / draws) / 2; by McDiarmid it exceeds that by e with probability exp(-2 draws e^2).
    """
    draws, cells = counts.sum(), np.count_nonzero(probabilities)
    distance = 0.5 * np.abs(counts / draws - probabilities).sum()
    return float(distance), 0.5 * math.sqrt(cells / draws) + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * draws))


def agrees(tokens: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether samples [N] may come from a distribution [V], by both measures."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    distance, bound = total_variation(counts, probabilities)
    return chi_square(counts, probabilities * len(tokens)) > FALSE_ALARM and distance < bound
