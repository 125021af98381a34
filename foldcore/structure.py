"""Writing predicted structures as mmCIF or PDB text, with pLDDT in the B-factor column."""

import gemmi
import numpy as np
from jaxtyping import Float, Int

from foldcore import constants


def to_mmcif(
    positions: Float[np.ndarray, "r 37 3"],
    mask: Float[np.ndarray, "r 37"],
    aatype: Int[np.ndarray, "r"],
    residue_index: Int[np.ndarray, "r"],
    plddt: Float[np.ndarray, "r"],
    *,
    name: str = "model",
    chain_id: str = "A",
) -> str:
    """One chain as mmCIF; ``residue_index`` counts from 0, the file's residue numbers from 1."""
    structure = _structure(positions, mask, aatype, residue_index, plddt, name, chain_id)
    groups = gemmi.MmcifOutputGroups(True, cell=False, symmetry=False)
    return structure.make_mmcif_document(groups).as_string()


def to_pdb(
    positions: Float[np.ndarray, "r 37 3"],
    mask: Float[np.ndarray, "r 37"],
    aatype: Int[np.ndarray, "r"],
    residue_index: Int[np.ndarray, "r"],
    plddt: Float[np.ndarray, "r"],
    *,
    name: str = "model",
    chain_id: str = "A",
) -> str:
    """One chain as PDB text; a structure that does not fit its columns is an error."""
    if len(chain_id) != 1:
        raise ValueError(f"chain id {chain_id!r}: PDB files have one letter for it; write mmCIF")
    if residue_index.max(initial=0) >= 9999:
        raise ValueError("residue numbers above 9999 do not fit a PDB file; write mmCIF")
    if (np.abs(positions[mask > 0]) >= 999.9995).any():
        raise ValueError("coordinates beyond 999.999 angstrom do not fit a PDB file; write mmCIF")
    structure = _structure(positions, mask, aatype, residue_index, plddt, name, chain_id)
    return structure.make_pdb_string()


def _structure(
    positions: np.ndarray,
    mask: np.ndarray,
    aatype: np.ndarray,
    residue_index: np.ndarray,
    plddt: np.ndarray,
    name: str,
    chain_id: str,
) -> gemmi.Structure:
    if not np.isfinite(positions[mask > 0]).all():
        raise ValueError(f"{name}: atoms with non-finite coordinates")
    chain = gemmi.Chain(chain_id)
    for i, restype in enumerate(aatype):
        residue = _residue(i, constants.resnames[restype], int(residue_index[i]), chain_id)
        for slot in np.flatnonzero(mask[i]):
            atom_name = constants.atom_types[slot]
            residue.add_atom(_atom(atom_name, positions[i, slot], float(plddt[i])))
        chain.add_residue(residue)
    structure, model, entity = gemmi.Structure(), gemmi.Model(1), gemmi.Entity("1")
    entity.entity_type = gemmi.EntityType.Polymer
    entity.polymer_type = gemmi.PolymerType.PeptideL
    entity.subchains = [chain_id]
    entity.full_sequence = [constants.resnames[restype] for restype in aatype]
    structure.name = name
    model.add_chain(chain)
    structure.add_model(model)
    structure.entities.append(entity)
    return structure


def _residue(position: int, name: str, index: int, chain_id: str) -> gemmi.Residue:
    residue = gemmi.Residue()
    residue.name = name
    residue.seqid = gemmi.SeqId(str(index + 1))
    residue.label_seq = position + 1
    residue.subchain = chain_id
    residue.entity_id = "1"
    residue.entity_type = gemmi.EntityType.Polymer
    residue.het_flag = "A"
    return residue


def _atom(name: str, position: np.ndarray, plddt: float) -> gemmi.Atom:
    atom = gemmi.Atom()
    atom.name = name
    atom.element = gemmi.Element(name[0])
    atom.pos = gemmi.Position(*(round(float(x), 3) for x in position))
    atom.b_iso = round(plddt, 2)
    return atom
