"""A Hugging Face folder of a tiny random model with everything that a server reads: weights, a tokenizer of bytes, an
end token, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint import save_huggingface
from model.config import ModelConfig
from model.transformer import Definition
from serving.config import EngineConfig
from tests.model.tiny import COMPILE_FAST, dense, random_params
from tests.serving.fake_engine import TEMPLATE, byte_tokenizer

END = 256
"""Token that ends a text; token i below is byte i, those above have no text."""

CONTEXT = 512
MODEL = dense(vocab_size=260, embed_dim=32, mlp_dim=64, max_positions=2048)

SHAPES = EngineConfig(
    max_sequences=4,
    max_context=CONTEXT,
    batch_sizes=(1, 4),
    widths=(CONTEXT,),
    tile_tokens=16,
    tile_counts=(4,),
    page_size=16,
)

# As ServeRun.xla_options and the command line take it.
FAST = tuple(f"{name}={value}" for name, value in COMPILE_FAST.items())


def write_tiny_folder(folder: Path, model: ModelConfig = MODEL, seed: int = 0) -> Path:
    definition = Definition(model, scan=False, param_dtype="float32")
    save_huggingface(folder, model, *random_params(definition, seed), dtype="float32")
    (folder / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str(), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder
