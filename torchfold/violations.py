"""Structural violations of the predicted atoms (Suppl. 1.9.11, eqs. 44-46).

Legend: a and c atom slots. Lengths in angstrom, angles as cosines.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from foldcore import constants
from torchfold._arrays import table
from torchfold.rigid import distance, dot
from torchfold.structure_losses import masked_mean

TOLERANCE = 12.0  # standard deviations a bond or an angle may be off
OVERLAP = 1.5  # how far two van der Waals spheres may overlap
_N, _CA, _C, _SG = 0, 1, 2, 5  # atom14 slots; SG is slot 5 of CYS
_PROLINE = constants.restype_order["P"]


def structural_violation_loss(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], ca_c_n_stddev: float
) -> Float[Tensor, " b"]:
    """Peptide bonds and angles, clashes, and distances within residues (Suppl. 1.9.11).

    ``ca_c_n_stddev`` is the deviation of the cosine of the CA-C-N angle.
    """
    positions = outputs["final_atom14_positions"]
    between = between_residue_bond_loss(positions, batch, ca_c_n_stddev)
    # both partners of a clash count; within a residue both orders of a pair count as well
    clashes = 2 * between_residue_clash_loss(positions, batch)
    within = 2 * within_residue_loss(positions, batch)
    atoms = torch.sum(batch["atom14_atom_exists"], dim=(1, 2))
    return between + (clashes + within) / (1e-6 + atoms)


def between_residue_bond_loss(
    positions: Float[Tensor, "b r 14 3"], batch: Mapping[str, Tensor], ca_c_n_stddev: float
) -> Float[Tensor, " b"]:
    """C-N length and CA-C-N, C-N-CA angles between consecutive residues (eqs. 44 and 45)."""
    exists = batch["atom14_atom_exists"]
    ca, c, n_next, ca_next = _peptide(positions)
    has_ca, has_c, has_n_next, has_ca_next = _peptide(exists)
    index = batch["residue_index"]
    bonded = (index[:, 1:] - index[:, :-1] == 1).to(positions.dtype) * has_c * has_n_next

    length = distance(c, n_next, 1e-6)
    to_ca = (ca - c) / distance(ca, c, 1e-6)[..., None]
    to_n = (n_next - c) / length[..., None]
    onward = (ca_next - n_next) / distance(n_next, ca_next, 1e-6)[..., None]

    proline = (batch["aatype"][:, 1:] == _PROLINE).to(positions.dtype)
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


def _peptide(atoms: Float[Tensor, "b r 14 ..."]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CA and C of each residue but the last, with N and CA of the next."""
    this, following = atoms[:, :-1], atoms[:, 1:]
    return this[:, :, _CA], this[:, :, _C], following[:, :, _N], following[:, :, _CA]


def _blend(proline: Float[Tensor, "b r"], values: tuple[float, float]) -> Float[Tensor, "b r"]:
    return (1 - proline) * values[0] + proline * values[1]


def _excess(
    value: Float[Tensor, "b r"], mean: Float[Tensor, "b r"] | float, stddev: Tensor | float
) -> Float[Tensor, "b r"]:
    """How far ``value`` lies outside the tolerated band."""
    return torch.relu(torch.sqrt(1e-6 + (value - mean) ** 2) - TOLERANCE * stddev)


def between_residue_clash_loss(
    positions: Float[Tensor, "b r 14 3"], batch: Mapping[str, Tensor]
) -> Float[Tensor, " b"]:
    """Overlap of atoms of different residues, each pair once (eq. 46).

    Differs from the supplement, as DeepMind's code does: besides the peptide bond, every pair of
    two atoms in the slot of CYS SG is left out, whatever the residue types.
    """
    exists, index = batch["atom14_atom_exists"], batch["residue_index"]
    step = (index[:, None, :] - index[:, :, None])[:, :, None, :, None]
    slot = torch.arange(14, device=index.device)
    row, column = slot[:, None, None], slot[None, None, :]
    peptide_bond = (step == 1) & (row == _C) & (column == _N)
    counted = (step > 0) & ~peptide_bond & ~((row == _SG) & (column == _SG))
    radius = table("restype_atom14_radius", positions.dtype, positions.device)[batch["aatype"]]
    allowed = radius[:, :, :, None, None] + radius[:, None, None] - OVERLAP
    overlap = torch.relu(
        allowed - distance(positions[:, :, :, None, None], positions[:, None, None], 1e-10)
    )
    mask = counted * exists[:, :, :, None, None] * exists[:, None, None]
    return torch.sum(mask * overlap, dim=(1, 2, 3, 4))


def within_residue_loss(
    positions: Float[Tensor, "b r 14 3"], batch: Mapping[str, Tensor]
) -> Float[Tensor, " b"]:
    """Distances outside their limits within residues; each pair counts in both orders (eq. 46)."""
    exists = batch["atom14_atom_exists"]
    dtype, device = positions.dtype, positions.device
    bounds = table("atom14_distance_bounds", dtype, device, OVERLAP, TOLERANCE)
    lower, upper = bounds[:, batch["aatype"]]
    length = distance(positions[:, :, :, None], positions[:, :, None], 1e-10)
    outside = torch.relu(lower - length) + torch.relu(length - upper)
    other = 1 - torch.eye(14, dtype=dtype, device=device)
    mask = other * exists[:, :, :, None] * exists[:, :, None]
    return torch.sum(mask * outside, dim=(1, 2, 3))
