"""From a parsed entry (a gemmi structure) to protein chains in atom37 layout."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import gemmi
import numpy as np
from jaxtyping import Float32, Int32

from foldcore import constants
from foldcore.errors import DataError

# 592 bytes a residue; the largest entry of the wwPDB has well under half of this.
MAX_RESIDUES = 4_000_000
MAX_COORDINATE = 1e6  # angstrom; the columns of a PDB file end at 1e4

_N_H1, _N_H2, _C_D = (constants.atom_order[name] for name in ("NH1", "NH2", "CD"))
# Atoms a residue of each type may have: those of the type and OXT; X keeps whatever has a slot.
_ALLOWED = constants.restype_atom37_mask.copy()
_ALLOWED[:, constants.atom_order["OXT"]] = 1
_ALLOWED[constants.unknown_restype] = 1


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One protein chain, a row for every residue of the sequence, resolved or not."""

    chain_id: str  # author chain id, the one in file names and caches
    label_id: str  # label_asym_id; "" in PDB files
    sequence: str  # SEQRES in one-letter code, X where there is no parent residue
    residue_index: Int32[np.ndarray, " r"]  # 0-based position in the sequence
    positions: Float32[np.ndarray, "r 37 3"]  # angstrom; 0 where the atom is not resolved
    mask: Float32[np.ndarray, "r 37"]  # 1 where the atom is resolved
    # largest B-factor of the residue's resolved atoms, at least 0; predicted structures keep the
    # residue's pLDDT (0..100) there
    b_factors: Float32[np.ndarray, " r"]


@dataclass(slots=True, eq=False)
class Entry:
    """A parsed file before its chains are cut out; ``warnings`` grows on the way."""

    structure: gemmi.Structure
    path: str
    pdb_id: str
    resolution: float
    release_date: str
    method: str
    warnings: list[str]
    has_labels: bool  # mmCIF: label_asym_id and label_seq_id come from the file
    canonical: dict[str, str] = field(default_factory=dict)  # entity -> parents in one-letter code
    observed: dict[str, set[int]] = field(default_factory=dict)  # label_asym_id -> label_seq_id


def build_chains(entry: Entry) -> dict[str, Chain]:
    """Protein chains of the first model, by author chain id."""
    if len(entry.structure) == 0:
        raise DataError(entry.path, None, "no atoms")
    chains: dict[str, Chain] = {}
    total = 0
    for author_id, label_id, entity in _protein_chains(entry):
        if author_id in chains:
            entry.warnings.append(f"chain {author_id}: a second polymer {label_id} is left out")
            continue
        total += len(entity.full_sequence)
        if total > MAX_RESIDUES:
            raise DataError(entry.path, None, f"more than {MAX_RESIDUES} residues")
        chains[author_id] = _build(entry, author_id, label_id, entity)
    if not chains:
        raise DataError(entry.path, None, "no protein chain with atoms")
    return chains


def _protein_chains(entry: Entry) -> Iterator[tuple[str, str, gemmi.Entity]]:
    """Author id, subchain id and entity of each L-polypeptide that has atoms."""
    entities = {
        subchain: entity
        for entity in entry.structure.entities
        if entity.entity_type == gemmi.EntityType.Polymer
        and entity.polymer_type == gemmi.PolymerType.PeptideL
        for subchain in entity.subchains
    }
    seen: set[str] = set()
    for chain in entry.structure[0]:
        for span in chain.subchains():
            label_id = span.subchain_id()
            if label_id in entities and label_id not in seen:
                seen.add(label_id)
                yield chain.name, label_id, entities[label_id]
    if missing := entities.keys() - seen:
        entry.warnings.append(f"chains without atoms are left out: {', '.join(sorted(missing))}")


def _build(entry: Entry, author_id: str, label_id: str, entity: gemmi.Entity) -> Chain:
    residues = list(entry.structure[0].get_subchain(label_id))
    if entity.full_sequence:
        names = [gemmi.Entity.first_mon(names) for names in entity.full_sequence]
        groups = _by_label(entry, author_id, residues, len(names))
        residue_index = np.arange(len(names), dtype=np.int32)
    else:
        entry.warnings.append(f"chain {author_id}: no SEQRES; its resolved residues are taken")
        groups, residue_index = _by_author_number(residues)
        names = [group[0].name for group in groups.values()]
    _check_observed(entry, author_id, label_id, groups)
    sequence = _one_letter(entry, entity.name, names)
    positions, mask, b_factors = _atoms(entry, author_id, names, groups)
    aatype = [constants.restype_order.get(c, constants.unknown_restype) for c in sequence]
    mask *= _ALLOWED[aatype]
    positions *= mask[:, :, None]
    _fix_arginine(sequence, positions)
    return Chain(
        chain_id=author_id,
        label_id=label_id if entry.has_labels else "",
        sequence=sequence,
        residue_index=residue_index,
        positions=positions,
        mask=mask,
        b_factors=np.fmax.reduce(b_factors * mask, axis=1, initial=0),  # NaN is no B-factor
    )


def _by_label(
    entry: Entry, chain_id: str, residues: list[gemmi.Residue], length: int
) -> dict[int, list[gemmi.Residue]]:
    """Residues by 0-based position in the sequence; several where the position is heterogeneous."""
    groups: dict[int, list[gemmi.Residue]] = {}
    unplaced = 0
    for residue in residues:
        if residue.label_seq is None:
            unplaced += 1
        elif 1 <= residue.label_seq <= length:
            groups.setdefault(residue.label_seq - 1, []).append(residue)
        else:
            where = f"residue {residue.name} {residue.seqid} of chain {chain_id}"
            reason = f"{where} is number {residue.label_seq} of a sequence of {length}"
            raise DataError(entry.path, None, reason)
    if unplaced:
        entry.warnings.append(f"chain {chain_id}: {unplaced} residues have no place in SEQRES")
    return groups


