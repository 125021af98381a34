"""Rotations and rigid frames, torsion frames, and the placement of atoms (Suppl. Alg. 21, 24, 25).

A frame maps local coordinates to its parent's: ``x -> rotation @ x + translation``. The algebra is
made of products of all components at once and their sums: it never meets a matrix unit, which would
round float32 on some devices, and every operation is a kernel of its own, so that few are best.

Legend: f = 8 rigid groups, n = 7 torsions, n14 and n37 atom slots. Lengths in angstrom.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foldcore import constants
from torchfold._arrays import one_hot, table

Rotation = Float[Tensor, "*batch 3 3"]


def dot(a: Float[Tensor, "*batch 3"], b: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
    """Scalar product of 3-vectors."""
    return torch.sum(a * b, dim=-1)


def distance(
    a: Float[Tensor, "*batch 3"], b: Float[Tensor, "*batch 3"], eps: float
) -> Float[Tensor, "*batch"]:
    """``sqrt(eps + |a - b|^2)``: smooth where the points coincide."""
    return torch.sqrt(eps + torch.sum(torch.square(a - b), dim=-1))


def rotate(rotation: Rotation, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Matrix times vector."""
    return torch.sum(rotation * points[..., None, :], dim=-1)


def multiply(left: Rotation, right: Rotation) -> Rotation:
    """Matrix product: first ``right``, then ``left``."""
    return torch.sum(left[..., None] * right[..., None, :, :], dim=-2)


def quaternion_to_rotation(quaternion: Float[Tensor, "*batch 4"]) -> Rotation:
    """Rotation of a unit quaternion (w, x, y, z); a zero one (padding) gives a zero matrix."""
    coefficients = table("quaternion_to_rotation", quaternion.dtype, quaternion.device)
    products = quaternion[..., :, None] * quaternion[..., None, :]
    return torch.sum(coefficients * products[..., None, None, :, :], dim=(-2, -1))


