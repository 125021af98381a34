"""Structure files: what is written reads back the same."""

from collections.abc import Callable

import gemmi
import numpy as np
import pytest
from raw_examples import embedded_raw, random_structure

from foldcore import constants
from foldcore.data.mmcif import read_structure
from foldcore.structure import to_mmcif, to_pdb


def read(text: str, writer: Callable[..., str]) -> gemmi.Structure:
    if writer is to_pdb:
        return gemmi.read_pdb_string(text)
    return gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())


def chain() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    aatype = np.concatenate([np.arange(20), rng.integers(0, 20, 10)])
    positions, mask = random_structure(aatype, rng, missing=0.2)
    mask[12] = 0  # a residue without atoms
    index = np.arange(30) + (np.arange(30) > 17) * 5  # and a gap in the numbering
    return positions * 10, mask, aatype, index, rng.uniform(0, 100, 30)


@pytest.mark.parametrize("writer", [to_mmcif, to_pdb])
def test_atoms_read_back(writer: Callable[..., str]) -> None:
    positions, mask, aatype, index, plddt = chain()
    structure = read(writer(positions, mask, aatype, index, plddt, chain_id="B"), writer)
    assert [c.name for model in structure for c in model] == ["B"]
    by_number = {residue.seqid.num: residue for residue in structure[0]["B"]}
    assert 13 not in by_number and len(by_number) == 29
    count = 0
    for i in np.flatnonzero(mask.any(1)):
        residue = by_number[index[i] + 1]
        assert residue.name == constants.resnames[aatype[i]]
        for slot in np.flatnonzero(mask[i]):
            atom = residue[constants.atom_types[slot]][0]
            np.testing.assert_allclose(atom.pos.tolist(), positions[i, slot], atol=1e-3)
            assert atom.b_iso == pytest.approx(plddt[i], abs=0.01)
            assert atom.element.name == constants.atom_types[slot][0]
            count += 1
    assert count == mask.sum() == structure[0].count_atom_sites()


@pytest.mark.parametrize("writer", [to_mmcif, to_pdb])
def test_the_whole_sequence_is_written(writer: Callable[..., str]) -> None:
    structure = read(writer(*chain(), name="best"), writer)
    (entity,) = structure.entities
    assert entity.full_sequence == [constants.resnames[a] for a in chain()[2]]


@pytest.mark.parametrize("writer", [to_mmcif, to_pdb])
def test_the_data_pipeline_reads_what_was_written(writer: Callable[..., str]) -> None:
    raw = embedded_raw("1ubq_A")
    text = writer(raw.positions, raw.mask, raw.aatype, raw.residue_index, raw.mask[:, 1] * 90)
    name = "model.cif" if writer is to_mmcif else "model.pdb"
    chain = read_structure(name, text.encode()).chain("A")
    assert chain.sequence == "".join(constants.restypes[a] for a in raw.aatype)
    np.testing.assert_array_equal(chain.mask, raw.mask)
    np.testing.assert_allclose(chain.positions, raw.positions, atol=1e-3)


def test_what_a_pdb_file_cannot_hold_is_an_error() -> None:
    positions, mask, aatype, index, plddt = chain()
    with pytest.raises(ValueError, match="chain id 'AA'"):
        to_pdb(positions, mask, aatype, index, plddt, chain_id="AA")
    with pytest.raises(ValueError, match="residue numbers"):
        to_pdb(positions, mask, aatype, index + 9990, plddt)
    with pytest.raises(ValueError, match="beyond 999.999"):
        to_pdb(positions + 1000, mask, aatype, index, plddt)
    to_mmcif(positions + 1000, mask, aatype, index + 9990, plddt, chain_id="AA")


@pytest.mark.parametrize("writer", [to_mmcif, to_pdb])
def test_non_finite_coordinates_are_an_error(writer: Callable[..., str]) -> None:
    positions, mask, *rest = chain()
    positions[3, np.flatnonzero(mask[3])[0]] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        writer(positions, mask, *rest)
