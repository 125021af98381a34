"""The work of preparing a store: one task packs some entries, or some alignments, into one file.

A task is a pure function of its inputs, run in any process on any machine that sees the inputs and
the store's folder. Its file appears whole under its final name, so a file that is there is finished
work. What could not be packed is in the file's notes.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16

from foldcore import constants
from foldcore.data.codec import encode, encode_sparse, encode_text
from foldcore.data.hhr import read_hhr
from foldcore.data.hits import dump_hits, pack_hits
from foldcore.data.inventory import Input, alignment_inputs
from foldcore.data.join import UNREADABLE
from foldcore.data.mmcif import Chain, Structure, read_structure
from foldcore.data.msa import Msa, merge, read_msa
from foldcore.data.report import Reject
from foldcore.data.scan import entity_ids
from foldcore.data.shards import write_rows
from foldcore.data.store import ALIGNMENTS
from foldcore.data.structures import CHAIN_TEXT, STRUCTURES, Structures, text_checksum
from foldcore.errors import DataError

UNREADABLE_ALIGNMENT = "unreadable alignment"
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class StructureTask:
    """Entries to parse."""

    part: str  # the file to write
    entries: tuple[tuple[str, Input], ...]
    with_entities: bool  # a table of clusters names chains by entity

    @property
    def units(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class AlignmentTask:
    """Alignments to parse, each for one query sequence, and their template hits to resolve."""

    part: str
    store: str  # folder with the packed structures
    alignments: tuple[tuple[str, str, tuple[Input, ...]], ...]  # key, sequence, files
    max_rows: int  # of one file

    @property
    def units(self) -> int:
        return len(self.alignments)


def pack_structures(task: StructureTask) -> None:
    """Parse the task's entries; a row for every protein chain."""
    rows: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    started = time.process_time()
    for entry, file in _with_progress(task.part, task.entries):
        try:
            data = file.read()
            structure = read_structure(file.label, data)
            entities = entity_ids(file.label, entry, data) if task.with_entities else {}
        except Exception as error:  # one bad file must not end the work on all others
            rejects.append(_reject(error, file.label, entry, UNREADABLE))
            continue
        entries.append(_describe(entry, structure, len(rows), entities))
        rows += [_chain_row(chain) for chain in structure.chains.values()]
    notes = {"entries": entries, "rejects": [asdict(reject) for reject in rejects]}
    write_rows(Path(task.part), STRUCTURES, rows, notes | _effort(started, task.units))


def pack_alignments(task: AlignmentTask) -> None:
    """Merge the task's alignments and resolve their hits; a row for each that can be used."""
    rows: list[dict[str, Any]] = []
    keys: list[str] = []
    rejects: list[Reject] = []
    started = time.process_time()
    get_chain = _opened(task.store).template
    for key, sequence, files in _with_progress(task.part, task.alignments):
        try:
            rows.append(_alignment_row(sequence, files, task.max_rows, get_chain))
            keys.append(key)
        except Exception as error:
            rejects.append(_reject(error, files[0].label, key, UNREADABLE_ALIGNMENT))
    notes = {"keys": keys, "rejects": [asdict(reject) for reject in rejects]}
    write_rows(Path(task.part), ALIGNMENTS, rows, notes | _effort(started, task.units))


@lru_cache(maxsize=1)
def _opened(store: str) -> Structures:
    return Structures(Path(store))


def _describe(
    entry: str, structure: Structure, row: int, entities: dict[str, str]
) -> dict[str, Any]:
    return {
        "entry": entry,
        "pdb_id": structure.pdb_id,
        "resolution": structure.resolution,
        "release_date": structure.release_date,
        "method": structure.method,
        "warnings": list(structure.warnings),
        "path": structure.path,
        "row": row,
        "count": len(structure.chains),
        "entities": [entities.get(chain, "") for chain in structure.chains],
    }


