"""From template hits to template features (supplement section 1.2.3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from foldcore.data.hhr import TemplateHit
from foldcore.data.mmcif import Chain, Structure

GetChain = Callable[[str, str], tuple[Structure, Chain]]  # (pdb_id, chain_id); raises DataError


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """One template on the residues of the query."""

    name: str  # <pdb id>_<chain>
    aatype: Int32[np.ndarray, " r"]  # 0..19, 20 = X, 21 = not aligned
    positions: Float32[np.ndarray, "r 37 3"]
    mask: Float32[np.ndarray, "r 37"]
    sum_probs: float


@dataclass(frozen=True, slots=True)
class Reject:
    """A hit that is not used, and why."""

    name: str
    reason: str


def resolve_hits(
    hits: Sequence[TemplateHit],
    query_sequence: str,
    query_pdb_id: str,
    cutoff_date: str,
    get_chain: GetChain,
    accept_unknown: bool,
    *,
    max_templates: int = 20,
) -> tuple[list[Template], list[Reject]]:
    """Templates in falling order of ``sum_probs``, released before ``cutoff_date``."""
    raise NotImplementedError


def stack_templates(
    templates: Sequence[Template], num_templates: int, length: int
) -> dict[str, np.ndarray]:
    """``template_*`` features of the first ``num_templates``, padded with zeros; no batch axis."""
    raise NotImplementedError
