"""When checkpoints are written and which of them stay."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run. The last step, and a run stopped by a signal, are saved too, unless `every` is 0."""

    directory: str | None = None
    """Where checkpoints go; None for `checkpoints/` in the run's directory."""
    every: int = 1000
    """Steps between checkpoints; 0 for none at all: of a run that is only measured, nothing is kept."""
    keep: int = 3
    """Newest checkpoints that stay."""
    keep_best: int = 1
    """Checkpoints of lowest eval loss that stay besides the newest; 0 for none."""
    checksum: bool = True
    """Checksum each file when saved, and again before a restore, which reads the checkpoint once more. File sizes are
    checked either way."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least {least}")
