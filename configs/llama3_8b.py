"""Llama 3 8B (Meta's model card: 8.03 B parameters)."""

from data.config import DataConfig
from model.config import ModelConfig, RopeConfig
from serving.config import EngineConfig, ServeRun
from training.config import LayerConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=128_256,
    embed_dim=4096,
    mlp_dim=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=8192,
    rope=RopeConfig(theta=500_000.0),
)


def train() -> TrainRun:
    return TrainRun(
        name="llama3-8b",
        model=MODEL,
        data=DataConfig(source="random", sequence_length=8192, batch_size=64),
        steps=1000,
        layers=LayerConfig(scan=True, remat="full", document_mask=False),
    )


def serve() -> ServeRun:
    """Random weights, to measure: `serve.py FOLDER` serves the real ones."""
    return ServeRun(
        name="llama3-8b",
        model=MODEL,
        engine=EngineConfig(batch_sizes=(1, 8, 32, 128, 256)),
    )
