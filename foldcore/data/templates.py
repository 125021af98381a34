"""From template hits to template features (supplement section 1.2.3).

A hit becomes a template when it passes AlphaFold's filters and the structure holds the sequence
that was aligned. Where the database sequence is not the structure's (other ends, other residues),
it is aligned again with the structure's. Every hit that is not used has a reason.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gemmi
import numpy as np
from jaxtyping import Float32, Int32

from foldcore import constants
from foldcore.data.hhr import TemplateHit
from foldcore.data.labels import pseudo_beta
from foldcore.data.mmcif import Chain, Structure
from foldcore.data.structures import Atoms
from foldcore.errors import DataError

GetChain = Callable[[str, str], tuple[Structure, Chain]]  # (pdb_id, chain_id); raises DataError

MIN_ALIGN_RATIO = 0.1  # aligned columns / query length
MAX_SUBSEQUENCE_RATIO = 0.95  # a longer piece of the query itself gives its structure away
MIN_HIT_LENGTH = 10  # residues
MAX_CA_CA_DISTANCE = 150.0  # angstrom, between neighbours; more is a damaged or artificial chain
MIN_ATOMS = 5
MIN_REALIGNED_IDENTITY = 0.9
# Realignment of two versions of one protein: global, affine gaps. Mismatches are cheap beside gaps,
# so that point mutations stay in place. A structure that goes on beyond the ends of the piece opens
# no gap there; if it did, one residue of the piece could as well stand apart from the others.
_MATCH, _MISMATCH, _GAP_OPEN, _GAP_EXTEND = 2, -2, -5, -1
_MAX_ALIGNMENT_CELLS = 200_000_000  # a byte each

_CA = constants.atom_order["CA"]


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
    rule: (
        str  # own_entry, coverage, subsequence, length, date, distance, atoms, sequence, unreadable
    )


class Unusable(Exception):
    """The rule by which a hit cannot be a template, and the particulars."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


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
    """Templates in falling order of ``sum_probs``, released before ``cutoff_date`` (YYYY-MM-DD).

    Structures are read one after another, and no more once ``max_templates`` are found: hits after
    that are in neither list. With ``accept_unknown`` a structure of unknown date may serve.
    """
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", cutoff_date):
        raise ValueError(f"cutoff_date={cutoff_date!r}: expected YYYY-MM-DD")
    templates: list[Template] = []
    rejects: list[Reject] = []
    for hit in sorted(hits, key=lambda hit: -hit.sum_probs):
        if len(templates) >= max_templates:
            break
        try:
            check_hit(hit, query_sequence, query_pdb_id)
            structure, chain = get_chain(hit.pdb_id, hit.chain_id)
            _check_structure(structure, chain, query_pdb_id, cutoff_date, accept_unknown)
            templates.append(_make_template(hit, query_sequence, chain))
        except Unusable as error:
            rejects.append(Reject(hit.name.partition(" ")[0], str(error), error.rule))
        except DataError as error:
            rejects.append(Reject(hit.name.partition(" ")[0], str(error), "unreadable"))
    return templates, rejects


def check_hit(hit: TemplateHit, query_sequence: str, query_pdb_id: str) -> None:
    """Filters that need no structure."""
    if not hit.pdb_id:
        raise Unusable("unreadable", "its name is not <pdb id>_<chain>")
    if hit.pdb_id == query_pdb_id.lower():
        raise Unusable("own_entry", "the query's own entry")
    align_ratio = hit.aligned_cols / len(query_sequence)
    if align_ratio <= MIN_ALIGN_RATIO:
        raise Unusable(
            "coverage",
            f"aligned to {align_ratio:.3f} of the query; more than {MIN_ALIGN_RATIO} needed",
        )
    sequence = hit.hit_sequence.replace("-", "")
    if sequence in query_sequence and len(sequence) > MAX_SUBSEQUENCE_RATIO * len(query_sequence):
        raise Unusable(
            "subsequence", f"identical with more than {MAX_SUBSEQUENCE_RATIO} of the query"
        )
    if len(sequence) < MIN_HIT_LENGTH:
        raise Unusable("length", f"{len(sequence)} residues; at least {MIN_HIT_LENGTH} needed")


def _check_structure(
    structure: Structure, chain: Chain, query_pdb_id: str, cutoff_date: str, accept_unknown: bool
) -> None:
    if structure.pdb_id == query_pdb_id.lower():
        raise Unusable("own_entry", "the query's own entry")
    if not structure.release_date and not accept_unknown:
        raise Unusable("date", "its release date is unknown")
    if structure.release_date >= cutoff_date:  # an unknown date, "", is before any other
        raise Unusable("date", f"released {structure.release_date}; before {cutoff_date} needed")
    check_distances(chain)


def check_distances(chain: Chain) -> None:
    """Neighbours in a chain must be near each other."""
    resolved = chain.mask[:, _CA] > 0
    neighbours = resolved[1:] & resolved[:-1]
    steps = np.linalg.norm(np.diff(chain.positions[:, _CA], axis=0), axis=1)
    if (neighbours & (steps > MAX_CA_CA_DISTANCE)).any():
        raise Unusable(
            "distance", f"neighbouring CA atoms more than {MAX_CA_CA_DISTANCE} angstrom apart"
        )


def _make_template(hit: TemplateHit, query_sequence: str, chain: Chain) -> Template:
    in_query, in_chain = align_hit(hit, query_sequence, chain)
    return place_template(
        f"{hit.pdb_id}_{hit.chain_id}",
        hit.sum_probs,
        len(query_sequence),
        chain,
        in_query,
        in_chain,
    )


