"""Llama 3 70B (Meta's model card: 70.6 B parameters)."""

from data.config import DataConfig
from model.config import ModelConfig, RopeConfig
from training.config import LayerConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=128_256,
    embed_dim=8192,
    mlp_dim=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_positions=8192,
    rope=RopeConfig(theta=500_000.0),
)


def train() -> TrainRun:
    return TrainRun(
        name="llama3-70b",
        model=MODEL,
        data=DataConfig(source="random", sequence_length=8192, batch_size=256),
        steps=1000,
        layers=LayerConfig(scan=True, remat="full", document_mask=False),
    )
