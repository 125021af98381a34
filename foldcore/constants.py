"""Chemistry tables of AlphaFold 2 as numpy arrays, built from ``residue_constants.json``.

Residue axis (21): the 20 amino acids in the order of their three-letter names, then X. MSA letters
have two more codes: 21 = gap, 22 = masked (BERT). Atom axes: ``atom37`` gives every heavy-atom name
its own slot, ``atom14`` packs the atoms of each residue type. Rigid-group axis (8): backbone,
pre-omega, phi, psi, chi1..chi4. Row X has no atoms. Lengths are in angstrom; floats are float32;
arrays are read-only.
"""

import functools
import json
import math
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float

_TABLES: dict[str, Any] = json.loads(
    resources.files("foldcore").joinpath("residue_constants.json").read_text(encoding="utf-8")
)


def _array(values: Any, dtype: Any = np.float32) -> np.ndarray:
    array = np.array(values, dtype)
    array.setflags(write=False)
    return array


# Names --------------------------------------------------------------------------------------------

restypes: tuple[str, ...] = tuple(_TABLES["restypes"])
restypes_with_x_and_gap: tuple[str, ...] = tuple(_TABLES["restypes_with_x_and_gap"])
restype_order: dict[str, int] = {letter: i for i, letter in enumerate(restypes)}
restype_1to3: dict[str, str] = _TABLES["restype_1to3"]
restype_3to1: dict[str, str] = _TABLES["restype_3to1"]
resnames: tuple[str, ...] = tuple(_TABLES["resnames"])  # 21 three-letter names, X = UNK
ccd_to_one_letter: dict[str, str] = _TABLES["ccd_to_one_letter"]  # modified residue -> parent
unknown_restype = 20
gap_code = 21
mask_code = 22
num_msa_codes = 22  # letters an alignment can hold; the masked token is the 23rd class

atom_types: tuple[str, ...] = tuple(_TABLES["atom_types"])
atom_order: dict[str, int] = {name: i for i, name in enumerate(atom_types)}
atom14_names: tuple[tuple[str, ...], ...] = tuple(
    tuple(_TABLES["restype_name_to_atom14_names"][name]) for name in resnames
)  # [21][14], "" where the slot is empty

# An alignment's letter -> our code, by way of HHblits' alphabet (B counts as D, Z as E, U as C).
hhblits_to_msa_code = _array(_TABLES["MAP_HHBLITS_AATYPE_TO_OUR_AATYPE"], np.int32)  # [22]
letter_to_msa_code: dict[str, int] = {
    letter: int(hhblits_to_msa_code[code]) for letter, code in _TABLES["HHBLITS_AA_TO_ID"].items()
}


# Atoms --------------------------------------------------------------------------------------------


def _atom14_to_atom37() -> np.ndarray:
    return _array([[atom_order.get(name, 0) for name in names] for names in atom14_names], np.int32)


def _atom37_to_atom14() -> np.ndarray:
    table = [[names.index(a) if a in names else 0 for a in atom_types] for names in atom14_names]
    return _array(table, np.int32)


def _atom14_positions() -> np.ndarray:
    """Idealised position of each atom in the frame of its own rigid group."""
    positions = np.zeros((21, 14, 3))
    for restype, names in enumerate(atom14_names[:20]):
        for atom, _, xyz in _TABLES["rigid_group_atom_positions"][resnames[restype]]:
            positions[restype, names.index(atom)] = xyz
    return _array(positions)


def _atom14_partners() -> np.ndarray:
    """Permutation of the 14 slots that exchanges the names a 180 degree turn makes equal."""
    partners = np.tile(np.arange(14), (21, 1))
    for resname, swaps in _TABLES["residue_atom_renaming_swaps"].items():
        restype = resnames.index(resname)
        for first, second in swaps.items():
            i, j = atom14_names[restype].index(first), atom14_names[restype].index(second)
            partners[restype, [i, j]] = j, i
    return _array(partners, np.int32)


