"""The ledger: which examples each step of a run took, in which order.

    ledger/step_00000000_rank_0000_of_0001.ledger

Contents depend only on the seed and the place in the plan, so this is all it takes to run again
with the same examples. A file is a header and then one record a step: for each of the rank's
examples 4 bytes of position and 1 of attempt (0: the plan's own chain; n: its n-th replacement),
and a checksum of 4 bytes over all records up to this one. Files are only ever appended to. A run
that resumes follows what its ledger holds beyond the checkpoint, and goes on writing after that; a
new file begins where the number of ranks has changed.
"""

import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

MAGIC = b"TWFLEDG1"
HEADER = struct.Struct("<8sIIIQQQI")  # magic, then Head, then a checksum
ENTRY = struct.Struct("<IB")
CHECK = struct.Struct("<I")
MAX_BATCH = 1 << 20
SYNC_SECONDS = 30.0  # a power failure may cost this much of it; a killed process costs nothing
MAXIMUM = 1 << 30  # bytes of a file that are read at most


class LedgerError(ValueError):
    """A ledger that cannot be used; the message begins with its path."""


@dataclass(frozen=True)
class Head:
    """What a file of the ledger is about."""

    rank: int
    world: int
    batch_size: int  # examples a step of this rank
    step: int  # steps before the first record
    base: int  # positions count from here
    plan: int  # the plan's fingerprint

    def pack(self) -> bytes:
        """The bytes that a file begins with."""
        numbers = (self.rank, self.world, self.batch_size, self.step, self.base, self.plan)
        body = HEADER.pack(MAGIC, *numbers, 0)[: -CHECK.size]
        return body + CHECK.pack(zlib.crc32(body))

    @property
    def name(self) -> str:
        """Of its file."""
        return f"step_{self.step:08d}_rank_{self.rank:04d}_of_{self.world:04d}.ledger"

    @property
    def record(self) -> int:
        """Bytes of a step."""
        return ENTRY.size * self.batch_size + CHECK.size


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of a ledger, by row."""

    step: int  # steps before the first row
    positions: Int[np.ndarray, "steps examples"]
    attempts: Int[np.ndarray, "steps examples"]

    def after(self, step: int) -> "Steps":
        """Without the steps up to this one."""
        skip = max(step - self.step, 0)
        return Steps(max(step, self.step), self.positions[skip:], self.attempts[skip:])

    def before(self, step: int) -> "Steps":
        """Without the steps after this one."""
        count = max(step - self.step, 0)
        return Steps(self.step, self.positions[:count], self.attempts[:count])

    @property
    def last(self) -> int:
        """The last step, counted from 1."""
        return self.step + len(self.positions)


class Ledger:
    """One rank's record of a run, in memory and, with a path, in its file."""

    def __init__(self, head: Head, path: Path | None) -> None:
        self.head = head
        self._file = -1
        self._synced = time.monotonic()
        self._rows: list[bytes] = []
        self._check = _checksum(head, [])
        if path is not None:
            self._open(path)

    def append(self, step: int, entries: Sequence[tuple[int, int]]) -> None:
        """(position, attempt) of each example of a step; the same again changes nothing.

        They are with the operating system when this returns: killing the process loses nothing.
        """
        row = b"".join(ENTRY.pack(p - self.head.base, a) for p, a in entries)
        place = step - 1 - self.head.step
        if place < len(self._rows):
            if self._rows[place] == row:
                return
            self._cut(place)
        self._rows.append(row)
        self._check = zlib.crc32(row, self._check)
        if self._file >= 0:
            os.write(self._file, row + CHECK.pack(self._check))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def read(self, step: int) -> list[tuple[int, int]]:
        """(position, attempt) of the examples of an earlier step."""
        place = step - 1 - self.head.step
        if not 0 <= place < len(self._rows):
            raise LedgerError(f"{self.head.name}: nothing is written of step {step}")
        return [(p + self.head.base, a) for p, a in ENTRY.iter_unpack(self._rows[place])]

    def after(self, step: int) -> Steps:
        """What it holds beyond a step."""
        return _steps(self.head, self._rows).after(step)

    def close(self) -> None:
        """Give up the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(self.head.pack())
            temporary.replace(path)
        _, self._rows = read_file(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._cut(len(self._rows))  # a last record may have been cut short by a kill

    def _cut(self, rows: int) -> None:
        """Keep this many steps."""
        del self._rows[rows:]
        self._check = _checksum(self.head, self._rows)
        if self._file >= 0:
            os.ftruncate(self._file, HEADER.size + rows * self.head.record)


def continue_ledger(head: Head, folder: Path | None) -> Ledger:
    """The ledger of a rank at ``head.step``: of a new run, or of one that continues there.

    Files that begin later belong to a continuation that was given up: they are removed.
    """
    if folder is None:
        return Ledger(head, None)
    heads = [read_head(path) for path in sorted(folder.glob("*.ledger"))]
    for old in heads:
        superseded = old.step > head.step or (old.step == head.step and old.world != head.world)
        # each rank its own; the first those of ranks that are no more
        if superseded and (old.rank == head.rank or (head.rank == 0 and old.rank >= head.world)):
            (folder / old.name).unlink(missing_ok=True)
    before = [old for old in heads if old.step <= head.step]
    latest = max((old.step for old in before), default=-1)
    for old in before:
        same = (old.rank, old.world, old.batch_size) == (head.rank, head.world, head.batch_size)
        if old.step == latest and same and old.plan == head.plan:
            ledger = Ledger(old, folder / old.name)
            if ledger.after(0).last >= head.step:
                return ledger
            ledger.close()
    return Ledger(head, folder / head.name)


def read_ledger(folder: Path) -> tuple[int, Steps]:
    """(the plan's fingerprint, all steps of a run over all ranks), rank by rank in each step."""
    files = [read_file(path) for path in sorted(folder.glob("*.ledger"))]
    if not files:
        raise LedgerError(f"{folder}: no ledger here (files named step_*.ledger)")
    parts: list[Steps] = []
    starts = sorted({head.step for head, _ in files})
    for start in starts:
        group = sorted((h.rank, h.world, _steps(h, rows)) for h, rows in files if h.step == start)
        if [rank for rank, _, _ in group] != list(range(group[0][1])):
            raise LedgerError(f"{folder}: files of some ranks are missing from step {start} on")
        found = [steps for _, _, steps in group]
        length = min(len(steps.positions) for steps in found)
        if parts and parts[-1].last < start:
            raise LedgerError(f"{folder}: steps {parts[-1].last + 1} to {start} are missing")
        if parts:
            parts[-1] = parts[-1].before(start)
        positions = np.concatenate([steps.positions[:length] for steps in found], axis=1)
        attempts = np.concatenate([steps.attempts[:length] for steps in found], axis=1)
        parts.append(Steps(start, positions, attempts))
    if len({part.positions.shape[1] for part in parts}) > 1:
        raise LedgerError(f"{folder}: the number of examples a step changes")
    positions = np.concatenate([part.positions for part in parts])
    attempts = np.concatenate([part.attempts for part in parts])
    return files[0][0].plan, Steps(parts[0].step, positions, attempts)


def read_head(path: Path) -> Head:
    """What a file is about."""
    with path.open("rb") as file:
        return _unpack_head(path, file.read(HEADER.size))


def read_file(path: Path) -> tuple[Head, list[bytes]]:
    """A file's head and records, up to the first that is incomplete or does not check."""
    if path.stat().st_size > MAXIMUM:
        raise LedgerError(f"{path}: larger than {MAXIMUM >> 20} MiB")
    data = path.read_bytes()
    head = _unpack_head(path, data)
    rows: list[bytes] = []
    check = zlib.crc32(head.pack())
    for start in range(HEADER.size, len(data) - head.record + 1, head.record):
        row = data[start : start + head.record - CHECK.size]
        check = zlib.crc32(row, check)
        if CHECK.pack(check) != data[start + len(row) : start + head.record]:
            if start + head.record < len(data):  # not the last: never the work of a kill
                raise LedgerError(
                    f"{path}: step {head.step + len(rows) + 1} is damaged; the run can continue "
                    "without this file, but not be replayed"
                )
            break
        rows.append(row)
    return head, rows


def _unpack_head(path: Path, data: bytes) -> Head:
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise LedgerError(f"{path}: not a ledger of twinfold")
    head = Head(*HEADER.unpack(data[: HEADER.size])[1:-1])
    if head.pack() != data[: HEADER.size] or not 0 <= head.rank < head.world:
        raise LedgerError(f"{path}: its header is damaged")
    if not 0 < head.batch_size <= MAX_BATCH:
        raise LedgerError(f"{path}: {head.batch_size} examples a step")
    return head


def _steps(head: Head, rows: Sequence[bytes]) -> Steps:
    entries = np.frombuffer(b"".join(rows), [("position", "<u4"), ("attempt", "u1")])
    entries = entries.reshape(len(rows), head.batch_size)
    positions = entries["position"].astype(np.int64) + head.base
    return Steps(head.step, positions, entries["attempt"].astype(np.int64))


def _checksum(head: Head, rows: Sequence[bytes]) -> int:
    return zlib.crc32(b"".join(rows), zlib.crc32(head.pack()))
