"""What is kept of a run: sharded arrays with a manifest, restorable on another mesh."""

from checkpoint.config import CheckpointConfig
from checkpoint.manifest import CheckpointError, Manifest, read_manifest
from checkpoint.store import Checkpoint, CheckpointReader, CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointStore",
    "Manifest",
    "read_manifest",
]
