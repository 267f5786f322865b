"""Mixtral 8x7B (arXiv 2401.04088: 46.7 B parameters, 12.9 B active)."""

from data.config import DataConfig
from model.config import ModelConfig, MoEConfig, RopeConfig
from training.config import LayerConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=32_000,
    embed_dim=4096,
    mlp_dim=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=32_768,
    rope=RopeConfig(theta=1_000_000.0),
    moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=14_336, load_balance_coef=0.02),
)


def train() -> TrainRun:
    return TrainRun(
        name="mixtral-8x7b",
        model=MODEL,
        data=DataConfig(source="random", sequence_length=4096, batch_size=256),
        steps=1000,
        layers=LayerConfig(scan=True, remat="full", document_mask=False),
    )
