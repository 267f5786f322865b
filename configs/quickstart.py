"""A small Mixture-of-Experts model on the source of Python's standard library: minutes on two CPU cores."""

from checkpoint.config import CheckpointConfig
from data.config import DataConfig
from model.config import ModelConfig, MoEConfig
from serving.config import EngineConfig, ServeRun
from training.config import MuonConfig, OptimizerConfig, Precision, SampleConfig, ScheduleConfig, TrainRun

MODEL = ModelConfig(
    vocab_size=4096,
    embed_dim=192,
    mlp_dim=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=1024,
    qk_norm=True,
    tie_embeddings=True,
    moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=384, load_balance_coef=0.01, router_z_coef=1e-3),
)


def train() -> TrainRun:
    return TrainRun(
        name="quickstart",
        model=MODEL,
        data=DataConfig(source="stdlib", sequence_length=256, batch_size=32),
        steps=120,
        optimizer=OptimizerConfig(
            kind="muon",
            schedule=ScheduleConfig(
                kind="wsd", peak_lr=5e-3, warmup_steps=15, decay_fraction=0.5, final_lr_fraction=0.02
            ),
            muon=MuonConfig(ns_steps=3, ns_dtype="float32"),
        ),
        precision=Precision(compute="float32"),
        checkpoint=CheckpointConfig(every=40),
        sample=SampleConfig(prompt="def main(", tokens=120),
    )


def serve() -> ServeRun:
    """What `train.py quickstart` left in runs/."""
    return ServeRun(
        name="quickstart",
        source="runs/quickstart",
        engine=EngineConfig(widths=(256,), tile_tokens=64, page_size=32),
    )