_RADIUS: dict[str, float] = {**_TABLES["van_der_waals_radius"], "": 0.0}

restype_atom14_mask = _array([[name != "" for name in names] for names in atom14_names])  # [21, 14]
restype_atom37_mask = _array([[a in names for a in atom_types] for names in atom14_names])
restype_atom14_to_atom37 = _atom14_to_atom37()  # [21, 14]; 0 where the slot is empty
restype_atom37_to_atom14 = _atom37_to_atom14()  # [21, 37]; 0 where the atom does not exist
restype_atom14_renaming = _atom14_partners()  # [21, 14] (Suppl. Table 3)
restype_atom14_is_ambiguous = _array(restype_atom14_renaming != np.arange(14))  # [21, 14]
restype_atom14_radius = _array([[_RADIUS[n[:1]] for n in names] for names in atom14_names])


# Torsions and rigid groups ------------------------------------------------------------------------


def _chi_atoms() -> np.ndarray:
    indices = np.zeros((21, 4, 4))
    for restype, resname in enumerate(resnames[:20]):
        for chi, names in enumerate(_TABLES["chi_angles_atoms"][resname]):
            indices[restype, chi] = [atom_order[name] for name in names]
    return _array(indices, np.int32)


def _frame_atoms() -> np.ndarray:
    """The atoms on the negative x axis, at the origin and in the xy plane of each group."""
    atoms = np.zeros((21, 8, 3))
    atoms[:, 0] = [atom_order[name] for name in ("C", "CA", "N")]
    atoms[:, 3] = [atom_order[name] for name in ("CA", "C", "O")]
    atoms[:, 4:] = chi_atom_indices[:, :, 1:]
    return _array(atoms, np.int32)


def _group_mask() -> np.ndarray:
    # Pre-omega and phi would place only hydrogens. X keeps its two backbone groups.
    return _array(np.concatenate([np.tile([1, 0, 0, 1], (21, 1)), chi_angles_mask], axis=1))


def _ambiguous_groups() -> np.ndarray:
    groups = np.zeros((21, 8))
    for resname in _TABLES["residue_atom_renaming_swaps"]:
        restype = resnames.index(resname)
        groups[restype, 3 + int(chi_angles_mask[restype].sum())] = 1  # always the last chi
    return _array(groups)


chi_angles_mask = _array([*_TABLES["chi_angles_mask"], [0.0] * 4])  # [21, 4]
chi_pi_periodic = _array(_TABLES["chi_pi_periodic"])  # [21, 4]; 1: chi and chi + pi are the same
chi_atom_indices = _chi_atoms()  # [21, 4 chis, 4 atoms] in atom37
restype_rigid_group_atoms = _frame_atoms()  # [21, 8, 3] in atom37; 0 where the group does not exist
restype_rigid_group_mask = _group_mask()  # [21, 8]
restype_rigid_group_is_ambiguous = _ambiguous_groups()  # [21, 8]
# Group -> parent group, as 4x4 matrices. All groups of X, even the backbone, are zero matrices.
restype_rigid_group_default_frame = _array(_TABLES["restype_rigid_group_default_frame"])
restype_atom14_to_rigid_group = _array(_TABLES["restype_atom14_to_rigid_group"], np.int32)
restype_atom14_rigid_group_positions = _atom14_positions()  # [21, 14, 3]


# Quaternions (w, x, y, z) -------------------------------------------------------------------------


def _quaternion_products() -> tuple[np.ndarray, np.ndarray]:
    rotation, by_vector = np.zeros((3, 3, 4, 4)), np.zeros((4, 4, 3))
    cross = np.cross(np.eye(3)[:, None], np.eye(3)[None])  # [a, b]: axis a x axis b
    for a in range(3):
        rotation[a, a, range(4), range(4)] += (1, -1, -1, -1)
        by_vector[0, 1 + a, a], by_vector[1 + a, 0, a] = -1, 1
        for b in range(3):
            rotation[a, b, 1 + a, 1 + b] += 2
            rotation[:, b, 0, 1 + a] += 2 * cross[a, b]
            by_vector[1:, 1 + a, b] += cross[a, b]
    return _array(rotation), _array(by_vector)


