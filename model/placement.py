"""Whether a model's sizes divide over a mesh."""

from __future__ import annotations

from model.config import ModelConfig
from parallel.sharding import Placement


def check_model_placement(model: ModelConfig, placement: Placement) -> None:
    """Raises ValueError for the first width of the model that does not divide over its mesh axes."""
    lengths = [
        ("model.num_heads", model.num_heads, ("heads", "act_heads")),
        ("model.num_kv_heads", model.num_kv_heads, ("kv_heads", "act_heads")),
        ("model.vocab_size", model.vocab_size, ("vocab", "act_vocab")),
        ("model.embed_dim", model.embed_dim, ("embed", "act_embed")),
        ("model.head_dim", model.head_dim, ("head_dim",)),
    ]
    moe = model.moe
    if moe is None or moe.num_dense_layers:
        lengths.append(("model.mlp_dim", model.mlp_dim, ("mlp", "act_mlp")))
    if moe is not None:
        lengths.append(("model.moe.num_experts", moe.num_experts, ("experts",)))
        lengths.append(("model.moe.mlp_dim", moe.mlp_dim, ("expert_mlp", "act_mlp")))
        lengths.append(("model.embed_dim", model.embed_dim, ("expert_embed",)))
        if moe.shared_mlp_dim:
            lengths.append(("model.moe.shared_mlp_dim", moe.shared_mlp_dim, ("mlp", "act_mlp")))
    for setting, length, logical in lengths:
        for axis in logical:
            placement.check(setting, length, axis)
    if moe is None and placement.size("experts") > 1:
        raise ValueError(
            f"mesh axis {placement.axes('experts')} of {placement.size('experts')} devices holds experts, and the "
            "model has none; set mesh.expert to 1 or model.moe"
        )
