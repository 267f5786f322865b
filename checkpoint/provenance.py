"""Where a checkpoint came from: the code and the devices that wrote it."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding


class _NoCommitError(Exception):
    """Why the commit of the source tree is unknown."""


def code_version() -> dict[str, Any]:
    """Commit of this source tree and versions of the libraries that decide how a checkpoint reads.

    `commit` is None, with `commit_reason`, where the tree is no git checkout or git cannot be asked.
    """
    root = Path(__file__).resolve().parents[1]
    names = ("jax", "flax", "optax", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in names}
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root:
            raise _NoCommitError("the source tree is not the root of a git checkout")
        modified = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except _NoCommitError as reason:
        return {"commit": None, "commit_reason": str(reason), "versions": versions}
    return {"commit": commit, "modified": modified, "versions": versions}


def _git(root: Path, *arguments: str) -> str:
    # No optional locks: asking for the status must never stand in the way of someone's commit.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except FileNotFoundError as error:
        raise _NoCommitError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise _NoCommitError("git did not answer within 10 s") from error
    except subprocess.CalledProcessError as error:
        raise _NoCommitError(error.stderr.strip() or f"git ended with status {error.returncode}") from error
    return result.stdout.strip()


def describe_devices(leaves: Iterable[jax.Array]) -> dict[str, Any]:
    """Devices that hold `leaves`: count, kind, processes, and the mesh if they lie on one."""
    arrays = list(leaves)
    devices = set().union(*(x.sharding.device_set for x in arrays))
    mesh = next((dict(x.sharding.mesh.shape) for x in arrays if isinstance(x.sharding, NamedSharding)), None)
    return {
        "num_devices": len(devices),
        "kinds": sorted({device.device_kind for device in devices}),
        "num_processes": jax.process_count(),
        "mesh": mesh,
    }