def multiply_by_vector(
    quaternion: Float[Tensor, "*batch 4"], vector: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 4"]:
    """Quaternion product ``q (0, x, y, z)``."""
    coefficients = table("quaternion_by_vector", vector.dtype, vector.device)
    products = quaternion[..., :, None] * vector[..., None, :]
    return torch.sum(coefficients * products[..., None, :, :], dim=(-2, -1))


@dataclass(frozen=True, slots=True)
class Rigid:
    """Frames: a rotation and a translation each."""

    rotation: Rotation
    translation: Float[Tensor, "*batch 3"]

    def __getitem__(self, index: Any) -> "Rigid":
        """Index the batch axes, as in ``rigid[..., None]`` or ``rigid[-1]``."""
        index = index if isinstance(index, tuple) else (index,)
        if not any(i is Ellipsis for i in index):
            index = (*index, Ellipsis)
        whole = slice(None)
        return Rigid(self.rotation[(*index, whole, whole)], self.translation[(*index, whole)])

    def apply(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Local coordinates to the parent's."""
        return rotate(self.rotation, points) + self.translation

    def invert_apply(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """The parent's coordinates to local ones."""
        return rotate(self.rotation.transpose(-1, -2), points - self.translation)

    def compose(self, other: "Rigid") -> "Rigid":
        """The frame that maps like ``other`` first and ``self`` second."""
        return Rigid(multiply(self.rotation, other.rotation), self.apply(other.translation))

    def invert(self) -> "Rigid":
        """The inverse map."""
        inverse = self.rotation.transpose(-1, -2)
        return Rigid(inverse, -rotate(inverse, self.translation))


def rigid_from_quaternion(tensor: Float[Tensor, "*batch 7"]) -> Rigid:
    """Frames stored as a unit quaternion and a translation."""
    return Rigid(quaternion_to_rotation(tensor[..., :4]), tensor[..., 4:])


def rigid_from_flat12(tensor: Float[Tensor, "*batch 12"]) -> Rigid:
    """Frames stored as nine matrix elements, row by row, and a translation."""
    return Rigid(tensor[..., :9].reshape(*tensor.shape[:-1], 3, 3), tensor[..., 9:])


def rigid_from_3_points(
    negative_x: Float[Tensor, "*batch 3"],
    origin: Float[Tensor, "*batch 3"],
    xy_plane: Float[Tensor, "*batch 3"],
) -> Rigid:
    """Gram-Schmidt frame from a point on -x, the origin and a point with y > 0 (Alg. 21)."""
    ex = _normalize(origin - negative_x)
    towards = xy_plane - origin
    ey = _normalize(towards - dot(towards, ex)[..., None] * ex)
    return Rigid(torch.stack([ex, ey, torch.linalg.cross(ex, ey)], dim=-1), origin)


def _normalize(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    return vector / torch.sqrt(dot(vector, vector) + 1e-8)[..., None]


# From torsions to atoms ---------------------------------------------------------------------------


def torsion_angles_to_frames(
    aatype: Int[Tensor, "*batch r"], backbone: Rigid, angles: Float[Tensor, "*batch r 7 2"]
) -> Rigid:
    """Global frames [.. r 8] of all rigid groups from (sin, cos) (Suppl. Alg. 24, lines 2-10)."""
    default = table("restype_rigid_group_default_frame", angles.dtype, angles.device)[aatype]
    zero = torch.zeros_like(angles[..., :1, :1])
    no_turn = torch.cat([zero, zero + 1], dim=-1)
    turned = _turn_about_x(default[..., :3, :3], torch.cat([no_turn, angles], dim=-2))
    local = Rigid(turned, default[..., :3, 3])
    groups = [local[..., group] for group in range(8)]
    for chi in (5, 6, 7):  # chi2..chi4 hang on the chi before; the others on the backbone
        groups[chi] = groups[chi - 1].compose(groups[chi])
    return backbone[..., None].compose(
        Rigid(
            torch.stack([group.rotation for group in groups], dim=-3),
            torch.stack([group.translation for group in groups], dim=-2),
        )
    )


def _turn_about_x(rotation: Rotation, sin_cos: Float[Tensor, "*batch 2"]) -> Rotation:
    """``rotation`` after a turn about the local x axis (Suppl. Alg. 25)."""
    sine, cosine = sin_cos[..., :1], sin_cos[..., 1:]
    ex, ey, ez = torch.movedim(rotation, -1, 0)
    return torch.stack([ex, cosine * ey + sine * ez, cosine * ez - sine * ey], dim=-1)


def frames_to_atom14(
    aatype: Int[Tensor, "*batch r"], frames: Rigid
) -> Float[Tensor, "*batch r 14 3"]:
    """Idealised atoms placed in the global frames [.. r 8] of their groups (Alg. 24, line 11)."""
    dtype, device = frames.translation.dtype, frames.translation.device
    group = table("restype_atom14_to_rigid_group", torch.int32, device)[aatype]
    # a product with one-hot vectors, because the gradient of a gather is an unordered scatter
    choice = one_hot(group, 8, dtype)
    rotation = torch.sum(choice[..., None, None] * frames.rotation[..., None, :, :, :], dim=-3)
    translation = torch.sum(choice[..., None] * frames.translation[..., None, :, :], dim=-2)
    positions = table("restype_atom14_rigid_group_positions", dtype, device)[aatype]
    mask = table("restype_atom14_mask", dtype, device)[aatype]
    return Rigid(rotation, translation).apply(positions) * mask[..., None]


def atom14_to_atom37(
    atom14: Float[Tensor, "*batch r 14 3"],
    residx_atom37_to_atom14: Int[Tensor, "*batch r 37"],
    atom37_atom_exists: Float[Tensor, "*batch r 37"],
) -> Float[Tensor, "*batch r 37 3"]:
    """Atoms at their atom37 slots; zero where the residue type lacks the atom."""
    gathered = torch.take_along_dim(atom14, residx_atom37_to_atom14.long()[..., None], dim=-2)
    return gathered * atom37_atom_exists[..., None]


# From atoms to torsions ---------------------------------------------------------------------------


class TorsionAngles(NamedTuple):
    """(sin, cos) of pre-omega, phi, psi, chi1..chi4; the same, pi-periodic chis turned; mask."""

    sin_cos: Float[Tensor, "*batch r 7 2"]
    alt_sin_cos: Float[Tensor, "*batch r 7 2"]
    mask: Float[Tensor, "*batch r 7"]


def torsion_angles_from_atom37(
    aatype: Int[Tensor, "*batch r"],
    positions: Float[Tensor, "*batch r 37 3"],
    mask: Float[Tensor, "*batch r 37"],
) -> TorsionAngles:
    """Torsions of atom37 structures (Suppl. 1.7.1, Table 2).

    The residue before is the one before in the array; the first has none. Unknown types and gaps
    count as X, without side chain. Torsions are not masked: absent atoms take part with their
    coordinates (zeros). Differs from DeepMind's code, where two coincident atoms leave a torsion
    to round-off (pre-omega after a gap, of both absent atoms): it is zero here.
    """
    aatype = torch.clamp(aatype, max=constants.unknown_restype)
    points = _torsion_atoms(aatype, positions)
    present = _torsion_atoms(aatype, mask[..., None])[..., 0]
    a0, a1, a2, a3 = (points[..., atom, :] for atom in range(4))
    yz = rigid_from_3_points(a1, a2, a0).invert_apply(a3)[..., 1:]
    sin_cos = yz.flip(-1) / torch.sqrt(torch.sum(yz * yz, dim=-1, keepdim=True) + 1e-8)
    coincident = torch.all(a1 == a0, dim=-1) | torch.all(a1 == a3, dim=-1)
    sin_cos = torch.where(coincident[..., None], 0.0, sin_cos)
    # psi is measured to N(i+1), and O stands opposite to it
    is_psi = torch.arange(7, device=sin_cos.device) == 2
    sin_cos = torch.where(is_psi[:, None], -sin_cos, sin_cos)
    defined = torch.prod(present, dim=-1) * _chi_table("chi_angles_mask", aatype, 1.0, mask)
    periodic = _chi_table("chi_pi_periodic", aatype, 0.0, mask)
    return TorsionAngles(sin_cos, (1 - 2 * periodic)[..., None] * sin_cos, defined)


def _torsion_atoms(
    aatype: Int[Tensor, "*batch r"], atoms: Float[Tensor, "*batch r 37 c"]
) -> Float[Tensor, "*batch r 7 4 c"]:
    """The four atoms of each of the seven torsions."""
    n, ca, c, o = (atoms[..., constants.atom_order[name], :] for name in ("N", "CA", "C", "O"))
    before = torch.zeros_like(atoms[..., :1, 0, :])
    ca_before = torch.cat([before, ca[..., :-1, :]], dim=-2)
    c_before = torch.cat([before, c[..., :-1, :]], dim=-2)
    backbone = [(ca_before, c_before, n, ca), (c_before, n, ca, c), (n, ca, c, o)]
    stacked = torch.stack([torch.stack(four, dim=-2) for four in backbone], dim=-3)
    index = table("chi_atom_indices", torch.int64, atoms.device)[aatype].reshape(*aatype.shape, 16)
    chis = torch.take_along_dim(atoms, index[..., None], dim=-2)
    return torch.cat([stacked, chis.reshape(*aatype.shape, 4, 4, atoms.shape[-1])], dim=-3)


def _chi_table(
    name: str, aatype: Int[Tensor, "*batch r"], backbone: float, like: Float[Tensor, "..."]
) -> Float[Tensor, "*batch r 7"]:
    """A [21, 4] table by residue type, after ``backbone`` for the three backbone torsions."""
    chis = table(name, like.dtype, like.device)[aatype]
    return torch.cat([torch.full_like(chis[..., :3], backbone), chis], dim=-1)
