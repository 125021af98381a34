"""Labels of a chain from its atoms: frames, torsions, atom14 and pseudo-beta (Suppl. 1.2.6, 1.8).

Everything is computed in float64 and rounded once at the end. Each residue's labels depend on that
residue alone, so a chain may be cropped before or after; only pre-omega and phi look at the
previous residue, and they are not labels.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from foldcore import constants

_EPSILON = 1e-8  # under the square root of each norm, square angstrom


def make_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """All label features of ``foldcore.features`` that follow from a chain's atoms."""
    positions, mask = positions.astype(np.float64), mask.astype(np.float64)
    labels = {
        **atom_layout(aatype),
        **atom14_labels(aatype, positions, mask),
        **rigid_group_labels(aatype, positions, mask),
        **chi_labels(aatype, positions, mask),
    }
    labels["pseudo_beta"], labels["pseudo_beta_mask"] = pseudo_beta(aatype, positions, mask)
    frames, exists = labels["rigidgroups_gt_frames"], labels["rigidgroups_gt_exists"]
    labels["backbone_affine_tensor"] = quaternion_affine(frames[:, 0])
    labels["backbone_affine_mask"] = exists[:, 0]
    return {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in labels.items()}


def atom_layout(aatype: Int[np.ndarray, "r"]) -> dict[str, np.ndarray]:
    """Which atoms each residue type has, and the maps between the two layouts."""
    return {
        "atom14_atom_exists": constants.restype_atom14_mask[aatype],
        "atom37_atom_exists": constants.restype_atom37_mask[aatype],
        "residx_atom14_to_atom37": constants.restype_atom14_to_atom37[aatype],
        "residx_atom37_to_atom14": constants.restype_atom37_to_atom14[aatype],
    }


def atom14_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Atoms in the packed layout, as named and with the ambiguous names exchanged (Alg. 26)."""
    atom37 = constants.restype_atom14_to_atom37[aatype]
    exists = _pick(mask, atom37) * constants.restype_atom14_mask[aatype]
    packed = _pick(positions, atom37) * exists[..., None]
    partner = constants.restype_atom14_renaming[aatype]
    return {
        "atom14_gt_positions": packed,
        "atom14_gt_exists": exists,
        "atom14_alt_gt_positions": _pick(packed, partner),
        "atom14_alt_gt_exists": _pick(exists, partner),
        "atom14_atom_is_ambiguous": constants.restype_atom14_is_ambiguous[aatype],
    }


def _pick(
    atoms: Float[np.ndarray, "r a ..."], index: Int[np.ndarray, "r ..."]
) -> Float[np.ndarray, "r ..."]:
    """Of each residue the atoms at its own index; one flat look-up, several times as fast."""
    rows = np.arange(len(atoms)).reshape(-1, *[1] * (index.ndim - 1)) * atoms.shape[1]
    return atoms.reshape(-1, *atoms.shape[2:]).take(rows + index, axis=0)


def rigid_group_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Frames of the 8 rigid groups, each as a row-major rotation followed by its origin."""
    atoms = constants.restype_rigid_group_atoms[aatype]  # [r, 8, 3]
    group_exists = constants.restype_rigid_group_mask[aatype]
    ambiguous = constants.restype_rigid_group_is_ambiguous[aatype]
    points = _pick(positions, atoms)
    rotation = rotation_from_3_points(points[:, :, 0], points[:, :, 1], points[:, :, 2])
    # The backbone frame has C on +x, where the other groups have their first atom on -x.
    rotation[:, 0] *= np.array([-1.0, 1.0, -1.0])
    half_turn = 1 - 2 * ambiguous[..., None] * np.array([0.0, 1.0, 1.0])  # about x
    origin = points[:, :, 1]
    return {
        "rigidgroups_gt_frames": _flat12(rotation, origin),
        "rigidgroups_alt_gt_frames": _flat12(rotation * half_turn[:, :, None], origin),
        "rigidgroups_gt_exists": _pick(mask, atoms).min(-1) * group_exists,
        "rigidgroups_group_exists": group_exists,
        "rigidgroups_group_is_ambiguous": ambiguous,
    }