def align_hit(
    hit: TemplateHit, query_sequence: str, chain: Chain
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """Aligned residues of the query, and those of the template's chain opposite to them."""
    columns = (hit.indices_query >= 0) & (hit.indices_hit >= 0)
    in_query = hit.indices_query[columns] + _query_offset(hit, query_sequence)
    in_chain = _locate(hit, chain.sequence)[columns]
    in_query, in_chain = in_query[in_chain >= 0], in_chain[in_chain >= 0]
    if (atoms := chain.mask[in_chain].sum()) < MIN_ATOMS:
        raise Unusable("atoms", f"{int(atoms)} resolved atoms in the alignment; {MIN_ATOMS} needed")
    return in_query, in_chain


def place_template(
    name: str,
    sum_probs: float,
    length: int,
    chain: Chain | Atoms,
    in_query: Int32[np.ndarray, " n"],
    in_chain: Int32[np.ndarray, " n"],
) -> Template:
    """The template's residues at those of a query of ``length`` residues."""
    aatype = np.full(length, constants.gap_code, np.int32)
    positions = np.zeros((length, 37, 3), np.float32)
    mask = np.zeros((length, 37), np.float32)
    codes = [constants.restype_order.get(c, constants.unknown_restype) for c in chain.sequence]
    aatype[in_query] = np.array(codes)[in_chain]
    positions[in_query], mask[in_query] = chain.positions[in_chain], chain.mask[in_chain]
    return Template(name, aatype, positions, mask, sum_probs)


def _query_offset(hit: TemplateHit, query_sequence: str) -> int:
    """How far the query is shifted against the sequence that was searched with."""
    shift = _shift(hit.query, hit.indices_query, query_sequence)
    if shift is None:
        raise Unusable("sequence", "the aligned query is not the query's sequence")
    return shift


def _locate(hit: TemplateHit, sequence: str) -> Int32[np.ndarray, " a"]:
    """Position in the structure's sequence of each column's hit residue, -1 where there is none."""
    shift = _shift(hit.hit_sequence, hit.indices_hit, sequence)
    if shift is not None:
        return np.where(hit.indices_hit >= 0, hit.indices_hit + shift, -1)
    positions = np.full(len(hit.hit_sequence), -1, np.int32)
    positions[hit.indices_hit >= 0] = _realign(hit.hit_sequence.replace("-", ""), sequence)
    return positions


def _shift(aligned: str, indices: Int32[np.ndarray, " a"], sequence: str) -> int | None:
    """Offset at which the aligned piece stands in ``sequence``, None where it does not.

    The place that its numbers name is tried first, then any other; X fits every residue.
    """
    letters = aligned.replace("-", "")
    start = int(indices[indices >= 0][0])
    if sequence.startswith(letters, start):  # nearly always; compiling a pattern is slow
        return 0
    piece = re.compile("".join("." if letter == "X" else f"[{letter}X]" for letter in letters))
    found = piece.match(sequence, start) or piece.search(sequence)
    return found.start() - start if found else None


def _realign(piece: str, sequence: str) -> Int32[np.ndarray, " n"]:
    """Position in ``sequence`` of each residue of ``piece`` (Needleman-Wunsch); -1: a gap."""
    if len(piece) * len(sequence) > _MAX_ALIGNMENT_CELLS:
        raise Unusable(
            "sequence", "the structure's sequence differs, and is too long to align again"
        )
    scoring = gemmi.AlignmentScoring()
    scoring.match, scoring.mismatch = _MATCH, _MISMATCH
    scoring.gapo, scoring.gape = _GAP_OPEN, _GAP_EXTEND
    openings = [0, *[_GAP_OPEN] * (len(piece) - 1), 0]  # before each residue of the piece, and last
    result = gemmi.align_string_sequences(list(sequence), list(piece), openings, scoring)
    identity = result.match_count / min(len(piece), len(sequence))
    if identity < MIN_REALIGNED_IDENTITY:
        raise Unusable("sequence", f"the structure's sequence is another: {identity:.2f} identical")
    gapped = (result.add_gaps(sequence, 1), result.add_gaps(piece, 2))
    of_sequence, of_piece = (np.array(list(letters)) != "-" for letters in gapped)
    return np.where(of_sequence, np.cumsum(of_sequence) - 1, -1)[of_piece].astype(np.int32)


def stack_templates(
    templates: Sequence[Template], num_templates: int, length: int
) -> dict[str, np.ndarray]:
    """``template_*`` features of the first ``num_templates``, padded with zeros; no batch axis."""
    used = templates[:num_templates]
    features = {
        "template_aatype": np.zeros((num_templates, length), np.int32),
        "template_all_atom_positions": np.zeros((num_templates, length, 37, 3), np.float32),
        "template_all_atom_masks": np.zeros((num_templates, length, 37), np.float32),
        "template_mask": np.zeros(num_templates, np.float32),
        "template_sum_probs": np.zeros((num_templates, 1), np.float32),
    }
    for index, template in enumerate(used):
        features["template_aatype"][index] = template.aatype
        features["template_all_atom_positions"][index] = template.positions
        features["template_all_atom_masks"][index] = template.mask
        features["template_sum_probs"][index] = template.sum_probs
    features["template_mask"][: len(used)] = 1
    features["template_pseudo_beta"], features["template_pseudo_beta_mask"] = pseudo_beta(
        features["template_aatype"],
        features["template_all_atom_positions"],
        features["template_all_atom_masks"],
    )
    return features
