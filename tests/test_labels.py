"""Labels against a slow independent computation, and against DeepMind's functions."""

import deepmind
import numpy as np
import pytest
from raw_examples import embedded_raw, random_structure
from scipy.spatial.transform import Rotation

from foldcore import constants as c
from foldcore.data.labels import make_labels, quaternion_affine, torsion_angles
from foldcore.features import FEATURES

CHAINS = ["1ubq_A", "1fki_A", "1lcd_A"]
Atoms = dict[str, np.ndarray]  # the resolved atoms of one residue, by name


def chain(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if name == "random":
        rng = np.random.default_rng(0)
        aatype = np.concatenate([np.arange(21), rng.integers(0, 21, 60)]).astype(np.int32)
        return aatype, *random_structure(aatype, rng)
    raw = embedded_raw(name)
    return raw.aatype, raw.positions, raw.mask


def residues(positions: np.ndarray, mask: np.ndarray) -> list[Atoms]:
    return [
        {a: p.astype(float) for a, p, m in zip(c.atom_types, position, exists, strict=True) if m}
        for position, exists in zip(positions, mask, strict=True)
    ]


def frame(on_x: np.ndarray, origin: np.ndarray, in_plane: np.ndarray) -> np.ndarray:
    """Right-handed frame with ``on_x`` on +x and ``in_plane`` on the +y side, by cross products."""
    x, z = on_x - origin, np.cross(on_x - origin, in_plane - origin)
    axes = np.array([x, np.cross(z, x), z])
    return (axes / np.linalg.norm(axes, axis=1, keepdims=True)).T


def dihedral(p0: np.ndarray, p1: np.ndarray, p2: np.ndarray, p3: np.ndarray) -> float:
    """Angle between the normals of the two planes, signed (IUPAC)."""
    n1, n2 = np.cross(p1 - p0, p2 - p1), np.cross(p2 - p1, p3 - p2)
    axis = (p2 - p1) / np.linalg.norm(p2 - p1)
    return float(np.arctan2(np.cross(n1, n2) @ axis, n1 @ n2))


def chi_names(restype: int) -> list[tuple[str, ...]]:
    table = c._TABLES["chi_angles_atoms"]
    return [tuple(names) for names in table[c.resnames[restype]]] if restype < 20 else []


@pytest.mark.parametrize("name", ["random", *CHAINS])
def test_frames_agree_with_cross_products(name: str) -> None:
    aatype, positions, mask = chain(name)
    labels = make_labels(aatype, positions, mask, np.float64)
    seen = 0
    for i, atoms in enumerate(residues(positions, mask)):
        groups = {0: ("C", "CA", "N"), 3: ("CA", "C", "O")}
        groups |= {4 + k: names[1:] for k, names in enumerate(chi_names(aatype[i]))}
        exists = [g in groups and all(a in atoms for a in groups[g]) for g in range(8)]
        np.testing.assert_array_equal(labels["rigidgroups_gt_exists"][i], exists)
        for group in np.flatnonzero(exists):
            first, origin, third = (atoms[a] for a in groups[group])
            on_x = first if group == 0 else 2 * origin - first  # all but the backbone: on -x
            expected = frame(on_x, origin, third)
            got = labels["rigidgroups_gt_frames"][i, group]
            np.testing.assert_allclose(got[:9].reshape(3, 3), expected, atol=2e-7)
            np.testing.assert_array_equal(got[9:], origin)
            seen += 1
    assert seen > 3 * len(aatype)


@pytest.mark.parametrize("name", ["random", *CHAINS])
def test_alternative_frames_place_the_renamed_atoms_alike(name: str) -> None:
    """Renaming the atoms of a residue and taking the alternative frame are the same thing."""
    aatype, positions, mask = chain(name)
    swapped, swapped_mask = positions.copy(), mask.copy()
    for resname, pairs in c._TABLES["residue_atom_renaming_swaps"].items():
        rows = np.flatnonzero(aatype == c.resnames.index(resname))[:, None]
        a, b = (np.array([c.atom_order[x] for x in side]) for side in zip(*pairs.items()))  # noqa: B905
        swapped[rows, a], swapped[rows, b] = positions[rows, b], positions[rows, a]
        swapped_mask[rows, a], swapped_mask[rows, b] = mask[rows, b], mask[rows, a]
    ours = make_labels(aatype, positions, mask, np.float64)
    theirs = make_labels(aatype, swapped, swapped_mask, np.float64)
    for key in ("atom14_alt_gt_positions", "atom14_alt_gt_exists"):
        np.testing.assert_array_equal(ours[key], theirs[key.replace("_alt", "")])
    turned = ours["rigidgroups_group_is_ambiguous"] == 1
    alternative = ours["rigidgroups_alt_gt_frames"][..., :9].reshape(-1, 8, 3, 3)
    relative = np.einsum(
        "rgji,rgjk->rgik", ours["rigidgroups_gt_frames"][..., :9].reshape(-1, 8, 3, 3), alternative
    )
    exists = ours["rigidgroups_gt_exists"] == 1
    half_turn = Rotation.from_rotvec([np.pi, 0, 0]).as_matrix()
    for which, expected in ((turned & exists, half_turn), (~turned & exists, np.eye(3))):
        np.testing.assert_allclose(
            relative[which], np.broadcast_to(expected, relative[which].shape), atol=1e-6
        )
    assert (turned & exists).any()


@pytest.mark.parametrize("name", ["random", *CHAINS])
def test_torsions_agree_with_plane_normals(name: str) -> None:
    aatype, positions, mask = chain(name)
    sin_cos, alternative, torsion_mask = torsion_angles(aatype, positions, mask, np.float64)
    labels = make_labels(aatype, positions, mask, np.float64)
    atoms = residues(positions, mask)
    previous: Atoms = {}
    for i, here in enumerate(atoms):
        before = {f"-{a}": p for a, p in previous.items()}
        named = [("-CA", "-C", "N", "CA"), ("-C", "N", "CA", "C"), ("N", "CA", "C", "O")]
        named += [*chi_names(aatype[i]), *[("none",)] * 4][:4]
        for k, names in enumerate(named):
            exists = all(a in here | before for a in names)
            assert torsion_mask[i, k] == exists
            if exists:
                angle = dihedral(*((here | before)[a] for a in names)) + np.pi * (k == 2)
                expected = [np.sin(angle), np.cos(angle)]
                np.testing.assert_allclose(sin_cos[i, k], expected, atol=2e-7)
                sign = -1 if k > 2 and c.chi_pi_periodic[aatype[i], k - 3] else 1
                np.testing.assert_allclose(alternative[i, k], sign * sin_cos[i, k])
        np.testing.assert_array_equal(labels["chi_mask"][i], torsion_mask[i, 3:])
        chis = np.stack([np.sin(labels["chi_angles"][i]), np.cos(labels["chi_angles"][i])], -1)
        known = torsion_mask[i, 3:] == 1
        np.testing.assert_allclose(chis[known], sin_cos[i, 3:][known], atol=2e-7)
        assert not labels["chi_angles"][i][~known].any()
        previous = here


@pytest.mark.parametrize("name", ["random", *CHAINS])
def test_atom14_and_pseudo_beta_are_the_named_atoms(name: str) -> None:
    aatype, positions, mask = chain(name)
    labels = make_labels(aatype, positions, mask)
    for i, atoms in enumerate(residues(positions, mask)):
        for slot, atom in enumerate(c.atom14_names[aatype[i]]):
            assert labels["atom14_atom_exists"][i, slot] == (atom != "")
            assert labels["atom14_gt_exists"][i, slot] == (atom in atoms)
            expected = np.float32(atoms.get(atom, np.zeros(3)))
            np.testing.assert_array_equal(labels["atom14_gt_positions"][i, slot], expected)
        beta = "CA" if c.resnames[aatype[i]] == "GLY" else "CB"
        assert labels["pseudo_beta_mask"][i] == (beta in atoms)
        expected = np.float32(atoms.get(beta, np.zeros(3)))
        np.testing.assert_array_equal(labels["pseudo_beta"][i], expected)


@pytest.mark.parametrize("name", ["random", *CHAINS])
def test_backbone_quaternions_are_the_backbone_frames(name: str) -> None:
    labels = make_labels(*chain(name), np.float64)
    exists = labels["backbone_affine_mask"] == 1
    affine, frames = labels["backbone_affine_tensor"], labels["rigidgroups_gt_frames"][:, 0]
    rotation = Rotation.from_quat(affine[:, [1, 2, 3, 0]]).as_matrix().reshape(-1, 9)
    np.testing.assert_allclose(rotation[exists], frames[exists, :9], atol=1e-7)
    np.testing.assert_array_equal(affine[:, 4:], frames[:, 9:])
    assert (affine[:, 0] >= 0).all()


def test_quaternions_of_half_turns_and_of_nothing() -> None:
    half_turns = [np.diag(d) for d in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1))]
    rotations = np.array([np.eye(3), *half_turns, np.zeros((3, 3))])
    frames = np.concatenate([rotations.reshape(5, 9), np.zeros((5, 3))], 1)
    expected = np.concatenate([np.eye(4), [[1, 0, 0, 0]]])
    np.testing.assert_array_equal(np.abs(quaternion_affine(frames)[:, :4]), expected)