def chi_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Side-chain torsions in radians; 0 where undefined."""
    restype = np.minimum(aatype, constants.unknown_restype)
    atoms = constants.chi_atom_indices[restype]  # [r, 4, 4]
    sin_cos = _sin_cos(_pick(positions, atoms))
    chi_mask = _pick(mask, atoms).prod(-1) * constants.chi_angles_mask[restype]
    return {
        "chi_angles": np.arctan2(sin_cos[..., 0], sin_cos[..., 1]) * chi_mask,
        "chi_mask": chi_mask,
    }


def torsion_angles(
    aatype: Int[np.ndarray, "... r"],
    positions: Float[np.ndarray, "... r a37 3"],
    mask: Float[np.ndarray, "... r a37"],
    dtype: Any = np.float32,
) -> tuple[
    Float[np.ndarray, "... r 7 2"], Float[np.ndarray, "... r 7 2"], Float[np.ndarray, "... r 7"]
]:
    """(sin, cos), the same with ambiguous chis turned by pi, and mask of the 7 torsions.

    Order: pre-omega, phi, psi, chi1..chi4. "Previous" is the residue before in the array.
    """
    restype = np.minimum(aatype, constants.unknown_restype)
    points, exists = _torsion_atoms(restype, positions.astype(np.float64), mask)
    sin_cos = _sin_cos(points)
    sin_cos[..., 2, :] *= -1  # psi is measured at O, which lies opposite to the next N
    alternative = sin_cos.copy()
    alternative[..., 3:, :] *= 1 - 2 * constants.chi_pi_periodic[restype][..., None]
    return sin_cos.astype(dtype), alternative.astype(dtype), exists.astype(dtype)


def _sin_cos(points: Float[np.ndarray, "... 4 3"]) -> Float[np.ndarray, "... 2"]:
    """Sine and cosine of the torsion of four atoms."""
    rotation = rotation_from_3_points(points[..., 1, :], points[..., 2, :], points[..., 0, :])
    fourth = np.einsum("...ij,...i->...j", rotation, points[..., 3, :] - points[..., 2, :])
    sin_cos = fourth[..., [2, 1]]
    return sin_cos / np.sqrt((sin_cos**2).sum(-1, keepdims=True) + _EPSILON)


def _torsion_atoms(
    restype: np.ndarray, positions: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The four atoms of each torsion [..., r, 7, 4, 3] and whether all four exist."""
    n, ca, c, o = (constants.atom_order[name] for name in ("N", "CA", "C", "O"))
    chi = constants.chi_atom_indices[restype]  # [..., r, 4, 4]
    chi = chi.reshape(*chi.shape[:-2], 16)

    def gather(atoms: np.ndarray) -> np.ndarray:  # [..., r, 37, k] -> [..., r, 7, 4, k]
        previous = np.zeros_like(atoms)
        previous[..., 1:, :, :] = atoms[..., :-1, :, :]
        pre_omega = np.concatenate([previous[..., [ca, c], :], atoms[..., [n, ca], :]], -2)
        phi = np.concatenate([previous[..., [c], :], atoms[..., [n, ca, c], :]], -2)
        chis = np.take_along_axis(atoms, chi[..., None], -2)
        chis = chis.reshape(*chi.shape[:-1], 4, 4, atoms.shape[-1])
        backbone = np.stack([pre_omega, phi, atoms[..., [n, ca, c, o], :]], -3)
        return np.concatenate([backbone, chis], -3)

    exists = gather(mask[..., None])[..., 0].prod(-1)
    exists[..., 3:] *= constants.chi_angles_mask[restype]
    return gather(positions), exists


def pseudo_beta(
    aatype: Int[np.ndarray, "... r"],
    positions: Float[np.ndarray, "... r a37 3"],
    mask: Float[np.ndarray, "... r a37"],
) -> tuple[Float[np.ndarray, "... r 3"], Float[np.ndarray, "... r"]]:
    """Position and mask of the beta carbon, or of the alpha carbon for glycine."""
    is_glycine = aatype == constants.restype_order["G"]
    ca, cb = constants.atom_order["CA"], constants.atom_order["CB"]
    atoms = np.where(is_glycine[..., None], positions[..., ca, :], positions[..., cb, :])
    return atoms, np.where(is_glycine, mask[..., ca], mask[..., cb])


def rotation_from_3_points(
    negative_x: Float[np.ndarray, "... 3"],
    origin: Float[np.ndarray, "... 3"],
    xy_plane: Float[np.ndarray, "... 3"],
) -> Float[np.ndarray, "... 3 3"]:
    """Rotation with columns e0, e1, e2 by Gram-Schmidt (Alg. 21); zero for coinciding points."""
    e0 = _normalize(origin - negative_x)
    e1 = xy_plane - origin
    e1 = _normalize(e1 - (e1 * e0).sum(-1, keepdims=True) * e0)
    rotation = np.empty((*e0.shape, 3), e0.dtype)
    rotation[..., 0], rotation[..., 1] = e0, e1
    for axis, (first, second) in enumerate(((1, 2), (2, 0), (0, 1))):  # e2 = e0 x e1
        product = e0[..., first] * e1[..., second]
        rotation[..., axis, 2] = product - e0[..., second] * e1[..., first]
    return rotation


def quaternion_affine(frames: Float[np.ndarray, "r 12"]) -> Float[np.ndarray, "r 7"]:
    """Unit quaternion (w, x, y, z) with w >= 0 and translation; identity for a zero rotation."""
    (xx, xy, xz, yx, yy, yz, zx, zy, zz), translation = frames[:, :9].T, frames[:, 9:]
    # Each row of this matrix is 4 q_k q; the row of the largest component is accurate.
    outer = np.stack(
        [
            [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
        ]
    ).transpose(2, 0, 1)
    largest = outer[:, range(4), range(4)].argmax(-1)
    quaternion = outer[np.arange(len(frames)), largest]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    quaternion = quaternion * np.where(quaternion[:, :1] < 0, -1.0, 1.0)
    return np.concatenate([quaternion, translation], -1)


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum(-1, keepdims=True) + _EPSILON)


def _flat12(rotation: np.ndarray, origin: np.ndarray) -> np.ndarray:
    return np.concatenate([rotation.reshape(*rotation.shape[:-2], 9), origin], -1)
