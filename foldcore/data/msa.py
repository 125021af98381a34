"""Read multiple sequence alignments: A3M and Stockholm (HHblits, JackHMMER, MMseqs2).

The query is row 0 and defines the columns. A residue that another row has between two columns is no
column of its own: it counts in ``deletions`` of the next column.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16

from foldcore import constants
from foldcore.data.files import read_text
from foldcore.errors import DataError

# Row 0 may differ from the query where modified residues got another parent, and no further.
MIN_QUERY_IDENTITY = 0.9
MAX_DELETIONS = np.iinfo(
    np.uint16
).max  # longer insertions count as this; the features saturate far below

_CHUNK = 1024  # rows decoded at a time, which bounds the memory
_INSERTED, _IGNORED, _ILLEGAL = 253, 254, 255  # classes of characters beside the 22 codes
# Records of HH-suite that describe the query's structure and are no sequences.
_ANNOTATIONS = {"ss_dssp", "sa_dssp", "aa_dssp", "ss_pred", "aa_pred", "ss_conf"}


@dataclass(frozen=True, slots=True, eq=False)
class Msa:
    """Aligned rows in the 22 codes of ``foldcore.constants``; row 0 is the query."""

    rows: UInt8[np.ndarray, "s r"]
    deletions: UInt16[np.ndarray, "s r"]  # residues deleted to the left of the column
    names: tuple[str, ...]
    left_out: int  # rows beyond ``max_rows``
    path: str


def _classes(lower_inserts: bool, gaps: str) -> UInt8[np.ndarray, " 256"]:
    table = np.full(256, _ILLEGAL, np.uint8)
    for letter, code in constants.letter_to_msa_code.items():
        table[ord(letter)] = code
        if letter.isalpha():
            table[ord(letter.lower())] = _INSERTED if lower_inserts else code
    table[[ord(gap) for gap in gaps]] = constants.gap_code
    return table


_A3M_CLASSES = _classes(lower_inserts=True, gaps="-")
_A3M_CLASSES[ord(".")] = _IGNORED  # A2M's gap opposite an insertion
_STOCKHOLM_CLASSES = _classes(lower_inserts=False, gaps="-._~")


def read_msa(path: str | Path, max_rows: int | None = None, data: bytes | None = None) -> Msa:
    """Read ``.a3m`` or ``.sto`` (also gzipped); ``data`` stands in for its bytes."""
    suffix = Path(path).name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix not in ("a3m", "sto", "stk"):
        raise DataError(path, None, "unknown kind of file: .a3m or .sto expected, maybe .gz")
    parse = parse_a3m if suffix == "a3m" else parse_stockholm
    return parse(read_text(path, data), path, max_rows)


def merge(msas: Sequence[Msa], query: str) -> Msa:
    """Query row, then all rows in order without repeats; letters of ``query`` as in a chain."""
    codes = np.array([constants.letter_to_msa_code[letter] for letter in query], np.uint8)
    for msa in msas:
        _check_query(msa, codes)
    rows = np.concatenate([codes[None], *(msa.rows for msa in msas)])
    deletions = np.concatenate(
        [np.zeros_like(codes[None], np.uint16), *(m.deletions for m in msas)]
    )
    names = ["query", *(name for msa in msas for name in msa.names)]
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.tobytes(), index)
    kept = list(first.values())
    return Msa(
        rows=rows[kept],
        deletions=deletions[kept],
        names=tuple(names[index] for index in kept),
        left_out=sum(msa.left_out for msa in msas),
        path=msas[0].path if msas else "",
    )


def _check_query(msa: Msa, query: UInt8[np.ndarray, " r"]) -> None:
    if msa.rows.shape[1] != len(query):
        reason = (
            f"its first row has {msa.rows.shape[1]} columns, but the query {len(query)} residues"
        )
        raise DataError(msa.path, None, reason)
    known = (query != constants.unknown_restype) & (msa.rows[0] != constants.unknown_restype)
    same = int((known & (msa.rows[0] == query)).sum())
    if same < MIN_QUERY_IDENTITY * known.sum():
        reason = f"an alignment of another sequence: {same} of {int(known.sum())} residues agree"
        raise DataError(msa.path, None, reason)


def parse_a3m(text: str, path: str | Path, max_rows: int | None = None) -> Msa:
    """Parse A3M text; ``path`` is named in errors."""
    preamble, *parts = ("\n" + text).split("\n>")
    for number, line in enumerate(preamble.split("\n")):
        if line.strip() and not line.startswith("#"):
            raise DataError(path, number, "expected a record that starts with '>'")
    records = list(_a3m_records(parts, preamble.count("\n") + 1, path))
    if not records:
        raise DataError(path, None, "no records")
    kept = records[:max_rows]
    rows, deletions = _decode_a3m(kept, path)
    names = tuple(name for _, name, _ in kept)
    return Msa(rows, deletions, names, len(records) - len(kept), str(path))


def _a3m_records(
    parts: Sequence[str], line: int, path: str | Path
) -> Iterator[tuple[int, str, str]]:
    """(line of the name, name, sequence text) of each record."""
    for part in parts:
        name, _, body = part.partition("\n")
        word = name.partition(" ")[0]
        if word not in _ANNOTATIONS:
            if not body or body.isspace():
                raise DataError(path, line, f"record {word!r} has no sequence")
            yield line, word, body
        line += 1 + part.count("\n")


def _decode_a3m(
    records: Sequence[tuple[int, str, str]], path: str | Path
) -> tuple[UInt8[np.ndarray, "s r"], UInt16[np.ndarray, "s r"]]:
    rows, deletions = [], []
    width = 0  # columns of the query, known after the first chunk's first row
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        sequences = ["".join(body.split()).encode() for _, _, body in chunk]
        ends = np.cumsum([len(sequence) for sequence in sequences])
        starts = ends - [len(sequence) for sequence in sequences]
        classes = _A3M_CLASSES[np.frombuffer(b"".join(sequences), np.uint8)]
        if (classes == _ILLEGAL).any():
            raise _illegal_a3m(chunk, path)
        columns = _running_count(classes < constants.num_msa_codes)
        lengths = columns[ends] - columns[starts]
        width = width or int(lengths[0])
        _check_lengths(lengths, width, chunk, path)
        at = np.flatnonzero(classes < constants.num_msa_codes).reshape(-1, width)
        inserted = _running_count(classes == _INSERTED)
        rows.append(classes[at])
        deletions.append(_differences(inserted[at], inserted[starts]))
    return np.concatenate(rows), np.concatenate(deletions)


def _running_count(marks: np.ndarray) -> np.ndarray:
    """Marks before each place, and before the end."""
    return np.concatenate([[0], np.cumsum(marks, dtype=np.int32)])


def _differences(counts: np.ndarray, start: np.ndarray) -> UInt16[np.ndarray, "s r"]:
    steps = np.diff(counts, axis=1, prepend=start[:, None])
    return np.minimum(steps, MAX_DELETIONS).astype(np.uint16)


def _check_lengths(
    lengths: np.ndarray, width: int, chunk: Sequence[tuple[int, str, str]], path: str | Path
) -> None:
    if width == 0:
        raise DataError(path, chunk[0][0], "the query has no columns")
    wrong = np.flatnonzero(lengths != width)
    if wrong.size:
        line, name, _ = chunk[wrong[0]]
        reason = f"ragged: {name!r} has {lengths[wrong[0]]} columns, the query {width}"
        raise DataError(path, line, reason)


def _illegal_a3m(chunk: Sequence[tuple[int, str, str]], path: str | Path) -> DataError:
    for line, _, body in chunk:
        for offset, text in enumerate(body.split("\n"), start=1):
            if match := re.search(r"[^A-Za-z.\-\s]", text):
                return DataError(path, line + offset, f"illegal character {match[0]!r}")
    raise AssertionError("called without an illegal character")


def parse_stockholm(text: str, path: str | Path, max_rows: int | None = None) -> Msa:
    """Parse Stockholm text, blocks interleaved or not; ``path`` is named in errors."""
    pieces, lines = _stockholm_rows(text.rstrip().split("\n"), path, max_rows)
    if not any(pieces.values()):
        raise DataError(path, None, "no records")
    kept = {name: "".join(row).encode() for name, row in pieces.items() if row}
    names = tuple(kept)
    width = len(kept[names[0]])
    for name, row in kept.items():
        if len(row) != width:
            reason = f"ragged: {name!r} has {len(row)} columns, the query {width}"
            raise DataError(path, lines[name], reason)
    rows, deletions = _decode_stockholm(list(kept.values()), [lines[n] for n in names], path)
    return Msa(rows, deletions, names, len(pieces) - len(kept), str(path))


def _stockholm_rows(
    lines: Sequence[str], path: str | Path, max_rows: int | None
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Pieces of each row (none beyond ``max_rows``), and the last line of each."""
    if not lines[0].startswith("# STOCKHOLM"):
        raise DataError(path, 1, "not a Stockholm file: '# STOCKHOLM 1.0' expected")
    pieces: dict[str, list[str]] = {}
    where: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.startswith("//"):
            return pieces, where
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2:
            raise DataError(path, number, f"expected a name and a sequence, got {line[:60]!r}")
        known = pieces.setdefault(fields[0], [])
        if known or max_rows is None or len(pieces) <= max_rows:
            known.append(fields[1])
            where[fields[0]] = number
    raise DataError(path, len(lines), "no // at the end: truncated")