def _chain_row(chain: Chain) -> dict[str, Any]:
    """Text as it is, arrays as blobs; those of atoms are packed under the atoms' mask."""
    row: dict[str, Any] = {}
    for field in fields(Chain):
        value = getattr(chain, field.name)
        if field.name in CHAIN_TEXT or value is None:
            row[field.name] = value
        else:
            atoms = value.ndim >= 2 and field.name != "mask"
            row[field.name] = encode(value, chain.mask if atoms else None)
    return row | {"checksum": text_checksum(row)}


def _alignment_row(
    sequence: str, files: Sequence[Input], max_rows: int, get_chain: Callable[..., Any]
) -> dict[str, Any]:
    msas, hits = alignment_inputs(files)
    if not msas:
        where = str(Path(files[0].label).parent)
        raise DataError(where, None, "no alignment (.a3m or .sto) in this folder")
    read = [read_msa(file.label, max_rows, file.read()) for file in msas]
    merged = merge(read, sequence)
    rows, deletions, order = _all_rows(merged, read)
    found = [hit for file in hits for hit in read_hhr(file.label, file.read())]
    text, residues = dump_hits(pack_hits(found, sequence, get_chain))
    return {
        "sequence": sequence,
        "msa": encode(rows),
        "deletions": encode_sparse(deletions),
        "num_rows": len(merged.rows),
        "counts": encode(_counts(merged.rows)),
        "order": encode(order),
        "files": encode_text(json.dumps([[len(msa.rows), msa.left_out] for msa in read])),
        "hits": encode_text(text),
        "hit_residues": encode(residues),
    }


def _all_rows(
    merged: Msa, msas: Sequence[Msa]
) -> tuple[UInt8[np.ndarray, "n r"], UInt16[np.ndarray, "n r"], np.ndarray]:
    """The merged rows, then rows that repeat one with other deletions; and the row of each row.

    With these every shorter reading of the files can be merged again, exactly.
    """
    numbers: dict[bytes, int] = {}
    for number, (row, deletion) in enumerate(zip(merged.rows, merged.deletions, strict=True)):
        numbers[row.tobytes() + deletion.tobytes()] = number
    more: list[tuple[np.ndarray, np.ndarray]] = []
    order = []
    for msa in msas:
        for row, deletion in zip(msa.rows, msa.deletions, strict=True):
            number = numbers.setdefault(row.tobytes() + deletion.tobytes(), len(numbers))
            if number == len(merged.rows) + len(more):
                more.append((row, deletion))
            order.append(number)
    rows = np.concatenate([merged.rows, *(row[None] for row, _ in more)])
    deletions = np.concatenate([merged.deletions, *(deletion[None] for _, deletion in more)])
    return rows, deletions, np.array(order, np.int32)


def _counts(rows: UInt8[np.ndarray, "n r"]) -> np.ndarray:
    """How often each code stands in each column, in the smallest type that holds it."""
    count, length = rows.shape
    flat = rows + constants.num_msa_codes * np.arange(length)
    counts = np.bincount(flat.ravel(), minlength=length * constants.num_msa_codes)
    dtype = np.dtype(np.uint8 if count < 2**8 else np.uint16 if count < 2**16 else np.uint32)
    return counts.reshape(length, constants.num_msa_codes).astype(dtype)


def _with_progress(part: str, units: Sequence[Any]) -> Any:
    """The units, while a small file beside the part tells how many are done."""
    said = time.monotonic()
    path = Path(part).with_suffix(".progress")
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, unit in enumerate(units):
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            path.write_text(str(number))
        yield unit


def _effort(started: float, units: int) -> dict[str, Any]:
    return {"seconds": time.process_time() - started, "units": units}


def _reject(error: Exception, label: str, subject: str, rule: str) -> Reject:
    """The file at fault; an error that is no reader's own is told by its kind and its place."""
    if isinstance(error, DataError):
        return Reject(error.path, error.line, subject, rule, error.reason)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return Reject(label, None, subject, rule, f"{type(error).__name__}: {error} ({where})")
