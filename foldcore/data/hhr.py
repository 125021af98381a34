"""Read template hits as written by HHsearch and HHblits (.hhr)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32


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


def parse_hhr(text: str, path: str | Path) -> list[TemplateHit]:
    """All hits, in the file's order; a file without hits gives an empty list."""
    raise NotImplementedError


def read_hhr(path: str | Path, data: bytes | None = None) -> list[TemplateHit]:
    """Read ``.hhr`` (also gzipped); ``data`` stands in for the file's bytes."""
    raise NotImplementedError
