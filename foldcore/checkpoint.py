"""One checkpoint format for both tracks: safetensors and JSON, atomic and asynchronous.

    checkpoints/step_00000050/state.safetensors   tensors <section>/<parameter name>, float32
    checkpoints/step_00000050/metadata.json       step, checksum, loader state, config, versions

Sections are the flat buffers of the training state (``params``, ``mu``, ``nu``, ``ema``) cut by the
layout. A checkpoint is written beside its final name, flushed to disk and renamed, so a name that
exists is whole. A checkpoint is a file from outside: nothing is unpickled, and each problem is an
error naming the file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from foldcore.deepmind import read_npz
from foldcore.layout import Layout, LayoutError

FORMAT = "twinfold-checkpoint"
VERSION = 1
SECTIONS = ("params", "mu", "nu", "ema")  # flat buffers of the training state
TENSORS, METADATA = "state.safetensors", "metadata.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message begins with its path."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing, cut short or altered."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory; tensors are named ``<section>/<parameter name>``."""

    path: Path
    step: int
    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)

    def flat(self, section: str, layout: Layout) -> Float32[np.ndarray, " n"]:
        """One section as a flat buffer; names and shapes must be exactly the layout's."""
        prefix = section + "/"
        found = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        try:
            return layout.flatten(found, f"{self.path}: section {section!r}")
        except LayoutError as error:
            raise CheckpointError(str(error)) from None


class CheckpointWriter:
    """Writes checkpoints from a thread, one at a time, and keeps the newest ``keep``.

    A failed write is raised by the next ``save`` or ``wait``. With ``enabled=False`` (every process
    but the first) nothing is written.
    """

    def __init__(self, folder: str | Path, keep: int, enabled: bool = True) -> None:
        self.folder = Path(folder)
        self._keep = keep
        self._enabled = enabled
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        if enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.folder)

    def save(
        self,
        step: int,
        sections: Mapping[str, Float32[np.ndarray, " n"]],
        layout: Layout,
        metadata: Mapping[str, Any],
    ) -> None:
        """Copy the flat buffers and write them in the background; waits for the previous write."""
        self.wait()
        if not self._enabled:
            return
        text = json.dumps(metadata)  # now, so that an unserializable value fails here
        # the copy: the caller's buffers may be reused (donated) by the next step
        copies = {name: np.array(flat, np.float32) for name, flat in sections.items()}
        self._pending = self._thread.submit(self._write, step, copies, layout, json.loads(text))

    def wait(self) -> Path | None:
        """Wait for the write in progress; the path it wrote, or None if there was none."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _write(
        self,
        step: int,
        sections: Mapping[str, np.ndarray],
        layout: Layout,
        metadata: dict[str, Any],
    ) -> Path:
        path = write(self.folder / step_name(step), step, sections, layout, metadata)
        found = list_checkpoints(self.folder)
        # a later step was damaged, else the run would have resumed from it: it is superseded
        later = [old for number, old in found if number > step]
        for old in later + [old for number, old in found if number <= step][self._keep :]:
            _discard(old)
        return path


def write(
    path: Path,
    step: int,
    sections: Mapping[str, np.ndarray],
    layout: Layout,
    metadata: Mapping[str, Any],
) -> Path:
    """Write one checkpoint folder atomically: everything is on disk before the name appears.

    Raises :class:`CheckpointError` where that fails, as on a full disk, and leaves nothing behind.
    """
    temporary = path.parent / f".unfinished-{path.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fill(temporary, step, sections, layout, metadata)
        if path.exists():  # an earlier attempt at the same step: a rename cannot replace a folder
            _discard(path)
        temporary.rename(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{path}: cannot be written: {_reason(error)}; "
            "the same command continues once that is mended"
        ) from error
    return path


def _fill(
    temporary: Path,
    step: int,
    sections: Mapping[str, np.ndarray],
    layout: Layout,
    metadata: Mapping[str, Any],
) -> None:
    """Write the files of a checkpoint into a new folder, and have them on disk."""
    temporary.mkdir(parents=True)
    save_file(
        {f"{s}/{n}": a for s, flat in sections.items() for n, a in layout.unflatten(flat).items()},
        temporary / TENSORS,
    )
    header = {"format": FORMAT, "version": VERSION, "step": step}
    header["sha256"] = _sha256(temporary / TENSORS)
    (temporary / METADATA).write_text(json.dumps({**metadata, **header}, indent=1) + "\n")
    for name in (TENSORS, METADATA, ""):
        _flush(temporary / name)


def _reason(error: OSError | SafetensorError) -> str:
    """Why the system refused, without names of temporary files."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = re.search(r"I/O error: (.*?) \(os error \d+\)", str(error))
    return known[1] if known else str(error)


def read(path: str | Path) -> Checkpoint:
    """Read and verify one checkpoint folder; raises :class:`CheckpointError` naming it."""
    path = Path(path)
    metadata = _read_metadata(path / METADATA)
    try:
        if _sha256(path / TENSORS) != metadata["sha256"]:
            raise DamagedCheckpointError(f"{path / TENSORS}: contents do not match their checksum")
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path / TENSORS}: cannot be read: {error}") from None
    return Checkpoint(path, metadata["step"], tensors, metadata)


def restore(folder: str | Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in ``folder``, or None if there is none.

    A damaged one is reported through ``warn`` and the one before it is used; if every one is
    damaged, or the newest was written in another format, :class:`CheckpointError` says so.
    """
    found = list_checkpoints(folder)
    for _, path in found:
        try:
            return read(path)
        except DamagedCheckpointError as error:
            warn(f"damaged checkpoint: {error}")
    if found:
        raise CheckpointError(
            f"{folder}: all {len(found)} checkpoints are damaged: restore one from a copy, "
            "or delete the folder to start from scratch"
        )
    return None


def read_params(path: str, layout: Layout) -> Float32[np.ndarray, " n"]:
    """Parameters to start from: DeepMind's ``.npz``, or the averaged ones of a checkpoint.

    Of a run folder its newest checkpoint is meant.
    """
    if path.endswith(".npz"):
        return layout.flatten(read_npz(path), path)
    if path.endswith((".pt", ".ckpt", ".safetensors")):
        raise CheckpointError(
            f"{path}: first convert it: python -m parity.params convert {path} params.npz"
        )
    newest = list_checkpoints(Path(path, "checkpoints"))
    if not newest and not Path(path, METADATA).exists():
        raise CheckpointError(f"{path}: no such file, run or checkpoint (train.initial_params)")
    return read(newest[0][1] if newest else path).flat("ema", layout)


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the finished checkpoints in a folder, newest first."""
    found = []
    for path in Path(folder).glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def step_name(step: int) -> str:
    """Folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of twinfold")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {metadata.get('version')!r}, but this program reads {VERSION}"
        )
    if type(metadata.get("step")) is not int or type(metadata.get("sha256")) is not str:
        raise DamagedCheckpointError(f"{path}: no step or no checksum")
    return metadata


def _discard(path: Path) -> None:
    """Remove a checkpoint; being killed half-way leaves no folder that looks finished."""
    temporary = path.parent / f".unfinished-old-{path.name}-{os.getpid()}"
    path.rename(temporary)
    shutil.rmtree(temporary)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(".unfinished-*"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
