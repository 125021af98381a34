"""Chemistry tables: equal to DeepMind's published ones, and consistent with each other."""

from types import SimpleNamespace

import deepmind
import numpy as np
import pytest

from foldcore import constants as c


@pytest.fixture(scope="module")
def published() -> SimpleNamespace:
    deepmind.load()
    from alphafold.common import residue_constants
    from alphafold.model import all_atom

    return SimpleNamespace(tables=residue_constants, all_atom=all_atom)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("restype_atom14_mask", "restype_atom14_mask"),
        ("restype_atom37_mask", "restype_atom37_mask"),
        ("restype_atom14_to_rigid_group", "restype_atom14_to_rigid_group"),
        ("restype_atom14_rigid_group_positions", "restype_atom14_rigid_group_positions"),
        ("restype_rigid_group_default_frame", "restype_rigid_group_default_frame"),
        ("hhblits_to_msa_code", "MAP_HHBLITS_AATYPE_TO_OUR_AATYPE"),
    ],
)
def test_tables_equal_the_published_ones(
    published: SimpleNamespace, ours: str, theirs: str
) -> None:
    np.testing.assert_array_equal(getattr(c, ours), getattr(published.tables, theirs))


def test_torsion_tables_equal_the_published_ones(published: SimpleNamespace) -> None:
    tables = published.tables
    np.testing.assert_array_equal(c.chi_atom_indices, published.all_atom.get_chi_atom_indices())
    np.testing.assert_array_equal(c.chi_angles_mask[:20], np.float32(tables.chi_angles_mask))
    np.testing.assert_array_equal(c.chi_pi_periodic, np.float32(tables.chi_pi_periodic))
    renaming = np.eye(14)[c.restype_atom14_renaming]
    np.testing.assert_array_equal(renaming, published.all_atom.RENAMING_MATRICES)


@pytest.mark.parametrize(("tolerance", "factor"), [(1.5, 12.0), (1.0, 15.0)])
def test_distance_bounds_equal_the_published_ones(
    published: SimpleNamespace, tolerance: float, factor: float
) -> None:
    lower, upper = c.atom14_distance_bounds(tolerance, factor)
    expected = published.tables.make_atom14_dists_bounds(tolerance, factor)
    np.testing.assert_array_equal(lower, expected["lower_bound"])
    np.testing.assert_array_equal(upper, expected["upper_bound"])


def test_names_equal_the_published_ones(published: SimpleNamespace) -> None:
    tables = published.tables
    assert list(c.restypes) == tables.restypes
    assert list(c.atom_types) == tables.atom_types
    assert list(c.resnames) == tables.resnames
    assert c.letter_to_msa_code == {
        letter: tables.MAP_HHBLITS_AATYPE_TO_OUR_AATYPE[code]
        for letter, code in tables.HHBLITS_AA_TO_ID.items()
    }


def test_the_two_atom_layouts_map_onto_each_other() -> None:
    assert c.restype_atom14_mask.sum() == c.restype_atom37_mask.sum() == 167
    for restype in range(21):
        for slot in np.flatnonzero(c.restype_atom14_mask[restype]):
            atom = c.restype_atom14_to_atom37[restype, slot]
            assert c.atom_types[atom] == c.atom14_names[restype][slot]
            assert c.restype_atom37_mask[restype, atom] == 1
            assert c.restype_atom37_to_atom14[restype, atom] == slot


def test_letters_of_the_alphabet_keep_their_own_code() -> None:
    for code, letter in enumerate(c.restypes_with_x_and_gap):
        assert c.letter_to_msa_code[letter] == code
    assert (c.gap_code, c.mask_code) == (21, 22)


def test_default_frames_are_rigid_and_place_the_idealised_atoms() -> None:
    """The chi1 frame, through its default, must place the atoms of a torsion at its own angle 0."""
    frames = c.restype_rigid_group_default_frame.astype(np.float64)
    assert not frames[20].any(), "X has no frames at all, not even the backbone's"
    for restype in range(20):
        exists = c.restype_rigid_group_mask[restype] == 1
        rotation = frames[restype, exists, :3, :3]
        identity = np.tile(np.eye(3), (len(rotation), 1, 1))
        np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), identity, atol=1e-6)
        if not exists[4]:
            continue
        names = c.atom14_names[restype]
        atoms = [names.index(c.atom_types[a]) for a in c.chi_atom_indices[restype, 0]]
        local = c.restype_atom14_rigid_group_positions[restype, atoms].astype(np.float64)
        fourth = frames[restype, 4, :3, :3] @ local[3] + frames[restype, 4, :3, 3]
        plane = np.cross(local[1] - local[0], local[2] - local[1])
        assert abs(plane @ (fourth - local[2])) < 0.02, "chi1 = 0 leaves all four atoms in a plane"


def test_ambiguity_is_the_same_in_atoms_groups_and_torsions() -> None:
    ambiguous = {"ASP", "GLU", "PHE", "TYR"}
    for restype, name in enumerate(c.resnames):
        assert c.restype_atom14_is_ambiguous[restype].any() == (name in ambiguous)
        groups = c.restype_rigid_group_is_ambiguous[restype]
        np.testing.assert_array_equal(groups[4:], c.chi_pi_periodic[restype])
    twice = np.take_along_axis(c.restype_atom14_renaming, c.restype_atom14_renaming, 1)
    np.testing.assert_array_equal(twice, np.tile(np.arange(14), (21, 1)))


def test_tables_cannot_be_changed_by_accident() -> None:
    arrays = [value for value in vars(c).values() if isinstance(value, np.ndarray)]
    assert len(arrays) > 10
    assert not any(array.flags.writeable for array in arrays)
