"""Structural violations of the predicted atoms (Suppl. 1.9.11, eqs. 44-46).

Legend: a and c atom slots. Lengths in angstrom, angles as cosines.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from foldcore import constants
from jaxfold.rigid import distance, dot
from jaxfold.structure_losses import masked_mean

TOLERANCE = 12.0  # standard deviations a bond or an angle may be off
OVERLAP = 1.5  # how far two van der Waals spheres may overlap
_N, _CA, _C, _SG = 0, 1, 2, 5  # atom14 slots; SG is slot 5 of CYS
_PROLINE = constants.restype_order["P"]


def structural_violation_loss(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], ca_c_n_stddev: float
) -> Float[Array, " b"]:
    """Peptide bonds and angles, clashes, and distances within residues (Suppl. 1.9.11).

    ``ca_c_n_stddev`` is the deviation of the cosine of the CA-C-N angle.
    """
    positions = outputs["final_atom14_positions"]
    between = between_residue_bond_loss(positions, batch, ca_c_n_stddev)
    # both partners of a clash count; within a residue both orders of a pair count as well
    clashes = 2 * between_residue_clash_loss(positions, batch)
    within = 2 * within_residue_loss(positions, batch)
    atoms = jnp.sum(batch["atom14_atom_exists"], axis=(1, 2))
    return between + (clashes + within) / (1e-6 + atoms)


def between_residue_bond_loss(
    positions: Float[Array, "b r 14 3"], batch: Mapping[str, Array], ca_c_n_stddev: float
) -> Float[Array, " b"]:
    """C-N length and CA-C-N, C-N-CA angles between consecutive residues (eqs. 44 and 45)."""
    exists = batch["atom14_atom_exists"]
    ca, c, n_next, ca_next = _peptide(positions)
    has_ca, has_c, has_n_next, has_ca_next = _peptide(exists)
    index = batch["residue_index"]
    bonded = (index[:, 1:] - index[:, :-1] == 1).astype(positions.dtype) * has_c * has_n_next

    length = distance(c, n_next, 1e-6)
    to_ca = (ca - c) / distance(ca, c, 1e-6)[..., None]
    to_n = (n_next - c) / length[..., None]
    onward = (ca_next - n_next) / distance(n_next, ca_next, 1e-6)[..., None]

    proline = (batch["aatype"][:, 1:] == _PROLINE).astype(positions.dtype)
    mean_length = _blend(proline, constants.between_res_bond_length_c_n)
    stddev = _blend(proline, constants.between_res_bond_length_stddev_c_n)
    mean_ca_c_n = constants.between_res_cos_angles_ca_c_n[0]
    mean_c_n_ca, c_n_ca_stddev = constants.between_res_cos_angles_c_n_ca
    bond = _excess(length, mean_length, stddev)
    angle_at_c = _excess(dot(to_ca, to_n), mean_ca_c_n, ca_c_n_stddev)
    angle_at_n = _excess(-dot(to_n, onward), mean_c_n_ca, c_n_ca_stddev)
    return (
        masked_mean(bonded, bond, 1e-6)
        + masked_mean(bonded * has_ca, angle_at_c, 1e-6)
        + masked_mean(bonded * has_ca_next, angle_at_n, 1e-6)
    )


def _peptide(atoms: Float[Array, "b r 14 ..."]) -> tuple[Array, Array, Array, Array]:
    """CA and C of each residue but the last, with N and CA of the next."""
    this, following = atoms[:, :-1], atoms[:, 1:]
    return this[:, :, _CA], this[:, :, _C], following[:, :, _N], following[:, :, _CA]


def _blend(proline: Float[Array, "b r"], values: tuple[float, float]) -> Float[Array, "b r"]:
    return (1 - proline) * values[0] + proline * values[1]


def _excess(
    value: Float[Array, "b r"], mean: Float[Array, "b r"] | float, stddev: Array | float
) -> Float[Array, "b r"]:
    """How far ``value`` lies outside the tolerated band."""
    return jax.nn.relu(jnp.sqrt(1e-6 + (value - mean) ** 2) - TOLERANCE * stddev)


def between_residue_clash_loss(
    positions: Float[Array, "b r 14 3"], batch: Mapping[str, Array]
) -> Float[Array, " b"]:
    """Overlap of atoms of different residues, each pair once (eq. 46).

    Differs from the supplement, as DeepMind's code does: besides the peptide bond, every pair of
    two atoms in the slot of CYS SG is left out, whatever the residue types.
    """
    exists, index = batch["atom14_atom_exists"], batch["residue_index"]
    step = (index[:, None, :] - index[:, :, None])[:, :, None, :, None]
    slot = jnp.arange(14)
    row, column = slot[:, None, None], slot[None, None, :]
    peptide_bond = (step == 1) & (row == _C) & (column == _N)
    counted = (step > 0) & ~peptide_bond & ~((row == _SG) & (column == _SG))
    radius = jnp.asarray(constants.restype_atom14_radius, positions.dtype)[batch["aatype"]]
    allowed = radius[:, :, :, None, None] + radius[:, None, None] - OVERLAP
    overlap = jax.nn.relu(
        allowed - distance(positions[:, :, :, None, None], positions[:, None, None], 1e-10)
    )
    mask = counted * exists[:, :, :, None, None] * exists[:, None, None]
    return jnp.sum(mask * overlap, axis=(1, 2, 3, 4))


def within_residue_loss(
    positions: Float[Array, "b r 14 3"], batch: Mapping[str, Array]
) -> Float[Array, " b"]:
    """Distances outside their limits within residues; each pair counts in both orders (eq. 46)."""
    exists = batch["atom14_atom_exists"]
    lower, upper = (
        jnp.asarray(table, positions.dtype)[batch["aatype"]]
        for table in constants.atom14_distance_bounds(OVERLAP, TOLERANCE)
    )
    length = distance(positions[:, :, :, None], positions[:, :, None], 1e-10)
    outside = jax.nn.relu(lower - length) + jax.nn.relu(length - upper)
    other = 1 - jnp.eye(14, dtype=positions.dtype)
    mask = other * exists[:, :, :, None] * exists[:, :, None]
    return jnp.sum(mask * outside, axis=(1, 2, 3))
