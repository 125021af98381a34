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
_GROUP_ATOMS = np.ascontiguousarray(constants.restype_rigid_group_atoms.transpose(2, 0, 1))
_CHI_ATOMS = np.ascontiguousarray(constants.chi_atom_indices.transpose(2, 0, 1))
_HALF_TURN = np.array([1.0, -1.0, -1.0] * 3 + [1.0] * 3)  # of a frame, about x


def make_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """All label features of ``foldcore.features`` that follow from a chain's atoms."""
    # coordinate by coordinate, which numpy computes with several times as fast
    coordinates = positions.reshape(-1, 3).T.astype(np.float64, order="C")
    # what only copies atoms may round them before
    positions, mask = positions.astype(dtype, copy=False), mask.astype(dtype, copy=False)
    labels = {
        **atom_layout(aatype),
        **atom14_labels(aatype, positions, mask),
        **rigid_group_labels(aatype, coordinates, mask),
        **chi_labels(aatype, coordinates, mask),
    }
    labels["pseudo_beta"], labels["pseudo_beta_mask"] = pseudo_beta(aatype, positions, mask)
    frames, exists = labels["rigidgroups_gt_frames"], labels["rigidgroups_gt_exists"]
    labels["backbone_affine_tensor"] = quaternion_affine(frames[:, 0])
    labels["backbone_affine_mask"] = exists[:, 0]
    return {k: v.astype(dtype, copy=False) if v.dtype.kind == "f" else v for k, v in labels.items()}


def atom_layout(aatype: Int[np.ndarray, "r"]) -> dict[str, np.ndarray]:
    """Which atoms each residue type has, and the maps between the two layouts."""
    return {
        "atom14_atom_exists": constants.restype_atom14_mask.take(aatype, 0),
        "atom37_atom_exists": constants.restype_atom37_mask.take(aatype, 0),
        "residx_atom14_to_atom37": constants.restype_atom14_to_atom37.take(aatype, 0),
        "residx_atom37_to_atom14": constants.restype_atom37_to_atom14.take(aatype, 0),
    }