def _decode_stockholm(
    sequences: Sequence[bytes], lines: Sequence[int], path: str | Path
) -> tuple[UInt8[np.ndarray, "s r"], UInt16[np.ndarray, "s r"]]:
    rows, deletions = [], []
    is_column = _STOCKHOLM_CLASSES[np.frombuffer(sequences[0], np.uint8)] != constants.gap_code
    if not is_column.any():
        raise DataError(path, lines[0], "the query has no residues")
    for start in range(0, len(sequences), _CHUNK):
        chunk = sequences[start : start + _CHUNK]
        letters = np.frombuffer(b"".join(chunk), np.uint8).reshape(len(chunk), -1)
        classes = _STOCKHOLM_CLASSES[letters]
        if (illegal := np.argwhere(classes == _ILLEGAL)).size:
            row, column = illegal[0]
            reason = f"illegal character {chr(letters[row, column])!r}"
            raise DataError(path, lines[start + row], reason)
        inserted = (classes != constants.gap_code) & ~is_column
        counts = np.cumsum(inserted, axis=1, dtype=np.int32)[:, is_column]
        rows.append(classes[:, is_column])
        deletions.append(_differences(counts, np.zeros(len(chunk), np.int32)))
    return np.concatenate(rows), np.concatenate(deletions)