# The rotation of q as sums of products q_a q_b, [3 3 a b]; q (0, v) as sums of q_a v_b, [4 a b].
quaternion_to_rotation, quaternion_by_vector = _quaternion_products()


# Stereochemistry ----------------------------------------------------------------------------------

ca_ca: float = _TABLES["ca_ca"]  # trans peptide, angstrom
# Each pair below is (mean, standard deviation), but for the C-N bond: (general, before proline).
between_res_bond_length_c_n: tuple[float, float] = tuple(_TABLES["between_res_bond_length_c_n"])
between_res_bond_length_stddev_c_n: tuple[float, float] = tuple(
    _TABLES["between_res_bond_length_stddev_c_n"]
)
between_res_cos_angles_c_n_ca: tuple[float, float] = tuple(_TABLES["between_res_cos_angles_c_n_ca"])
between_res_cos_angles_ca_c_n: tuple[float, float] = tuple(_TABLES["between_res_cos_angles_ca_c_n"])


@functools.cache
def atom14_distance_bounds(
    tolerance: float = 1.5, factor: float = 12.0
) -> tuple[Float[np.ndarray, "21 14 14"], Float[np.ndarray, "21 14 14"]]:
    """Lower and upper limits of the distances within a residue (Suppl. 1.9.11).

    Non-bonded pairs may overlap by ``tolerance`` angstrom; bonds and 1-3 distances may differ from
    their ideal length by ``factor`` standard deviations. Both limits of missing pairs are 0.
    """
    pairs = restype_atom14_mask[:, :, None] * restype_atom14_mask[:, None, :] * (1 - np.eye(14))
    radius = np.array([[_RADIUS[n[:1]] for n in names] for names in atom14_names])
    lower = pairs * (radius[:, :, None] + radius[:, None, :] - tolerance)
    upper = pairs * 1e10
    for restype, resname in enumerate(resnames[:20]):
        for atom_a, atom_b, length, stddev in _bonds_and_angles(resname):
            i, j = (atom14_names[restype].index(atom) for atom in (atom_a, atom_b))
            lower[restype, [i, j], [j, i]] = length - factor * stddev
            upper[restype, [i, j], [j, i]] = length + factor * stddev
    return _array(lower), _array(upper)


def bin_edges(first: float, last: float, count: int) -> Float[np.ndarray, " count"]:
    """Evenly spaced limits between bins; compilers would round those they compute differently."""
    return np.linspace(first, last, count)


def _bonds_and_angles(resname: str) -> list[tuple[str, str, float, float]]:
    """(atom, atom, length, deviation) of the bonds, then of the distances across bond angles."""
    bonds = [tuple(bond) for bond in _TABLES["residue_bonds"][resname]]
    by_atoms = {frozenset(bond[:2]): bond[2:] for bond in bonds}
    for atom_a, centre, atom_b, degrees, stddev in _TABLES["residue_bond_angles_deg"][resname]:
        sides = by_atoms[frozenset((atom_a, centre))], by_atoms[frozenset((centre, atom_b))]
        bonds.append(
            (atom_a, atom_b, *_across(*sides, math.radians(degrees), math.radians(stddev)))
        )
    return bonds


def _across(
    side_1: tuple[float, float], side_2: tuple[float, float], angle: float, angle_stddev: float
) -> tuple[float, float]:
    """Law of cosines, with the errors of both sides and of the angle carried through."""
    (b1, s1), (b2, s2) = side_1, side_2
    cosine, sine = math.cos(angle), math.sin(angle)
    length = math.sqrt(b1 * b1 + b2 * b2 - 2 * b1 * b2 * cosine)
    slopes = (b1 * b2 * sine / length, (b1 - b2 * cosine) / length, (b2 - b1 * cosine) / length)
    return length, math.hypot(slopes[0] * angle_stddev, slopes[1] * s1, slopes[2] * s2)
