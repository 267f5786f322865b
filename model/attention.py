"""Multi-head attention with grouped keys and values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.attention import attention
from kernels.paged_attention import extend_pages
from model.cache import PAGE_AXES, SCALE_AXES, LayerPages, PagedRows
from model.config import ModelConfig
from model.execution import Execution
from model.layers import RMSNorm, project, residual_stddev
from model.parameter import Creator, normal, zeros
from model.products import magnitudes_of
from model.rope import Rotation, rotate
from model.rounded import Activations, readers, rows_format
from parallel.sharding import constrain, map_shards


class Attention(nnx.Module):
    """Query, key, value projections, rotation, causal attention, output projection of layer `index`."""

    def __init__(self, config: ModelConfig, index: int, create: Creator):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.window = config, config.window(index)
        self.pattern_entry = index % len(config.window_pattern)
        init = normal(config.init_stddev)
        qkv = config.qkv_bias
        if create.joined:
            self.qkv = create("qkv", (D, N + 2 * K, H), ("embed", "heads", "head_dim"), init)
            self.qkv_bias = create("qkv_bias", (N + 2 * K, H), ("heads", "head_dim"), zeros) if qkv else None
        else:
            self.query = create("query", (D, N, H), ("embed", "heads", "head_dim"), init)
            self.key = create("key", (D, K, H), ("embed", "kv_heads", "head_dim"), init)
            self.value = create("value", (D, K, H), ("embed", "kv_heads", "head_dim"), init)
            self.query_bias = create("query_bias", (N, H), ("heads", "head_dim"), zeros) if qkv else None
            self.key_bias = create("key_bias", (K, H), ("kv_heads", "head_dim"), zeros) if qkv else None
            self.value_bias = create("value_bias", (K, H), ("kv_heads", "head_dim"), zeros) if qkv else None
        self.joined = create.joined
        projections = ("qkv",) if create.joined else ("query", "key", "value")
        self.magnitudes = magnitudes_of(create, *projections, "output")
        self.output = create("output", (N, H, D), ("heads", "head_dim", "embed"), normal(residual_stddev(config)))
        self.output_bias = create("output_bias", (D,), ("norm",), zeros) if config.attention_output_bias else None
        self.query_norm = RMSNorm(H, config, create.scope("query_norm")) if config.qk_norm else None
        self.key_norm = RMSNorm(H, config, create.scope("key_norm")) if config.qk_norm else None
        self.sinks = create("sinks", (N,), ("heads",), zeros) if config.attention_sinks else None

    @property
    def rows_format(self) -> str | None:
        """Dtype that what is read may be quantised to already."""
        return rows_format(self.qkv if self.joined else self.query)

    @property
    def num_reads(self) -> int:
        """How many products read what comes."""
        return 1 if self.joined else 3

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Activations | tuple[jax.Array, ...],
        rotation: Rotation,
        segments_BT: jax.Array | None,
        execution: Execution,
    ) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, rotation, execution)
        return self._output(self._attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, execution), execution)

    @jax.named_scope("attention")
    def extend(
        self,
        x_BTD: Activations | tuple[jax.Array, ...],
        rotation: Rotation,
        pages: LayerPages,
        rows: PagedRows,
        execution: Execution,
    ) -> tuple[jax.Array, LayerPages]:
        """As a call, for tokens that follow those in `pages`; and the pages with their keys and values."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, rotation, execution)
        if k_BTKH.shape[1] > 1:
            k_BTKH, v_BTKH = _harmless_unseen(k_BTKH, v_BTKH)
        o_BTNH, pages = self._attend_pages(q_BTNH, k_BTKH, v_BTKH, pages, rows, execution)
        return self._output(o_BTNH, execution, flat=True), pages

    def _project(
        self, x_BTD: Activations | tuple[jax.Array, ...], rotation: Rotation, execution: Execution
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values, normed and rotated."""
        reads = readers(x_BTD, self.num_reads)
        if self.joined:
            N, K = self.config.num_heads, self.config.num_kv_heads
            joined = self._heads("qkv", *reads, self.qkv, self.qkv_bias, execution)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(joined, (N, N + K), axis=2)
        else:
            q_BTNH = self._heads("query", reads[0], self.query, self.query_bias, execution)
            k_BTKH = self._heads("key", reads[1], self.key, self.key_bias, execution)
            v_BTKH = self._heads("value", reads[2], self.value, self.value_bias, execution)
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        heads = ("batch", "sequence", "act_heads", None)
        return tuple(constrain(x, execution.placement, *heads) for x in (q_BTNH, k_BTKH, v_BTKH))

    def _heads(
        self, name: str, x_BTD: Activations, kernel: nnx.Param, bias: nnx.Param | None, execution: Execution
    ) -> jax.Array:
        """[B, T, heads, H]."""
        y = project("btd,dnh->btnh", x_BTD, kernel, bias, execution, self.magnitudes.get(name))
        return y.reshape(*x_BTD.shape[:2], -1, self.config.head_dim)

    def _output(self, o_BTNH: jax.Array, execution: Execution, *, flat: bool = False) -> jax.Array:
        """`flat`: heads and their widths as one axis. Of two, XLA's CPU compiler takes another order than the kernel
        has, and copies it at each call: SmolLM2's layers take 51 ms of processor time for two tokens so, 32 flat."""
        weights = (self.output, self.output_bias, execution, self.magnitudes.get("output"))
        if flat:
            B, T, N, H = o_BTNH.shape
            y_BTD = project("btm,md->btd", o_BTNH.reshape(B, T, N * H), *weights)
        else:
            y_BTD = project("btnh,nhd->btd", o_BTNH, *weights)
        return constrain(y_BTD, execution.placement, "batch", "sequence", "act_embed")

    def _attend_pages(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: LayerPages, rows: PagedRows, execution: Execution
    ) -> tuple[jax.Array, LayerPages]:
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)

        def local(q, k, v, page_table, starts, counts, sinks, *pages):
            return extend_pages(
                q,
                k,
                v,
                *pages[:2],
                page_table,
                starts,
                counts,
                window=self.window,
                soft_cap=self.config.attention_soft_cap,
                sinks=sinks,
                scale=self.config.scale,
                **dict(zip(("k_scale", "v_scale"), pages[2:], strict=False)),
                impl=execution.paged_attention,
                target=execution.target,
            )

        heads = ("batch", "sequence", "act_heads", None)
        paged = (PAGE_AXES, PAGE_AXES, SCALE_AXES, SCALE_AXES)[: len(pages)]
        inputs = (heads, heads, heads, ("batch", None), ("batch",), ("batch",), ("act_heads",), *paged)
        run = map_shards(local, execution.placement, inputs, (heads, *paged))
        out, *pages = run(q, k, v, *rows, sinks, *pages)
        return out, tuple(pages)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array | None, execution: Execution
    ) -> jax.Array:
        op = functools.partial(
            attention,
            causal=True,
            window=self.window,
            soft_cap=self.config.attention_soft_cap,
            scale=self.config.scale,
            impl=execution.attention[self.pattern_entry],
            target=execution.target,
        )
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)

        def local(q, k, v, segments, sinks):
            return op(q, k, v, q_segments=segments, kv_segments=segments, sinks=sinks)

        heads = ("batch", "sequence", "act_heads", None)
        inputs = (heads, heads, heads, ("batch", "sequence"), ("act_heads",))
        return map_shards(local, execution.placement, inputs, heads)(q, k, v, segments_BT, sinks)


def _harmless_unseen(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of tokens that follow each other, [B, T, K, H] each: what isn't finite moves from values to keys.

    A key that a query doesn't see is left out; its value is multiplied by zero, which NaN survives. A draft that the
    model can't follow would else fail the tokens before it, which plain decoding emits. A query that sees it fails.
    """
    sound = jnp.isfinite(v)
    poisoned = ~sound if k.shape == v.shape else ~jnp.all(sound, axis=-1, keepdims=True)
    return jnp.where(poisoned, jnp.nan, k), jnp.where(sound, v, 0)