def test_labels_do_not_depend_on_the_neighbours() -> None:
    """So a crop may be taken before the labels."""
    aatype, positions, mask = chain("1fki_A")
    whole = make_labels(aatype, positions, mask)
    part = make_labels(aatype[20:50], positions[20:50], mask[20:50])
    for key, value in whole.items():
        np.testing.assert_array_equal(value[20:50], part[key], err_msg=key)


def test_labels_have_the_dtypes_of_the_schema_and_are_finite() -> None:
    nothing = np.zeros((4, 37), np.float32)
    labels = make_labels(np.array([20, 7, 13, 0], np.int32), np.zeros((4, 37, 3)), nothing)
    for key, value in labels.items():
        assert value.dtype == FEATURES[key].dtype, key
        assert np.isfinite(value).all(), key
    assert not labels["rigidgroups_gt_exists"].any()
    np.testing.assert_array_equal(labels["rigidgroups_group_exists"][0], [1, 0, 0, 1, 0, 0, 0, 0])


def test_labels_agree_with_deepmind() -> None:
    deepmind.load()
    from alphafold.model import all_atom

    both = zip(chain("random"), chain("1fki_A"), strict=True)
    aatype, positions, mask = (np.concatenate(pair) for pair in both)
    labels = make_labels(aatype, positions, mask)
    for key, expected in all_atom.atom37_to_frames(aatype, positions, mask).items():
        tolerance = 2e-6 if "frames" in key else 0  # float32 there
        np.testing.assert_allclose(labels[key], expected, atol=tolerance, err_msg=key)
    expected = all_atom.atom37_to_torsion_angles(aatype[None], positions[None], mask[None])
    expected = {key: np.asarray(value)[0] for key, value in expected.items()}
    sin_cos, alternative, torsion_mask = torsion_angles(aatype, positions, mask)
    np.testing.assert_array_equal(torsion_mask, expected["torsion_angles_mask"])
    known = torsion_mask[..., None]  # undefined torsions are round-off in float32
    for ours, key in ((sin_cos, "torsion_"), (alternative, "alt_torsion_")):
        theirs = expected[f"{key}angles_sin_cos"]
        np.testing.assert_allclose(ours * known, theirs * known, atol=2e-5)
