"""Qwen3-30B-A3B (arXiv 2505.09388: 30.5 B parameters, 3.3 B active, 128 experts)."""

from data.config import DataConfig
from model.config import ModelConfig, MoEConfig, RopeConfig
from training.config import LayerConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=151_936,
    embed_dim=2048,
    mlp_dim=6144,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    max_positions=40_960,
    norm_epsilon=1e-6,
    qk_norm=True,
    rope=RopeConfig(theta=1_000_000.0),
    moe=MoEConfig(num_experts=128, experts_per_token=8, mlp_dim=768, load_balance_coef=1e-3),
)


def train() -> TrainRun:
    return TrainRun(
        name="qwen3-30b-a3b",
        model=MODEL,
        data=DataConfig(source="random", sequence_length=4096, batch_size=256),
        steps=1000,
        layers=LayerConfig(scan=True, remat="full", document_mask=False),
    )
