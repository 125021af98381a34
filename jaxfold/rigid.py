"""Rotations and rigid frames, torsion frames, and the placement of atoms (Suppl. Alg. 21, 24, 25).

A frame maps local coordinates to its parent's: ``x -> rotation @ x + translation``. The algebra is
written out by component: it never meets a matrix unit, which would round float32 on some devices,
and without reductions of length 3 the compiler can fuse a loss over frames and atoms into one loop.

Legend: f = 8 rigid groups, n = 7 torsions, n14 and n37 atom slots. Lengths in angstrom.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foldcore import constants

Rotation = Float[Array, "*batch 3 3"]


def dot(a: Float[Array, "*batch 3"], b: Float[Array, "*batch 3"]) -> Float[Array, "*batch"]:
    """Scalar product of 3-vectors."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def distance(
    a: Float[Array, "*batch 3"], b: Float[Array, "*batch 3"], eps: float
) -> Float[Array, "*batch"]:
    """``sqrt(eps + |a - b|^2)``: smooth where the points coincide."""
    return jnp.sqrt(eps + dot(a - b, a - b))


def rotate(rotation: Rotation, points: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Matrix times vector."""
    x, y, z = points[..., 0:1], points[..., 1:2], points[..., 2:3]
    return rotation[..., 0] * x + rotation[..., 1] * y + rotation[..., 2] * z


def multiply(left: Rotation, right: Rotation) -> Rotation:
    """Matrix product: first ``right``, then ``left``."""
    x, y, z = (left[..., :, k, None] * right[..., None, k, :] for k in range(3))
    return x + y + z


def quaternion_to_rotation(quaternion: Float[Array, "*batch 4"]) -> Rotation:
    """Rotation of a unit quaternion (w, x, y, z); a zero one (padding) gives a zero matrix."""
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    ww, xx, yy, zz = w * w, x * x, y * y, z * z
    rows = [
        [ww + xx - yy - zz, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), ww - xx + yy - zz, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), ww - xx - yy + zz],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def multiply_by_vector(
    quaternion: Float[Array, "*batch 4"], vector: Float[Array, "*batch 3"]
) -> Float[Array, "*batch 4"]:
    """Quaternion product ``q (0, x, y, z)``."""
    real, imaginary = quaternion[..., :1], quaternion[..., 1:]
    scalar = -dot(imaginary, vector)[..., None]
    return jnp.concatenate([scalar, real * vector + jnp.cross(imaginary, vector)], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Rigid:
    """Frames: a rotation and a translation each."""

    rotation: Rotation
    translation: Float[Array, "*batch 3"]

    def __getitem__(self, index: Any) -> "Rigid":
        """Index the batch axes, as in ``rigid[..., None]`` or ``rigid[-1]``."""
        index = index if isinstance(index, tuple) else (index,)
        if not any(i is Ellipsis for i in index):
            index = (*index, Ellipsis)
        whole = slice(None)
        return Rigid(self.rotation[(*index, whole, whole)], self.translation[(*index, whole)])

    def apply(self, points: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
        """Local coordinates to the parent's."""
        return rotate(self.rotation, points) + self.translation

    def invert_apply(self, points: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
        """The parent's coordinates to local ones."""
        return rotate(self.rotation.swapaxes(-1, -2), points - self.translation)

    def compose(self, other: "Rigid") -> "Rigid":
        """The frame that maps like ``other`` first and ``self`` second."""
        return Rigid(multiply(self.rotation, other.rotation), self.apply(other.translation))

    def invert(self) -> "Rigid":
        """The inverse map."""
        inverse = self.rotation.swapaxes(-1, -2)
        return Rigid(inverse, -rotate(inverse, self.translation))


def rigid_from_quaternion(tensor: Float[Array, "*batch 7"]) -> Rigid:
    """Frames stored as a unit quaternion and a translation."""
    return Rigid(quaternion_to_rotation(tensor[..., :4]), tensor[..., 4:])


def rigid_from_flat12(tensor: Float[Array, "*batch 12"]) -> Rigid:
    """Frames stored as nine matrix elements, row by row, and a translation."""
    return Rigid(tensor[..., :9].reshape(*tensor.shape[:-1], 3, 3), tensor[..., 9:])


def rigid_from_3_points(
    negative_x: Float[Array, "*batch 3"],
    origin: Float[Array, "*batch 3"],
    xy_plane: Float[Array, "*batch 3"],
) -> Rigid:
    """Gram-Schmidt frame from a point on -x, the origin and a point with y > 0 (Alg. 21)."""
    ex = _normalize(origin - negative_x)
    towards = xy_plane - origin
    ey = _normalize(towards - dot(towards, ex)[..., None] * ex)
    return Rigid(jnp.stack([ex, ey, jnp.cross(ex, ey)], axis=-1), origin)


def _normalize(vector: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    return vector / jnp.sqrt(dot(vector, vector) + 1e-8)[..., None]


# From torsions to atoms ---------------------------------------------------------------------------


def torsion_angles_to_frames(
    aatype: Int[Array, "*batch r"], backbone: Rigid, angles: Float[Array, "*batch r 7 2"]
) -> Rigid:
    """Global frames [.. r 8] of all rigid groups from (sin, cos) (Suppl. Alg. 24, lines 2-10)."""
    table = jnp.asarray(constants.restype_rigid_group_default_frame, angles.dtype)[aatype]
    no_turn = jnp.broadcast_to(jnp.array([0.0, 1.0], angles.dtype), (*aatype.shape, 1, 2))
    turned = _turn_about_x(table[..., :3, :3], jnp.concatenate([no_turn, angles], axis=-2))
    local = Rigid(turned, table[..., :3, 3])
    groups = [local[..., group] for group in range(8)]
    for chi in (5, 6, 7):  # chi2..chi4 hang on the chi before; the others on the backbone
        groups[chi] = groups[chi - 1].compose(groups[chi])
    return backbone[..., None].compose(
        Rigid(
            jnp.stack([group.rotation for group in groups], axis=-3),
            jnp.stack([group.translation for group in groups], axis=-2),
        )
    )


def _turn_about_x(rotation: Rotation, sin_cos: Float[Array, "*batch 2"]) -> Rotation:
    """``rotation`` after a turn about the local x axis (Suppl. Alg. 25)."""
    sine, cosine = sin_cos[..., :1], sin_cos[..., 1:]
    ex, ey, ez = jnp.moveaxis(rotation, -1, 0)
    return jnp.stack([ex, cosine * ey + sine * ez, cosine * ez - sine * ey], axis=-1)


def frames_to_atom14(
    aatype: Int[Array, "*batch r"], frames: Rigid
) -> Float[Array, "*batch r 14 3"]:
    """Idealised atoms placed in the global frames [.. r 8] of their groups (Alg. 24, line 11)."""
    dtype = frames.translation.dtype
    group = jnp.asarray(constants.restype_atom14_to_rigid_group)[aatype]
    # a product with one-hot vectors, because the gradient of a gather is an unordered scatter
    choice = jax.nn.one_hot(group, 8, dtype=dtype)
    rotation = jnp.sum(choice[..., None, None] * frames.rotation[..., None, :, :, :], axis=-3)
    translation = jnp.sum(choice[..., None] * frames.translation[..., None, :, :], axis=-2)
    positions = jnp.asarray(constants.restype_atom14_rigid_group_positions, dtype)[aatype]
    mask = jnp.asarray(constants.restype_atom14_mask, dtype)[aatype]
    return Rigid(rotation, translation).apply(positions) * mask[..., None]


def atom14_to_atom37(
    atom14: Float[Array, "*batch r 14 3"],
    residx_atom37_to_atom14: Int[Array, "*batch r 37"],
    atom37_atom_exists: Float[Array, "*batch r 37"],
) -> Float[Array, "*batch r 37 3"]:
    """Atoms at their atom37 slots; zero where the residue type lacks the atom."""
    gathered = jnp.take_along_axis(atom14, residx_atom37_to_atom14[..., None], axis=-2)
    return gathered * atom37_atom_exists[..., None]


# From atoms to torsions ---------------------------------------------------------------------------


class TorsionAngles(NamedTuple):
    """(sin, cos) of pre-omega, phi, psi, chi1..chi4; the same, pi-periodic chis turned; mask."""

    sin_cos: Float[Array, "*batch r 7 2"]
    alt_sin_cos: Float[Array, "*batch r 7 2"]
    mask: Float[Array, "*batch r 7"]


def torsion_angles_from_atom37(
    aatype: Int[Array, "*batch r"],
    positions: Float[Array, "*batch r 37 3"],
    mask: Float[Array, "*batch r 37"],
) -> TorsionAngles:
    """Torsions of atom37 structures (Suppl. 1.7.1, Table 2).

    The residue before is the one before in the array; the first has none. Unknown types and gaps
    count as X, without side chain. Torsions are not masked: absent atoms take part with their
    coordinates (zeros). Differs from DeepMind's code, where two coincident atoms leave a torsion
    to round-off (pre-omega after a gap, of both absent atoms): it is zero here.
    """
    aatype = jnp.minimum(aatype, constants.unknown_restype)
    points = _torsion_atoms(aatype, positions)
    present = _torsion_atoms(aatype, mask[..., None])[..., 0]
    a0, a1, a2, a3 = (points[..., atom, :] for atom in range(4))
    yz = rigid_from_3_points(a1, a2, a0).invert_apply(a3)[..., 1:]
    sin_cos = yz[..., ::-1] / jnp.sqrt(jnp.sum(yz * yz, axis=-1, keepdims=True) + 1e-8)
    coincident = jnp.all(a1 == a0, axis=-1) | jnp.all(a1 == a3, axis=-1)
    sin_cos = jnp.where(coincident[..., None], 0, sin_cos)
    # psi is measured to N(i+1), and O stands opposite to it
    sin_cos = sin_cos * jnp.array([1, 1, -1, 1, 1, 1, 1], sin_cos.dtype)[:, None]
    defined = jnp.prod(present, axis=-1) * _chi_table(constants.chi_angles_mask, aatype, 1.0, mask)
    periodic = _chi_table(constants.chi_pi_periodic, aatype, 0.0, mask)
    return TorsionAngles(sin_cos, (1 - 2 * periodic)[..., None] * sin_cos, defined)


def _torsion_atoms(
    aatype: Int[Array, "*batch r"], atoms: Float[Array, "*batch r 37 c"]
) -> Float[Array, "*batch r 7 4 c"]:
    """The four atoms of each of the seven torsions."""
    n, ca, c, o = (atoms[..., constants.atom_order[name], :] for name in ("N", "CA", "C", "O"))
    before = jnp.zeros_like(atoms[..., :1, 0, :])
    ca_before = jnp.concatenate([before, ca[..., :-1, :]], axis=-2)
    c_before = jnp.concatenate([before, c[..., :-1, :]], axis=-2)
    backbone = [(ca_before, c_before, n, ca), (c_before, n, ca, c), (n, ca, c, o)]
    stacked = jnp.stack([jnp.stack(four, axis=-2) for four in backbone], axis=-3)
    index = jnp.asarray(constants.chi_atom_indices)[aatype].reshape(*aatype.shape, 16)
    chis = jnp.take_along_axis(atoms, index[..., None], axis=-2)
    return jnp.concatenate([stacked, chis.reshape(*aatype.shape, 4, 4, atoms.shape[-1])], axis=-3)


def _chi_table(
    table: Any, aatype: Int[Array, "*batch r"], backbone: float, like: Float[Array, "..."]
) -> Float[Array, "*batch r 7"]:
    """A [21, 4] table by residue type, after ``backbone`` for the three backbone torsions."""
    chis = jnp.asarray(table, like.dtype)[aatype]
    return jnp.concatenate([jnp.full((*aatype.shape, 3), backbone, like.dtype), chis], axis=-1)