def _by_author_number(
    residues: list[gemmi.Residue],
) -> tuple[dict[int, list[gemmi.Residue]], Int32[np.ndarray, " r"]]:
    """Without SEQRES: residues in order; their index keeps the gaps of the author's numbering."""
    runs: list[list[gemmi.Residue]] = []
    for residue in residues:
        if runs and runs[-1][0].seqid == residue.seqid:
            runs[-1].append(residue)
        else:
            runs.append([residue])
    numbers = np.array([run[0].seqid.num for run in runs], np.int64)
    steps = np.maximum(np.diff(numbers, prepend=numbers[:1]), 1)  # insertion codes repeat a number
    index = np.minimum(np.cumsum(steps) - 1, np.iinfo(np.int32).max)
    return dict(enumerate(runs)), index.astype(np.int32)


def _check_observed(
    entry: Entry, chain_id: str, label_id: str, groups: dict[int, list[gemmi.Residue]]
) -> None:
    """The file's own list of resolved residues must be met by its atoms."""
    if missing := {n for n in entry.observed.get(label_id, ()) if n - 1 not in groups}:
        reason = (
            f"residue {min(missing)} of chain {chain_id} is listed as resolved but has no atoms"
        )
        raise DataError(entry.path, None, f"{reason} ({len(missing)} such): truncated?")


def _one_letter(entry: Entry, entity_id: str, names: list[str]) -> str:
    """Parent of each residue: by the entry's own statement (wwPDB: PCA is Q), else the tables."""
    canonical = entry.canonical.get(entity_id, "")
    if len(canonical) != len(names):  # a chromophore of three residues is one name, three letters
        canonical = "X" * len(names)
    modified = {m.res_id.name: m.parent_comp_id for m in entry.structure.mod_residues}
    return "".join(
        _parent(name, letter, modified.get(name, ""))
        for name, letter in zip(names, canonical, strict=True)
    )


def _parent(name: str, canonical: str, modified_from: str) -> str:
    candidates = (
        constants.restype_3to1.get(name, ""),
        canonical,
        constants.ccd_to_one_letter.get(name, ""),
        constants.restype_3to1.get(modified_from, ""),
    )
    return next((letter for letter in candidates if letter in constants.restype_order), "X")


def _atoms(
    entry: Entry, chain_id: str, names: list[str], groups: dict[int, list[gemmi.Residue]]
) -> tuple[Float32[np.ndarray, "r 37 3"], Float32[np.ndarray, "r 37"], Float32[np.ndarray, "r 37"]]:
    """Positions, mask and B-factors."""
    at: list[tuple[int, int]] = []
    coordinates: list[list[float]] = []
    found: list[float] = []
    other = 0
    for place, variants in groups.items():
        residue = _choose(variants, names[place])
        other += residue.name != names[place]
        for slot, atom in _best_atoms(residue).items():
            at.append((place, slot))
            coordinates.append(atom.pos.tolist())
            found.append(atom.b_iso)
    if other:
        entry.warnings.append(f"chain {chain_id}: {other} residues are not those of SEQRES")
    places, slots = np.array(at, np.int64).reshape(-1, 2).T
    values = np.array(coordinates).reshape(-1, 3)
    invalid = np.flatnonzero(~(np.abs(values) < MAX_COORDINATE).all(axis=1))  # NaN is invalid too
    if invalid.size:
        place, slot = at[invalid[0]]
        where = f"atom {constants.atom_types[slot]} of residue {place + 1} of chain {chain_id}"
        raise DataError(entry.path, None, f"{where} has no valid coordinates")
    positions = np.zeros((len(names), 37, 3), np.float32)
    mask, b_factors = np.zeros((2, len(names), 37), np.float32)
    positions[places, slots], mask[places, slots], b_factors[places, slots] = values, 1, found
    return positions, mask, b_factors


def _choose(variants: list[gemmi.Residue], name: str) -> gemmi.Residue:
    """Of a heterogeneous position the residue that SEQRES lists first, else the most occupied."""
    for residue in variants:
        if residue.name == name:
            return residue
    return max(variants, key=lambda residue: max((atom.occ for atom in residue), default=0.0))


def _best_atoms(residue: gemmi.Residue) -> dict[int, gemmi.Atom]:
    """atom37 slot -> the most occupied alternative, or the first."""
    best: dict[int, gemmi.Atom] = {}
    selenium = "SD" if residue.name == "MSE" else "SE"
    for atom in residue:
        slot = constants.atom_order.get(selenium if atom.name == "SE" else atom.name)
        if slot is not None and (slot not in best or atom.occ > best[slot].occ):
            best[slot] = atom
    return best


def _fix_arginine(sequence: str, positions: Float32[np.ndarray, "r 37 3"]) -> None:
    """Exchange NH1 and NH2 where NH2 is nearer to CD: NH1 is the one cis to it by convention."""
    cd, nh1, nh2 = positions[:, _C_D], positions[:, _N_H1], positions[:, _N_H2]
    resolved = cd.any(axis=1) & nh1.any(axis=1) & nh2.any(axis=1)
    nearer = np.linalg.norm(nh2 - cd, axis=1) < np.linalg.norm(nh1 - cd, axis=1)
    swap = resolved & nearer & (np.array(list(sequence)) == "R")
    positions[swap, _N_H1], positions[swap, _N_H2] = nh2[swap], nh1[swap]
