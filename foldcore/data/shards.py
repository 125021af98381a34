"""Arrow files of a packed store: written whole or not at all, read through a memory map.

A file is the Arrow IPC format without compression (its cells are compressed blobs), so that any
Arrow reader opens it. Each read checks what it takes: schema, offsets, numbers of rows.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from foldcore.errors import DataError

SHARD_BYTES = 2 << 30  # a new shard begins beyond this
_NOTES = b"twinfold"  # key of our JSON in a schema's metadata


class Address(NamedTuple):
    """A row of a store: which shard, which of its batches, which row."""

    shard: int
    batch: int
    row: int


class ArrowFile:
    """One Arrow file, mapped into memory; batches are checked when first used."""

    def __init__(self, path: str | Path, schema: pa.Schema) -> None:
        self.path = str(path)
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(self.path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(path, None, f"not a readable Arrow file: {error}") from None
        found = self._reader.schema
        if not found.equals(schema):
            names = ", ".join(found.names)
            raise DataError(path, None, f"other columns than this version writes: {names}")
        self._batches: dict[int, pa.RecordBatch] = {}
        self._cells: dict[tuple[int, str], pa.Array] = {}
        self._columns = schema.names

    @property
    def num_batches(self) -> int:
        """Batches in the file."""
        return int(self._reader.num_record_batches)

    def batch(self, number: int) -> pa.RecordBatch:
        """One batch, with its offsets checked."""
        if number not in self._batches:
            if not 0 <= number < self.num_batches:
                raise DataError(self.path, None, f"no batch {number} of {self.num_batches}")
            try:
                batch = self._reader.get_batch(number)
                batch.validate(full=True)
            except (OSError, pa.ArrowException) as error:
                raise DataError(self.path, None, f"batch {number} is damaged: {error}") from None
            self._batches[number] = batch
        return self._batches[number]

    def cell(self, batch: int, row: int, column: str) -> Any:
        """A cell: text, number or None; bytes come as a buffer into the file."""
        if (cells := self._cells.get((batch, column))) is None:
            cells = self.batch(batch).column(self._columns.index(column))
            self._cells[batch, column] = cells
        if not 0 <= row < len(cells):
            reason = f"no row {row} in batch {batch} of {len(cells)} rows"
            raise DataError(self.path, None, reason)
        value = cells[row]
        return (
            value.as_buffer()
            if type(value) is pa.BinaryScalar and value.is_valid
            else value.as_py()
        )

    def table(self) -> pa.Table:
        """All rows."""
        batches = [self.batch(number) for number in range(self.num_batches)]
        return pa.Table.from_batches(batches, self._reader.schema)

    def notes(self) -> dict[str, Any]:
        """The JSON object that was written with the file."""
        try:
            notes = json.loads((self._reader.schema.metadata or {}).get(_NOTES, b""))
        except (ValueError, RecursionError):
            notes = None
        if not isinstance(notes, dict):
            raise DataError(self.path, None, "its notes are missing or damaged")
        return notes


def write_rows(
    path: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]
) -> None:
    """Write one batch of rows, and the notes that go with it."""
    columns = [pa.array([row[f.name] for row in rows], f.type) for f in schema]
    write_batches(path, schema, [pa.RecordBatch.from_arrays(columns, schema=schema)], notes)


def write_batches(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    notes: Mapping[str, Any],
) -> None:
    """Write a file under another name, force it to the disk, and only then give it its name."""
    described = schema.with_metadata({_NOTES: json.dumps(notes).encode()})
    with atomic(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, described) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(described.metadata))


class atomic:
    """``with atomic(path) as temporary``: what is written there becomes ``path``, or nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        os.chmod(name, 0o644)  # mkstemp keeps others from reading; a store is shared
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)


def merge_parts(
    parts: Sequence[Path], schema: pa.Schema, root: Path, name: str
) -> list[list[Address]]:
    """Copy parts, one batch each, into ``root/name-00000.arrow``, ...; where each row went."""
    addresses: list[list[Address]] = []
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.stat().st_size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.stat().st_size
    for shard, group in enumerate(groups):
        files = (ArrowFile(part, schema).batch(0) for part in group)
        write_batches(shard_path(root, name, shard), schema, files, {"shard": shard})
        merged = ArrowFile(shard_path(root, name, shard), schema)
        for batch in range(merged.num_batches):
            rows = merged.batch(batch).num_rows
            addresses.append([Address(shard, batch, row) for row in range(rows)])
    return addresses


def shard_path(root: Path, name: str, shard: int) -> Path:
    """Where a shard lies."""
    return root / f"{name}-{shard:05d}.arrow"
