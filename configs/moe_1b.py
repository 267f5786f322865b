"""1.16 B Mixture-of-Experts model, 0.335 B active in products, compared like dense-1b."""

from data.config import DataConfig
from model.config import ModelConfig, MoEConfig
from training.config import LayerConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=32_000,
    embed_dim=1024,
    mlp_dim=3584,
    num_layers=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    max_positions=8192,
    moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=3584, load_balance_coef=0.01, router_z_coef=1e-3),
)


def train() -> TrainRun:
    return TrainRun(
        name="moe-1b",
        model=MODEL,
        data=DataConfig(source="random", sequence_length=2048, batch_size=8),
        steps=200,
        layers=LayerConfig(scan=False, remat="none", document_mask=False),
    )
