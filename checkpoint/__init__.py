"""Weights on disk: what is kept of a run, restorable on another mesh, and models of other formats, in and out."""

from checkpoint.config import CheckpointConfig
from checkpoint.huggingface import save_huggingface
from checkpoint.manifest import CheckpointError, Manifest, read_manifest
from checkpoint.pretrained import Pretrained, open_pretrained
from checkpoint.store import Checkpoint, CheckpointReader, CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointStore",
    "Manifest",
    "Pretrained",
    "open_pretrained",
    "read_manifest",
    "save_huggingface",
]
