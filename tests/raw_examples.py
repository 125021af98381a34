"""Chains for the data tests: random ones, and real ones read without the product's readers."""

import gzip
from pathlib import Path

import gemmi
import numpy as np

from foldcore import constants
from foldcore.data.transforms import RawExample

EMBEDDED = Path(__file__).resolve().parent.parent / "foldcore" / "data" / "embedded"


def random_structure(
    aatype: np.ndarray, rng: np.random.Generator, missing: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Scattered atoms [r, 37, 3] with some missing, and their mask."""
    mask = constants.restype_atom37_mask[aatype] * (rng.random((*aatype.shape, 37)) >= missing)
    positions = rng.normal(scale=5.0, size=(*aatype.shape, 37, 3)) * mask[..., None]
    return positions.astype(np.float32), mask.astype(np.float32)


def random_templates(length: int, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    aatype = rng.integers(0, 22, (count, length)).astype(np.int32)
    positions, mask = random_structure(np.minimum(aatype, 20), rng)
    return {
        "template_aatype": aatype,
        "template_all_atom_positions": positions,
        "template_all_atom_masks": mask,
        "template_sum_probs": np.sort(rng.random((count, 1)).astype(np.float32), 0)[::-1],
    }


def random_raw(
    length: int = 30, rows: int = 20, templates: int = 3, seed: int = 0, distillation: bool = False
) -> RawExample:
    rng = np.random.default_rng(seed)
    aatype = rng.integers(0, 21, length).astype(np.int32)
    positions, mask = random_structure(aatype, rng)
    msa = rng.integers(0, 22, (rows, length)).astype(np.uint8)
    msa[0] = aatype
    return RawExample(
        chain_id="1abc_A",
        aatype=aatype,
        residue_index=np.arange(length, dtype=np.int32),
        positions=positions,
        mask=mask,
        msa=msa,
        deletions=rng.poisson(0.3, (rows, length)).astype(np.uint16),
        templates=random_templates(length, templates, rng),
        resolution=2.0,
        is_distillation=distillation,
    )


def embedded_raw(chain: str) -> RawExample:
    """A chain of the embedded set, e.g. ``1ubq_A``."""
    pdb_id, chain_id = chain.split("_")
    text = gzip.decompress((EMBEDDED / "mmcif" / f"{pdb_id}.cif.gz").read_bytes()).decode()
    structure = gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())
    a3m = EMBEDDED / "alignments" / chain / "swissprot_hits.a3m.gz"
    msa, deletions = _read_a3m(gzip.decompress(a3m.read_bytes()).decode())
    length = msa.shape[1]
    positions, mask = np.zeros((length, 37, 3), np.float32), np.zeros((length, 37), np.float32)
    for residue in structure[0][chain_id].get_polymer():
        for atom in residue:
            if atom.name in constants.atom_order and atom.altloc in ("\0", "A"):
                slot = residue.label_seq - 1, constants.atom_order[atom.name]
                positions[slot], mask[slot] = atom.pos.tolist(), 1
    return RawExample(
        chain_id=chain,
        aatype=msa[0].astype(np.int32),
        residue_index=np.arange(length, dtype=np.int32),
        positions=positions,
        mask=mask,
        msa=msa,
        deletions=deletions,
        templates=random_templates(length, 5, np.random.default_rng(1)),
        resolution=0.0,
    )


def _read_a3m(text: str) -> tuple[np.ndarray, np.ndarray]:
    rows = ["".join(r.split("\n")[1:]) for r in text.split(">")[1:]]
    deletions = np.zeros((len(rows), sum(not x.islower() for x in rows[0])), np.uint16)
    codes = np.zeros(deletions.shape, np.uint8)
    for i, row in enumerate(rows):
        column = 0
        for letter in row:
            if letter.islower():
                deletions[i, min(column, deletions.shape[1] - 1)] += 1
            else:
                codes[i, column] = constants.letter_to_msa_code[letter]
                column += 1
    return codes, deletions
