"""Read multiple sequence alignments (A3M, Stockholm)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16


@dataclass(frozen=True, slots=True, eq=False)
class Msa:
    """Aligned rows in the 22 codes of ``foldcore.constants``; row 0 is the query."""

    rows: UInt8[np.ndarray, "s r"]
    deletions: UInt16[np.ndarray, "s r"]  # residues deleted to the left of the column
    names: tuple[str, ...]
    left_out: int  # rows beyond ``max_rows``
    path: str


def parse_a3m(text: str, path: str | Path, max_rows: int | None = None) -> Msa:
    """Parse A3M text; ``path`` is named in errors."""
    raise NotImplementedError


def parse_stockholm(text: str, path: str | Path, max_rows: int | None = None) -> Msa:
    """Parse Stockholm text; ``path`` is named in errors."""
    raise NotImplementedError


def read_msa(path: str | Path, max_rows: int | None = None, data: bytes | None = None) -> Msa:
    """Read ``.a3m`` or ``.sto`` (also gzipped); ``data`` stands in for the file's bytes."""
    raise NotImplementedError


def merge(msas: Sequence[Msa], query: str) -> Msa:
    """Query row, then all rows in order without repeats."""
    raise NotImplementedError
