"""Read template hits as written by HHsearch and HHblits (.hhr)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from foldcore.data.files import read_text
from foldcore.errors import DataError

_NAME = re.compile(r"([0-9A-Za-z]{4})_([0-9A-Za-z]+)(?:\s|$)")
_SCORE = re.compile(r"(Probab|E-value|Aligned_cols|Sum_probs)=(\S+)")
# One line of a pairwise block: whose, name, first residue, letters, last residue, length.
_ROW = re.compile(r"([QT]) (\S.*?)\s+(\d{1,9}) ([A-Za-z-]+)\s+(\d{1,9}) \(\d+\)\s*")
# Lines of a block that are not the sequences themselves.
_ANNOTATIONS = {"Consensus", "ss_pred", "ss_dssp", "ss_conf", "sa_dssp"}


@dataclass(frozen=True, slots=True, eq=False)
class TemplateHit:
    """One pairwise alignment of the query with a database sequence; columns ``a``."""

    index: int  # rank in the file, from 1
    name: str  # whole description line
    pdb_id: str  # lower case; "" where the name is not <pdb id>_<chain>
    chain_id: str
    aligned_cols: int
    sum_probs: float
    probability: float  # percent
    e_value: float
    query: str  # aligned, "-" = gap
    hit_sequence: str
    indices_query: Int32[np.ndarray, " a"]  # 0-based position in the query, -1 at a gap
    indices_hit: Int32[np.ndarray, " a"]


def read_hhr(path: str | Path, data: bytes | None = None) -> list[TemplateHit]:
    """Read ``.hhr`` (also gzipped); ``data`` stands in for its bytes."""
    return parse_hhr(read_text(path, data), path)


def parse_hhr(text: str, path: str | Path) -> list[TemplateHit]:
    """All hits, in the file's order; a file without hits gives an empty list."""
    lines = text.split("\n")
    if not lines[0].startswith("Query "):
        raise DataError(path, 1, "not an hhr file: it must start with 'Query'")
    starts = [i for i, line in enumerate(lines) if re.match(r"No \d{1,9}\s*$", line)]
    if not starts and (listed := _first_listed(lines)):
        raise DataError(path, listed, "a hit is listed, but no alignment follows: truncated")
    ends = [*starts[1:], len(lines)] if starts else []
    return [_hit(lines[a:b], a + 1, path) for a, b in zip(starts, ends, strict=True)]


def _first_listed(lines: Sequence[str]) -> int:
    """Line number of the first row in the table of hits, or 0."""
    table = next((i for i, line in enumerate(lines) if line.startswith(" No Hit")), len(lines))
    rows = (i + 1 for i, line in enumerate(lines) if i > table and re.match(r"\s*\d+ \S", line))
    return next(rows, 0)


def _hit(lines: Sequence[str], number: int, path: str | Path) -> TemplateHit:
    """The hit in ``lines``, the first of which is line ``number`` of the file."""
    if len(lines) < 3 or not lines[1].startswith(">"):
        raise DataError(path, number, "a hit without its name and scores: truncated")
    name = lines[1][1:].strip()
    found = _NAME.match(name)
    scores = _scores(lines[2], number + 2, path)
    query, indices_query = _join(_rows(lines, "Q", number), path)
    hit_sequence, indices_hit = _join(_rows(lines, "T", number), path)
    _check(query, hit_sequence, int(scores["Aligned_cols"]), number, path)
    return TemplateHit(
        index=int(lines[0].split()[1]),
        name=name,
        pdb_id=found[1].lower() if found else "",
        chain_id=found[2] if found else "",
        aligned_cols=int(scores["Aligned_cols"]),
        sum_probs=scores["Sum_probs"],
        probability=scores["Probab"],
        e_value=scores["E-value"],
        query=query,
        hit_sequence=hit_sequence,
        indices_query=indices_query,
        indices_hit=indices_hit,
    )


def _scores(line: str, number: int, path: str | Path) -> dict[str, float]:
    try:
        scores = {key: float(value) for key, value in _SCORE.findall(line)}
    except ValueError:
        raise DataError(path, number, f"a score is not a number: {line[:80]!r}") from None
    missing = {"Probab", "E-value", "Aligned_cols", "Sum_probs"} - scores.keys()
    if missing or not np.isfinite(list(scores.values())).all():
        raise DataError(path, number, f"scores are missing or not finite: {line[:80]!r}")
    return scores


def _rows(lines: Sequence[str], side: str, number: int) -> Iterator[tuple[int, int, str, int]]:
    """(line number, first residue, letters, last residue) of each line of one side."""
    for offset, line in enumerate(lines):
        match = _ROW.fullmatch(line)
        if match and match[1] == side and match[2] not in _ANNOTATIONS:
            yield number + offset, int(match[3]), match[4], int(match[5])


def _join(
    rows: Iterator[tuple[int, int, str, int]], path: str | Path
) -> tuple[str, Int32[np.ndarray, " a"]]:
    """Aligned letters of all blocks, and the 0-based residue of each, -1 at a gap."""
    sequence, indices = "", []
    expected: int | None = None
    for number, first, letters, last in rows:
        is_residue = np.array(list(letters)) != "-"
        count = int(is_residue.sum())
        if first + count - 1 != last or first < 1 or expected not in (None, first):
            reason = f"residues {first}..{last} do not fit the letters or the lines before"
            raise DataError(path, number, reason)
        indices.append(np.where(is_residue, first - 2 + np.cumsum(is_residue), -1))
        sequence, expected = sequence + letters.upper(), last + 1
    joined = np.concatenate(indices) if indices else np.zeros(0)
    return sequence, joined.astype(np.int32)


def _check(query: str, hit: str, aligned_cols: int, number: int, path: str | Path) -> None:
    if len(query) != len(hit):
        reason = f"{len(query)} aligned letters of the query, {len(hit)} of the hit: truncated?"
        raise DataError(path, number, reason)
    both = sum(q != "-" and h != "-" for q, h in zip(query, hit, strict=True))
    if both != aligned_cols or not both:
        raise DataError(
            path, number, f"{both} aligned columns, {aligned_cols} announced: truncated?"
        )
