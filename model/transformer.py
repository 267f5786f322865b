"""The decoder-only transformer, and its parameters as plain trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from kernels.target import target_of
from model.attention import Attention
from model.cache import LayerPages, PagedRows
from model.config import ModelConfig
from model.execution import Execution
from model.layers import MLP, Embedding, RMSNorm
from model.moe import MoE, MoEMetrics
from model.parameter import (
    Convert,
    Creator,
    Logical,
    Magnitudes,
    Place,
    RouterBias,
    Tree,
    fill,
    logical_tree,
    make_pending,
    normal,
)
from model.products import (
    Matrix,
    Storage,
    arrange,
    matrix_name,
    matrix_shape,
    multiply,
    part_of,
    quantize_matrix,
    quantized_logical,
)
from model.rope import Rotation, rotations
from model.rounded import Activations
from parallel.sharding import Placement, constrain
from quantization.qarray import Layout, QArray
from quantization.rules import Format, Part, ProductRules


class Output(NamedTuple):
    """Final hidden states [B, T, D], normed, and per-layer records stacked over layers in order."""

    hidden_BTD: jax.Array
    moe: MoEMetrics | None
    finite_L: jax.Array | None


class Layer(nnx.Module):
    """Attention and feed-forward, each around a residual connection."""

    def __init__(self, config: ModelConfig, index: int, create: Creator):
        self.attention = Attention(config, index, create.scope("attention"))
        self.is_moe = config.is_moe(index)
        self.is_local = config.window(index) is not None
        if self.is_moe:
            self.mlp = MoE(config, create.scope("moe"))
        else:
            self.mlp = MLP(config.mlp_dim, config, create.scope("mlp"))
        norms = {}
        for block in ("attention", "mlp"):
            if config.norm_placement in ("pre", "both"):
                norms[f"{block}_norm"] = RMSNorm(config.embed_dim, config, create.scope(f"{block}_norm"))
            if config.norm_placement in ("post", "both"):
                norms[f"{block}_post_norm"] = RMSNorm(config.embed_dim, config, create.scope(f"{block}_post_norm"))
        self.norms = nnx.Dict(norms)

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: dict[bool, Rotation],
        segments_BT: jax.Array | None,
        execution: Execution,
    ) -> tuple[jax.Array, MoEMetrics | None]:
        x_BTD, h_BTD, _ = self._read("attention_norm", x_BTD, None, self.attention, execution)
        y_BTD = self._norm(
            "attention_post_norm", self.attention(h_BTD, rotation[self.is_local], segments_BT, execution)
        )
        valid_BT = jnp.ones(x_BTD.shape[:2], jnp.float32) if segments_BT is None else segments_BT > 0
        return self._feed_forward(x_BTD, y_BTD, valid_BT, execution)

    def extend(
        self, x_BTD: jax.Array, rotation: dict[bool, Rotation], pages: LayerPages, rows: PagedRows, execution: Execution
    ) -> tuple[jax.Array, MoEMetrics | None, LayerPages]:
        """As a call, for tokens that follow those in `pages`; and the pages with their keys and values."""
        x_BTD, h_BTD, _ = self._read("attention_norm", x_BTD, None, self.attention, execution)
        y_BTD, pages = self.attention.extend(h_BTD, rotation[self.is_local], pages, rows, execution)
        y_BTD = self._norm("attention_post_norm", y_BTD)
        return *self._feed_forward(x_BTD, y_BTD, rows.valid(x_BTD.shape[1]), execution), pages

    def _feed_forward(
        self, x_BTD: jax.Array, residual_BTD: jax.Array, valid_BT: jax.Array, execution: Execution
    ) -> tuple[jax.Array, MoEMetrics | None]:
        """Of x + residual."""
        router_DE = self.mlp.router.kernel[...] if self.is_moe else None
        x_BTD, h_BTD, logits_BTE = self._read("mlp_norm", x_BTD, residual_BTD, self.mlp, execution, router_DE)
        metrics = None
        if self.is_moe:
            y_BTD, metrics = self.mlp(h_BTD, valid_BT.astype(jnp.float32), execution, logits_BTE)
        else:
            y_BTD = self.mlp(h_BTD, execution)
        return x_BTD + self._norm("mlp_post_norm", y_BTD), metrics

    def _read(
        self,
        name: str,
        x_BTD: jax.Array,
        residual_BTD: jax.Array | None,
        block: Attention | MLP | MoE,
        execution: Execution,
        narrow_DE: jax.Array | None = None,
    ) -> tuple[jax.Array, Activations | tuple[jax.Array, ...], jax.Array | None]:
        """x + residual, or x without one, and what a block reads of it: normed, for each product that reads it or
        quantised where the block takes it so. Its product with a narrow matrix besides, where the norm makes it."""
        if name in self.norms and block.rows_format is None:
            x_BTD, normed, products = self.norms[name].add(x_BTD, residual_BTD, block.num_reads, execution, narrow_DE)
            return x_BTD, normed if len(normed) > 1 else normed[0], products
        x_BTD = x_BTD if residual_BTD is None else x_BTD + residual_BTD
        if name not in self.norms:
            return x_BTD, x_BTD, None
        return x_BTD, self.norms[name].into(x_BTD, block.rows_format, execution), None

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return self.norms[name](x) if name in self.norms else x


class Plan(NamedTuple):
    """Layer indices: `prefix` and `suffix` stand alone; `blocks` repeats a period of layers, stacked and scanned."""

    prefix: range
    period: int
    num_blocks: int
    suffix: range


def plan_layers(config: ModelConfig, scan: bool) -> Plan:
    """What can be scanned: whole repetitions of the window pattern after the leading dense layers."""
    total = config.num_layers
    if not scan:
        return Plan(range(total), 1, 0, range(total, total))
    first = 0 if config.moe is None else config.moe.num_dense_layers
    period = len(config.window_pattern)
    num_blocks = (total - first) // period
    return Plan(range(first), period, num_blocks, range(first + num_blocks * period, total))


class Transformer(nnx.Module):
    """Token ids to hidden states; `head` gives the projection to logits. `scan` stacks equal layers."""

    def __init__(self, config: ModelConfig, create: Creator, *, scan: bool):
        self.config, self.plan = config, plan_layers(config, scan)
        self.embedding = Embedding(config, create.scope("embedding"))
        layers = create.scope("layers")
        self.prefix = nnx.List([Layer(config, i, layers.scope(i)) for i in self.plan.prefix])
        self.blocks = nnx.List([self._stacked(config, offset, layers) for offset in range(self._stacked_layers())])
        self.suffix = nnx.List([Layer(config, i, layers.scope(i)) for i in self.plan.suffix])
        self.final_norm = RMSNorm(config.embed_dim, config, create.scope("final_norm"))
        head = ("lm_head", (config.embed_dim, config.vocab_size), ("embed", "vocab"), normal(config.init_stddev))
        self.lm_head = None if config.tie_embeddings else create(*head)

    def _stacked_layers(self) -> int:
        return self.plan.period if self.plan.num_blocks else 0

    def _stacked(self, config: ModelConfig, offset: int, layers: Creator) -> Layer:
        """Layer `offset` of each block, as one module of stacked parameters."""
        first = len(self.plan.prefix) + offset
        indices = range(first, first + self.plan.num_blocks * self.plan.period, self.plan.period)
        keys = jnp.stack([layers.scope(index).keys for index in indices])
        return Layer(config, first, dataclasses.replace(layers, keys=keys))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        execution: Execution,
    ) -> Output:
        """`segments_BT` numbers the documents of a row from 1, 0 for padding; None for one document per row."""
        x_BTD = self.embedding(tokens_BT, execution)
        rotation = rotations(self.config, positions_BT)
        records: list[tuple[MoEMetrics | None, jax.Array | None]] = []
        for layer in self.prefix:
            x_BTD, record = _run_layer(layer, x_BTD, rotation, segments_BT, execution)
            records.append(record)
        if self.plan.num_blocks:
            x_BTD, stacked = self._scan(x_BTD, rotation, segments_BT, execution)
            records.extend(stacked)
        for layer in self.suffix:
            x_BTD, record = _run_layer(layer, x_BTD, rotation, segments_BT, execution)
            records.append(record)
        moe = [metrics for metrics, _ in records if metrics is not None]
        finite = [flag for _, flag in records if flag is not None]
        return Output(
            self.final_norm(x_BTD),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *moe) if moe else None,
            jnp.stack(finite) if finite else None,
        )

    def extend(
        self,
        tokens_BT: jax.Array,
        cache: Sequence[LayerPages],
        rows: PagedRows,
        execution: Execution,
        *,
        num_layers: int | None = None,
    ) -> tuple[Output, list[LayerPages]]:
        """As a call, for tokens that follow those in the cache; and the cache with their keys and values.

        Row b's first counts[b] tokens are at positions starts[b] and on; the rest is padding. Needs unrolled layers.
        With `num_layers`, the first ones alone run, and the other layers' pages are returned as they are.
        """
        assert not self.plan.num_blocks, "serving unrolls layers: a scan would copy the cache of every layer"
        x_BTD = self.embedding(tokens_BT, execution)
        rotation = rotations(self.config, rows.positions(tokens_BT.shape[1]))
        cache, moe = list(cache), []
        for index, layer in enumerate(self.prefix[:num_layers]):
            x_BTD, metrics, cache[index] = layer.extend(x_BTD, rotation, cache[index], rows, execution)
            if metrics is not None:
                moe.append(metrics)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moe) if moe else None
        return Output(self.final_norm(x_BTD), stacked, None), cache

    def _scan(self, x_BTD, rotation, segments_BT, execution):
        graphdef, stacked = nnx.split(self.blocks)

        def body(x_BTD, parameters):
            records = []
            for layer in nnx.merge(graphdef, parameters):
                x_BTD, record = _run_layer(layer, x_BTD, rotation, segments_BT, execution)
                records.append(record)
            return x_BTD, records

        x_BTD, stacked_records = jax.lax.scan(body, x_BTD, stacked)

        def unstack(block: int):
            return [jax.tree.map(lambda leaf: leaf[block], record) for record in stacked_records]

        return x_BTD, [record for block in range(self.plan.num_blocks) for record in unstack(block)]

    def head(self, execution: Execution) -> jax.Array:
        """Projection to logits [D, V], in the compute dtype."""
        kernel = self.embedding.table[...].T if self.lm_head is None else self.lm_head[...]
        return kernel.astype(execution.precision.compute)

    @jax.named_scope("lm_head")
    def logits(self, hidden_BTD: jax.Array, execution: Execution) -> jax.Array:
        """float32 [B, T, V], soft-capped. Training takes `head` instead and never holds all logits."""
        if self.lm_head is not None and isinstance(self.lm_head.get_value(), QArray):
            logits_BTV = multiply(hidden_BTD, self.lm_head, None, execution, jnp.float32)
        else:
            head_DV = self.head(execution)
            logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
        cap = self.config.final_soft_cap
        logits_BTV = logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)
        return constrain(logits_BTV, execution.placement, "batch", "sequence", "act_vocab")


def _run_layer(layer: Layer, x_BTD, rotation, segments_BT, execution: Execution):
    """One layer under the remat policy, and its record: MoE metrics and, if asked, whether its output is finite."""

    def run(layer, x_BTD):
        x_BTD, metrics = layer(x_BTD, rotation, segments_BT, execution)
        finite = jnp.all(jnp.isfinite(x_BTD)) if execution.check_finite else None
        return x_BTD, (metrics, finite)

    if execution.remat == "none":
        return run(layer, x_BTD)
    policy = None
    if execution.remat == "dots":
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    graphdef, parameters = nnx.split(layer)
    return jax.checkpoint(lambda p, x: run(nnx.merge(graphdef, p), x), policy=policy)(parameters, x_BTD)


@dataclasses.dataclass(frozen=True)
class Definition:
    """A model's parameters described without arrays: what init, shardings, restore and the optimizer derive from.

    Trees are nested dicts: `params` what the gradient reaches, `biases` the routers' balancing biases (often empty).
    """

    config: ModelConfig
    scan: bool
    param_dtype: str = "float32"
    joined: bool = False
    """Query, key and value projections as one array, and gate and up as one: one product reads them faster when a few
    tokens are all there is. They cannot be split over devices then. See `model/assembly.py`."""
    rules: ProductRules = dataclasses.field(default_factory=ProductRules)
    """In what formats matrices are multiplied."""
    delayed: bool = False
    """Training's FP8 products have scales by the magnitudes of the steps before, not by their operands' own."""
    copy_dtype: str | None = None
    """Dtype of copies of the matrices that training keeps beside them, for products to read; None for none."""
    stored_for: Storage | None = None
    """Where the matrices are held in their formats. None where they keep `param_dtype` and are quantised at each
    product, as training does."""

    def init(self, key: jax.Array, place: Place | None = None, convert: Convert | None = None) -> tuple[Tree, Tree]:
        """(params, biases) from a PRNG key. The same for any mesh, and for scanned or unrolled layers.

        With `place`, arrays on devices, one after another: each shard is made where it lives, so that no array is ever
        whole on one, and `convert` (of a definition without formats) is given each parameter before the next is made.
        Without it, for a caller that traces.
        """
        held = [matrix.name for matrix in self.matrices if isinstance(matrix.value, QArray)]
        assert not held, f"{held} are drawn as they are, and then converted"
        _, params, biases, _ = _split(self._create(key, place))
        if place is None:
            return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)
        return make_pending(params, convert), make_pending(biases, None)

    def stored_on(self, device: jax.Device, impl: str = "auto", placement: Placement | None = None) -> Definition:
        """The same with matrices held in their formats, as suits a device, an implementation of their products, and a
        mesh that they are split over."""
        return dataclasses.replace(self, stored_for=Storage(target_of(device), impl, placement))

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
        graphdef, params, biases, magnitudes = _split(nnx.eval_shape(lambda: self._create(jax.random.key(0))))
        return graphdef, self._formatted(params), biases, magnitudes

    def _formatted(self, params: nnx.State) -> nnx.State:
        """Abstract parameters that know their formats. Raises ValueError as `ProductRules` does."""
        if self.rules.head != "compute" and self.config.tie_embeddings:
            raise ValueError(
                f"precision.head={self.rules.head} needs a head of its own, and the model's is its embedding, which "
                "stays as it is; set precision.head to compute"
            )
        flat, names = nnx.to_flat_state(params), set()
        for path, variable in flat:
            part = part_of(variable.get_metadata("logical"))
            # Grouped products have no gradients in FP8.
            if self.rules.covers(part) and not (part == "experts" and self.stored_for is None):
                names.add(matrix_name(path))
                self._format(matrix_name(path), part, variable)
        self.rules.check(names)
        return nnx.from_flat_state(flat)

    def _format(self, name: str, part: Part, variable: nnx.Param) -> None:
        """Gives an abstract parameter its format, and its value and axes those that it is held in."""
        logical, stored = variable.get_metadata("logical"), self.stored_for
        whole = matrix_shape(variable.shape, logical)[-2:]
        shape = whole if stored is None else stored.local(whole, logical)
        format = self.rules.format_of(name, part, shape[0])
        if format is not None and stored is not None:
            moe = self.config.moe
            format, layout = stored.settle(format, part, shape, moe is not None and moe.dispatch == "dropless")
            variable.set_value(_describe(variable.get_value(), logical, format, layout))
            variable.set_metadata(logical=quantized_logical(logical, format, layout))
        variable.set_metadata(format=format)

    def _create(self, key: jax.Array, place: Place | None = None) -> Transformer:
        return Transformer(
            self.config, Creator(key, self.param_dtype, self.joined, self.delayed, place), scan=self.scan
        )

    @property
    def parameters(self) -> dict[tuple[str | int, ...], nnx.Param]:
        """Abstract parameters by path, with the metadata `logical` and `format`."""
        return dict(nnx.to_flat_state(self._split[1]))

    @property
    def matrices(self) -> list[Matrix]:
        """Parameters that have a format."""
        named = [(matrix_name(path), variable) for path, variable in self.parameters.items()]
        found = [(name, v.get_metadata("format"), v.get_value(), v.get_metadata("logical")) for name, v in named]
        return [Matrix(*each) for each in found if each[1] is not None]

    @property
    def plain(self) -> Definition:
        """The same parameters as files have them: projections one by one, nothing quantised."""
        return dataclasses.replace(self, joined=False, rules=ProductRules(), delayed=False, stored_for=None)

    @property
    def abstract(self) -> tuple[Tree, Tree]:
        """(params, biases) as ShapeDtypeStructs."""
        _, params, biases, _ = self._split
        return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)

    @property
    def logical(self) -> tuple[Tree, Tree]:
        """(params, biases) as tuples of logical axis names."""
        _, params, biases, _ = self._split
        return logical_tree(params), logical_tree(biases)

    def layers_at(self, path: tuple[str | int, ...]) -> range:
        """Layers whose variable is at this path of `params` or `biases`, in the order they are stacked."""
        group, position = path[0], int(path[1])
        plan = plan_layers(self.config, self.scan)
        if group == "blocks":
            first = len(plan.prefix) + position
            return range(first, first + plan.num_blocks * plan.period, plan.period)
        layer = (plan.prefix if group == "prefix" else plan.suffix)[position]
        return range(layer, layer + 1)

    @property
    def magnitudes(self) -> tuple[Tree, Tree]:
        """What delayed scaling goes by, as ShapeDtypeStructs, and their logical axes; empty without it."""
        magnitudes = self._split[3]
        return nnx.to_pure_dict(magnitudes), logical_tree(magnitudes)

    @property
    def copies(self) -> tuple[Tree, Tree]:
        """The copies that training keeps, as ShapeDtypeStructs, and their logical axes; empty without `copy_dtype`.

        Of matrices that products take in the compute dtype. What is read in float32 (norms, routers, biases) needs
        none, an embedding's lookup casts only the rows it reads, and rounding to few bits is a pass anyway.
        """
        taken = {}
        if self.copy_dtype is not None:
            taken = {path: variable for path, variable in self.parameters.items() if _is_product(variable)}
        shapes = {path: jax.ShapeDtypeStruct(variable.shape, self.copy_dtype) for path, variable in taken.items()}
        logical = {path: variable.get_metadata("logical") for path, variable in taken.items()}
        return traverse_util.unflatten_dict(shapes), traverse_util.unflatten_dict(logical)

    def bind(self, params: Tree, biases: Tree, magnitudes: Tree | None = None) -> Transformer:
        """The model with these arrays. Without `magnitudes`, scales are by the arrays of the call."""
        if magnitudes is None and self.delayed:
            return self._current.bind(params, biases)
        graphdef, *abstract = self._split
        given = (params, biases, {} if magnitudes is None else magnitudes)
        return nnx.merge(graphdef, *map(fill, abstract, given))

    @functools.cached_property
    def _current(self) -> Definition:
        return dataclasses.replace(self, delayed=False)


def _split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    return nnx.split(model, nnx.Param, RouterBias, Magnitudes)


def _is_product(variable: nnx.Param) -> bool:
    """Whether a parameter is an operand of products as it is."""
    return variable.get_metadata("format") is None and part_of(variable.get_metadata("logical")) is not None


def _describe(x: jax.ShapeDtypeStruct, logical: Logical, format: Format, layout: Layout) -> QArray:
    return jax.eval_shape(lambda x: arrange(quantize_matrix(x, logical, format), layout), x)
