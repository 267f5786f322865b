"""Checkpoints of one run: asynchronous sharded saves, complete or absent, restorable onto another mesh."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from checkpoint.config import CheckpointConfig
from checkpoint.manifest import (
    CheckpointError,
    Manifest,
    architecture_differences,
    check_contents,
    check_sizes,
    describe,
    finite_metrics,
    now,
    plain,
    read_manifest,
    sync_directory,
    write_manifest,
)
from checkpoint.provenance import code_version, describe_devices
from checkpoint.tree import named_leaves, under

BEST_METRIC = "eval_loss"

_STEP = re.compile(r"step_(\d+)")
_PARTIAL = re.compile(r"step_\d+\.(orbax-checkpoint-tmp.*|deleted)")
_ASIDE = re.compile(r"step_\d+\.torn\.\d+")
_LOCK_FILE = ".writer.lock"
_LISTED = 20

# The rename of the finished directory is the commit; Orbax would otherwise choose by file system.
_ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.ATOMIC_RENAME)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path
    manifest: Manifest


class _QuietOrbax(logging.Filter):
    """Drops Orbax's own records: progress nobody asked for, and tracebacks of errors that the store raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_QUIET = _QuietOrbax()


class _Handler(ocp.PyTreeCheckpointHandler):
    """Writes the arrays, and then the manifest as the last thing before Orbax renames the directory into place.

    Orbax calls `finalize` on process 0 alone, after a barrier behind every process's writes.
    """

    def __init__(self, *, checksum: bool) -> None:
        # Uncompressed: zstd took 2 to 4 times as long for 8% fewer bytes of float32 noise (two CPU cores).
        super().__init__(use_zarr3=True, use_compression=False)
        self._checksum = checksum
        self.manifest: Manifest | None = None

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        assert self.manifest is not None
        write_manifest(Path(directory), self.manifest, checksum=self._checksum)


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.PyTreeSave):
    """What Orbax demands of a handler class of its own: arguments registered for it."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.PyTreeRestore):
    """As `_Save`, for reading."""


class CheckpointReader:
    """Reads the checkpoints below a directory and changes nothing there.

    `architecture` (JSON-like) is compared with that of a checkpoint before any array is read; None compares nothing.
    `on_note` gets one line for each thing a person should know, such as a torn checkpoint that was passed over.
    All processes of a run must make the same calls, and see the same file system.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        architecture: Mapping[str, Any] | None,
        on_note: Callable[[str], None],
    ) -> None:
        logging.getLogger("absl").addFilter(_QUIET)
        self._directory = Path(directory).absolute()
        self._architecture = None if architecture is None else plain(architecture, "architecture")
        self._on_note = on_note
        self._torn: dict[Path, str] = {}
        self._sound: set[Path] = set()
        self._noted: set[Path] = set()

    @property
    def directory(self) -> Path:
        return self._directory

    def list_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._complete())

    def latest(self) -> Checkpoint | None:
        """Newest complete checkpoint, or None: a fresh start. A torn one passed over is noted once, with the reason."""
        chosen: Checkpoint | None = None
        passed: dict[Path, str] = {}
        for step, path in self._step_directories():
            chosen = self._examine(path)
            if chosen is not None:
                break
            passed[path] = f"checkpoint of step {step} is torn and is not used: {self._torn[path]}"
        used = "no complete checkpoint is left" if chosen is None else f"using the previous one, of step {chosen.step}"
        for path, note in passed.items():
            if path not in self._noted:
                self._noted.add(path)
                self._on_note(f"{note}; {used}")
        return chosen

    def best(self) -> Checkpoint | None:
        """Complete checkpoint of the lowest evaluation loss, or None where none was evaluated."""
        return min((c for c in self._complete() if _loss(c) is not None), key=_loss, default=None)

    def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, Manifest]:
        """State and manifest of the newest complete checkpoint, or of `step`.

        abstract_state: pytree of `jax.ShapeDtypeStruct`, each with the sharding that the array shall have (None: the
        first device); mesh and sharding need not be those of the save.
        Raises ValueError for a checkpoint of another architecture or other leaves, naming what differs, and
        CheckpointError where none is complete or the arrays cannot be read.
        """
        return self._restore("", abstract_state, step=step, cast=False)

    def restore_subtree(
        self, prefix: str, abstract_tree: Any, *, step: int | None = None, cast: bool = False
    ) -> tuple[Any, Manifest]:
        """As `restore`, for the leaves below `prefix` (such as `params`); `cast` converts to the dtypes asked for."""
        return self._restore(prefix, abstract_tree, step=step, cast=cast)

    def _restore(self, prefix: str, abstract: Any, *, step: int | None, cast: bool) -> tuple[Any, Manifest]:
        checkpoint = self.latest() if step is None else self._at(step)
        if checkpoint is None:
            raise CheckpointError(f"no complete checkpoint in {self._directory}")
        self._check_architecture(checkpoint)
        leaves, treedef = named_leaves(abstract)
        names = under(prefix, list(leaves))
        wanted = {names[name]: _placed(names[name], leaf) for name, leaf in leaves.items()}
        _check_leaves(checkpoint, prefix, wanted, cast=cast)
        arrays = _read(checkpoint.path, wanted)
        return jax.tree_util.tree_unflatten(treedef, [arrays[names[name]] for name in leaves]), checkpoint.manifest

    def _at(self, step: int) -> Checkpoint:
        path = self._path(step)
        checkpoint = self._examine(path) if path.is_dir() else None
        if checkpoint is None:
            reason = self._torn.get(path, "no such directory")
            raise CheckpointError(
                f"checkpoint of step {step} in {self._directory} is not complete ({reason}); "
                f"complete steps: {self.list_steps()}"
            )
        return checkpoint

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:010d}"

    def _step_directories(self) -> list[tuple[int, Path]]:
        """Step and path of every committed directory, newest first."""
        if not self._directory.is_dir():
            return []
        found = [(_STEP.fullmatch(path.name), path) for path in self._directory.iterdir() if path.is_dir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def _complete(self) -> list[Checkpoint]:
        """Every checkpoint whose manifest and file sizes are right, newest first."""
        opened = (self._open(path) for _, path in self._step_directories())
        return [checkpoint for checkpoint in opened if checkpoint is not None]

    def _open(self, path: Path) -> Checkpoint | None:
        """Checkpoint at `path` if its manifest is valid and every file has its size; the reason is kept if not."""
        if path in self._torn:
            return None
        try:
            manifest = read_manifest(path)
            check_sizes(path, manifest)
        except CheckpointError as error:
            self._torn[path] = str(error)
            return None
        return Checkpoint(manifest.step, path, manifest)

    def _examine(self, path: Path) -> Checkpoint | None:
        """As `_open`, with the contents against their checksums, and agreed upon by all processes."""
        checkpoint = self._open(path)
        if _all_agree(checkpoint is not None):
            assert checkpoint is not None
            if path in self._sound or self._contents_match(checkpoint):
                self._sound.add(path)
                return checkpoint
        self._torn.setdefault(path, "another process found it damaged")
        return None

    def _contents_match(self, checkpoint: Checkpoint) -> bool:
        try:
            check_contents(
                checkpoint.path, checkpoint.manifest, part=jax.process_index(), num_parts=jax.process_count()
            )
        except CheckpointError as error:
            self._torn[checkpoint.path] = str(error)
        return _all_agree(checkpoint.path not in self._torn)

    def _check_architecture(self, checkpoint: Checkpoint) -> None:
        if self._architecture is None:
            return
        differing = architecture_differences(checkpoint.manifest.architecture, self._architecture)
        if differing:
            raise ValueError(
                f"checkpoint {checkpoint.path} is of another architecture; {_lines('fields that differ', differing)}\n"
                "use the configuration it was saved with, or another checkpoint directory"
            )


class CheckpointStore(CheckpointReader):
    """The one writer of a run's checkpoints.

    Opening it removes what an interrupted save left behind. `run_config` (JSON-like) is recorded, not compared.
    Raises ValueError if another process already writes to `directory`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        architecture: Mapping[str, Any],
        run_config: Mapping[str, Any],
        on_note: Callable[[str], None],
    ) -> None:
        super().__init__(directory, architecture=architecture, on_note=on_note)
        self._config = config
        self._run_config = plain(run_config, "run_config")
        self._code = code_version()
        self._last_saved: int | None = None
        self._lock: int | None = None
        self._closed = False
        locked = True
        if jax.process_index() == 0:
            locked = self._acquire()
        if not _all_agree(locked):
            raise ValueError(
                f"another process is writing checkpoints to {self._directory}; stop it, or set checkpoint.directory"
            )
        if jax.process_index() == 0:
            self._clean(_PARTIAL)
        self._handler = _Handler(checksum=config.checksum)
        self._checkpointer = ocp.AsyncCheckpointer(self._handler, atomicity_options=_ATOMICITY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, *, data_state: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Copies `state` to the host and writes it in the background; False if this run already saved `step`.

        Blocks while the previous save is being written, and for the copy; after it returns, `state` may be donated.
        state: pytree of arrays; PRNG keys as raw key data. data_state: JSON-like, the same on every process.
        metrics: scalars; `eval_loss` decides which checkpoints are the best.
        Raises CheckpointError if the previous or this save failed, ValueError for a state that cannot be saved or
        a step of which another run left a complete checkpoint.
        """
        self.wait()
        # Only processes that all still trust what this run wrote may leave it at that.
        if step == self._last_saved and _all_agree(self._path(step) not in self._torn):
            return False
        leaves, _ = named_leaves(state)
        _check_savable(leaves)
        self._handler.manifest = Manifest(
            step=step,
            created=now(),
            architecture=self._architecture,
            run_config=self._run_config,
            data_state=plain(data_state, "data_state"),
            metrics=finite_metrics(metrics),
            code=self._code,
            devices=describe_devices(leaves.values()),
            tree=describe(leaves),
        )
        self._make_room(step)
        self._check_space(step, sum(x.nbytes for x in leaves.values()))
        # Orbax refuses arrays without elements; the manifest's shape is all there is to know of them.
        stored = {name: x for name, x in leaves.items() if x.size}
        self._guarded(step, lambda: self._checkpointer.save(self._path(step), args=_Save(stored)))
        self._last_saved = step
        return True

    def wait(self) -> None:
        """Returns once nothing is being written and old checkpoints are gone; CheckpointError if the save failed."""
        self._guarded(self._last_saved, self._checkpointer.wait_until_finished)
        if self._last_saved is not None:
            # We have just computed its checksums: no need to read it all again.
            self._sound.add(self._path(self._last_saved))
        if jax.process_index() == 0:
            self._prune()
        _all_agree(True)  # No process lists the steps while old ones are going.

    def close(self) -> None:
        """Waits as `wait` does and gives up the right to write. The store is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._lock is not None:
                os.close(self._lock)

    def _acquire(self) -> bool:
        """Takes the lock of the directory. The kernel gives it back when this process ends, however it ends."""
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A record lock, which a forked child does not inherit: a loader worker that outlives us holds nothing.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise CheckpointError(f"cannot lock {self._directory / _LOCK_FILE}: {error}") from error
        self._lock = lock
        return True

    def _guarded(self, step: int | None, operation: Callable[[], None]) -> None:
        """Runs an operation of Orbax; what fails becomes a CheckpointError that says what is still there."""
        try:
            operation()
        # TensorStore reports I/O errors as ValueError, Orbax a lost barrier as RuntimeError or TimeoutError.
        except (OSError, ValueError, RuntimeError) as error:
            self._last_saved = None
            if jax.process_index() == 0:
                self._clean(_PARTIAL)
            full = "No space left" in str(error) or "Disk quota exceeded" in str(error)
            cause = f"no space is left for {self._directory}" if full else f"{type(error).__name__}: {_brief(error)}"
            raise self._not_saved(step, cause) from error

    def _not_saved(self, step: int | None, cause: str) -> CheckpointError:
        last = max(self.list_steps(), default=None)
        left = "there is no earlier one" if last is None else f"the last complete one, of step {last}, is intact"
        return CheckpointError(f"checkpoint of step {step} was not saved: {cause}; {left}")

    def _check_space(self, step: int, size: int) -> None:
        """Refuses a save of `size` bytes that cannot fit: a disk filled to the brim would stop more than the save."""
        free = shutil.disk_usage(self._directory).free if jax.process_index() == 0 else size
        if not _all_agree(size <= free):
            raise self._not_saved(step, f"{size / 1e6:.1f} MB are needed in {self._directory}, and less is free")

    def _make_room(self, step: int) -> None:
        """Sets a torn directory of the same step aside; refuses to write over a complete one."""
        path = self._path(step)
        taken = False
        if jax.process_index() == 0 and path.exists():
            taken = self._open(path) is not None
            if not taken:
                path.rename(path.with_name(f"{path.name}.torn.{time.time_ns()}"))
        if not _all_agree(not taken):
            raise ValueError(
                f"{path} already holds a complete checkpoint of step {step}; resume from it, "
                "or set checkpoint.directory"
            )
        self._torn.pop(path, None)
        self._sound.discard(path)
        self._noted.discard(path)

    def _prune(self) -> None:
        """Deletes all but the newest and the best, and torn ones that a newer complete one has replaced."""
        complete = self._complete()
        if not complete:
            return
        ranked = sorted((c for c in complete if _loss(c) is not None), key=_loss)
        kept = {c.path for c in complete[: self._config.keep]} | {c.path for c in ranked[: self._config.keep_best]}
        newest = complete[0].step
        # The newer checkpoint's rename must be on disk before an older one goes.
        sync_directory(self._directory)
        for step, path in self._step_directories():
            if path in kept or step > newest:
                continue
            # Under another name first: a deletion cut short must not look like a torn checkpoint.
            self._remove(path, rename=True)
        self._clean(_ASIDE)

    def _clean(self, pattern: re.Pattern[str]) -> None:
        for path in sorted(self._directory.iterdir()):
            if pattern.fullmatch(path.name):
                self._remove(path, rename=False)

    def _remove(self, path: Path, *, rename: bool) -> None:
        try:
            if rename:
                path = path.rename(path.with_name(f"{path.name}.deleted"))
            shutil.rmtree(path)
        except OSError as error:
            self._on_note(f"could not delete {path}: {error}")


def _loss(checkpoint: Checkpoint) -> float | None:
    return checkpoint.manifest.metrics.get(BEST_METRIC)


def _all_agree(value: bool) -> bool:
    """Whether `value` holds on every process. Collective."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def _check_savable(leaves: Mapping[str, Any]) -> None:
    for name, x in leaves.items():
        if not isinstance(x, jax.Array):
            raise ValueError(f"state leaf {name} is a {type(x).__name__}; a checkpoint holds jax.Array leaves only")
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            raise ValueError(f"state leaf {name} has dtype {x.dtype}; save jax.random.key_data of it")


def _placed(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore as, with a sharding. Raises ValueError for one that cannot divide the shape."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"{name} of shape {leaf.shape} cannot be restored as {sharding}: {error}") from error
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(
    checkpoint: Checkpoint, prefix: str, wanted: Mapping[str, jax.ShapeDtypeStruct], *, cast: bool
) -> None:
    """Raises ValueError unless the checkpoint holds, below `prefix`, just the leaves wanted, in their shapes."""
    tree = checkpoint.manifest.tree
    held = [name for name in tree if not prefix or name == prefix or name.startswith(f"{prefix}/")]
    missing = [name for name in wanted if name not in tree]
    extra = [name for name in held if name not in wanted]
    misshapen = [
        f"{name}: {tree[name].dtype}{list(tree[name].shape)} in the checkpoint, {x.dtype}{list(x.shape)} in this run"
        for name, x in wanted.items()
        if name in tree and (tree[name].shape != tuple(x.shape) or not (cast or tree[name].dtype == str(x.dtype)))
    ]
    kinds = {
        "leaves missing from the checkpoint": missing,
        "leaves the checkpoint has besides": extra,
        "leaves of another shape or dtype": misshapen,
    }
    if missing or extra or misshapen:
        differing = "\n".join(_lines(kind, names) for kind, names in kinds.items() if names)
        raise ValueError(f"checkpoint {checkpoint.path} does not fit this run's state\n{differing}")


def _read(path: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays by name, in the shapes, dtypes and shardings of `wanted`, whose names must be in the checkpoint."""
    empty = {name: jnp.zeros(x.shape, x.dtype, device=x.sharding) for name, x in wanted.items() if not x.size}
    stored = {name: x for name, x in wanted.items() if x.size}
    if not stored:
        return empty
    placed = {name: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=x.sharding) for name, x in stored.items()}
    checkpointer = ocp.Checkpointer(_Handler(checksum=False), atomicity_options=_ATOMICITY)
    try:
        arrays = checkpointer.restore(path, args=_Restore(item=stored, restore_args=placed, partial_restore=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
    finally:
        checkpointer.close()
    return {**arrays, **empty}


def _lines(what: str, items: list[str]) -> str:
    shown = [f"  {item}" for item in items[:_LISTED]]
    more = [f"  and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return "\n".join([f"{what}:", *shown, *more])


def _brief(error: Exception) -> str:
    """First line of an error: TensorStore appends its whole specification."""
    return str(error).split("\n", 1)[0][:400]