def atom14_labels(
    aatype: Int[np.ndarray, "r"],
    positions: Float[np.ndarray, "r a37 3"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Atoms in the packed layout, as named and with the ambiguous names exchanged (Alg. 26)."""
    atom37 = constants.restype_atom14_to_atom37.take(aatype, 0)
    exists = _pick(mask, atom37) * constants.restype_atom14_mask.take(aatype, 0)
    packed = _pick(positions, atom37) * exists[..., None]
    partner = constants.restype_atom14_renaming.take(aatype, 0)
    return {
        "atom14_gt_positions": packed,
        "atom14_gt_exists": exists,
        "atom14_alt_gt_positions": _pick(packed, partner),
        "atom14_alt_gt_exists": _pick(exists, partner),
        "atom14_atom_is_ambiguous": constants.restype_atom14_is_ambiguous.take(aatype, 0),
    }


def _pick(
    atoms: Float[np.ndarray, "r a ..."], index: Int[np.ndarray, "r a14"]
) -> Float[np.ndarray, "r a14 ..."]:
    """Of each residue the atoms at its own index; one flat look-up, several times as fast."""
    rows = np.arange(len(atoms))[:, None] * atoms.shape[1]
    return atoms.reshape(-1, *atoms.shape[2:]).take(rows + index, axis=0)


def _pick_each(
    aatype: Int[np.ndarray, "r"],
    table: Int[np.ndarray, "points 21 g"],
    coordinates: Float[np.ndarray, "3 r*a37"],
    mask: Float[np.ndarray, "r a37"],
) -> tuple[Float[np.ndarray, "3 points r g"], Float[np.ndarray, "points r g"]]:
    """The atoms that define each group of each residue."""
    index = table.take(aatype, 1) + np.arange(0, mask.size, mask.shape[1])[:, None]
    return coordinates.take(index, 1), mask.take(index)


def rigid_group_labels(
    aatype: Int[np.ndarray, "r"],
    coordinates: Float[np.ndarray, "3 r*a37"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Frames of the 8 rigid groups, each as a row-major rotation followed by its origin."""
    points, exists = _pick_each(aatype, _GROUP_ATOMS, coordinates, mask)
    group_exists = constants.restype_rigid_group_mask.take(aatype, 0)
    ambiguous = constants.restype_rigid_group_is_ambiguous.take(aatype, 0)
    axes = rotation_from_3_points(points[:, 0], points[:, 1], points[:, 2])
    # The backbone frame has C on +x, where the other groups have their first atom on -x.
    axes[::2, :, :, 0] *= -1
    frames = np.empty((*ambiguous.shape, 4, 3))
    frames[..., :3, :] = axes.transpose(2, 3, 1, 0)
    frames[..., 3, :] = points[:, 1].transpose(1, 2, 0)
    frames = frames.reshape(*ambiguous.shape, 12)
    alternative = frames.copy()
    alternative[ambiguous > 0] *= _HALF_TURN
    return {
        "rigidgroups_gt_frames": frames,
        "rigidgroups_alt_gt_frames": alternative,
        "rigidgroups_gt_exists": np.minimum(np.minimum(*exists[:2]), exists[2]) * group_exists,
        "rigidgroups_group_exists": group_exists,
        "rigidgroups_group_is_ambiguous": ambiguous,
    }


def chi_labels(
    aatype: Int[np.ndarray, "r"],
    coordinates: Float[np.ndarray, "3 r*a37"],
    mask: Float[np.ndarray, "r a37"],
) -> dict[str, np.ndarray]:
    """Side-chain torsions in radians; 0 where undefined."""
    points, exists = _pick_each(aatype, _CHI_ATOMS, coordinates, mask)
    sin, cos = _sin_cos(points)
    chi_mask = exists[0] * exists[1] * exists[2] * exists[3]
    chi_mask *= constants.chi_angles_mask.take(aatype, 0)
    return {"chi_angles": np.arctan2(sin, cos) * chi_mask, "chi_mask": chi_mask}


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
    sin_cos = np.stack(_sin_cos(points.transpose(-1, -2, *range(points.ndim - 2))), -1)
    sin_cos[..., 2, :] *= -1  # psi is measured at O, which lies opposite to the next N
    alternative = sin_cos.copy()
    alternative[..., 3:, :] *= 1 - 2 * constants.chi_pi_periodic[restype][..., None]
    return sin_cos.astype(dtype), alternative.astype(dtype), exists.astype(dtype)


def _sin_cos(
    points: Float[np.ndarray, "3 4 ..."],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Sine and cosine of the torsion of four atoms."""
    _, e1, e2 = rotation_from_3_points(points[:, 1], points[:, 2], points[:, 0])
    fourth = points[:, 3] - points[:, 2]
    sin, cos = _dot(e2, fourth) + 0.0, _dot(e1, fourth) + 0.0  # never -0: it has another angle
    norm = np.sqrt(sin * sin + cos * cos + _EPSILON)
    return sin / norm, cos / norm


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
    negative_x: Float[np.ndarray, "3 ..."],
    origin: Float[np.ndarray, "3 ..."],
    xy_plane: Float[np.ndarray, "3 ..."],
) -> Float[np.ndarray, "3 3 ..."]:
    """The axes e0, e1, e2 of a frame by Gram-Schmidt (Alg. 21); zero for coinciding points."""
    axes = np.empty((3, *origin.shape), origin.dtype)
    e0, e1, e2 = axes
    _normalize(origin - negative_x, e0)
    in_plane = xy_plane - origin
    in_plane -= _dot(in_plane, e0) * e0
    _normalize(in_plane, e1)
    for axis, (first, second) in enumerate(((1, 2), (2, 0), (0, 1))):  # e2 = e0 x e1
        np.subtract(e0[first] * e1[second], e0[second] * e1[first], out=e2[axis])
    return axes


def quaternion_affine(frames: Float[np.ndarray, "r 12"]) -> Float[np.ndarray, "r 7"]:
    """Unit quaternion (w, x, y, z) with w >= 0 and translation; identity for a zero rotation."""
    (xx, xy, xz, yx, yy, yz, zx, zy, zz), translation = frames[:, :9].T, frames[:, 9:]
    # Each row of this symmetric matrix is 4 q_k q; the row of the largest component is accurate.
    outer = np.array(
        [
            [1 + xx + yy + zz, wx := zy - yz, wy := xz - zx, wz := yx - xy],
            [wx, 1 + xx - yy - zz, qxy := xy + yx, qxz := xz + zx],
            [wy, qxy, 1 - xx + yy - zz, qyz := yz + zy],
            [wz, qxz, qyz, 1 - xx - yy + zz],
        ]
    )
    largest = outer[range(4), range(4)].argmax(0)
    quaternion = outer[:, largest, np.arange(len(frames))]
    w, x, y, z = quaternion * quaternion
    quaternion /= np.sqrt(w + x + y + z)
    quaternion *= np.where(quaternion[0] < 0, -1.0, 1.0)
    return np.concatenate([quaternion.T, translation], -1)


def _normalize(vector: np.ndarray, out: np.ndarray) -> None:
    np.divide(vector, np.sqrt(_dot(vector, vector) + _EPSILON), out=out)


def _dot(a: Float[np.ndarray, "3 ..."], b: Float[np.ndarray, "3 ..."]) -> Float[np.ndarray, "..."]:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
