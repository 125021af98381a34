"""Losses on the predicted structure: FAPE, symmetric atoms, torsions (Suppl. 1.8.5, 1.9.1-1.9.3).

Each loss has one value an example, [b]; nothing mixes examples.

Legend: l structure iterations, f frames, p points. Lengths in angstrom.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foldcore import constants
from torchfold._arrays import table
from torchfold._products import exact_product
from torchfold.rigid import Rigid, distance, rigid_from_flat12, rigid_from_quaternion

LENGTH_SCALE = 10.0  # FAPE counts in units of 1 nm
CLAMP = 10.0

# Atoms whose names a symmetry exchanges sit in a few of the 14 slots; only these need distances.
_AMBIGUOUS_SLOTS = np.flatnonzero(constants.restype_atom14_is_ambiguous.any(axis=0)).tolist()


def masked_mean(
    mask: Float[Tensor, "..."], value: Float[Tensor, "b ..."], eps: float
) -> Float[Tensor, " b"]:
    """Mean of ``value`` where ``mask`` (broadcast against it) counts, for each example."""
    mask = torch.broadcast_to(mask, value.shape)
    axes = tuple(range(1, value.ndim))
    return torch.sum(mask * value, dim=axes) / (eps + torch.sum(mask, dim=axes))


def compute_fape(
    pred_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Float[Tensor, "*batch f"],
    pred_positions: Float[Tensor, "*batch p 3"],
    target_positions: Float[Tensor, "*batch p 3"],
    positions_mask: Float[Tensor, "*batch p"],
    clamped: Float[Tensor, "*batch"] | float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Frame aligned point error (Suppl. Alg. 28), in nanometres.

    ``clamped`` is the share of the error clamped at 10 angstrom; the rest counts in full.
    """
    difference = _local_difference(pred_frames, target_frames, pred_positions, target_positions)
    error = torch.sqrt(1e-4 + torch.sum(torch.square(difference), dim=-2))
    if isinstance(clamped, Tensor):
        clamped = clamped.to(error.dtype)[..., None, None]
    error = torch.lerp(error, torch.clamp(error, max=CLAMP), clamped) / LENGTH_SCALE
    counted = positions_mask.to(error.dtype).expand(error[..., 0, :].shape)
    of_frame = _product(error, counted[..., None])[..., 0]
    pairs = torch.sum(frames_mask, dim=-1) * torch.sum(positions_mask, dim=-1)
    return torch.sum(frames_mask * of_frame, dim=-1) / (1e-4 + pairs)


def _local_difference(
    pred: Rigid, target: Rigid, pred_positions: Tensor, target_positions: Tensor
) -> Float[Tensor, "*batch f 3 p"]:
    """Each predicted point as its frame sees it, less the true one as the true frame does.

    Local coordinates are linear in (x, y, z, 1): one product makes all of them.
    """
    batch, (points, _) = pred_positions.shape[:-2], pred_positions.shape[-2:]
    here, there = pred.invert(), target.invert()
    shift = (here.translation - there.translation)[..., None]
    rotations = here.rotation, (-there.rotation).expand(here.rotation.shape)
    maps = torch.cat([*rotations, shift], dim=-1)
    one = pred_positions.new_ones((*batch, points, 1))
    both = torch.cat([pred_positions, target_positions.expand(pred_positions.shape), one], dim=-1)
    return _product(maps.flatten(-3, -2), both.mT).unflatten(-2, (-1, 3))


def _product(left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]) -> Tensor:
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (left, right))
    return exact_product(*flat).view(*left.shape[:-1], right.shape[-1])


def backbone_fape_loss(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> Float[Tensor, " b"]:
    """FAPE of the backbone after every structure iteration (Suppl. Alg. 20, line 17; 1.11.5)."""
    pred = Rigid(outputs["traj_rotation"], outputs["traj"][..., 4:])
    target = rigid_from_quaternion(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]
    clamped = batch["use_clamped_fape"]
    fape = compute_fape(pred, target, mask, pred.translation, target.translation, mask, clamped)
    return torch.mean(fape, dim=0)


class RenamedGroundTruth(NamedTuple):
    """Ground truth under the naming of symmetric atoms that fits the prediction better."""

    alt_naming_is_better: Float[Tensor, "b r"]
    positions: Float[Tensor, "b r 14 3"]
    exists: Float[Tensor, "b r 14"]
    frames: Rigid  # [b r 8]


def rename_symmetric_ground_truth_atoms(
    batch: Mapping[str, Tensor], atom14_positions: Float[Tensor, "b r 14 3"]
) -> RenamedGroundTruth:
    """Choose the names of symmetric atoms residue by residue (Suppl. Alg. 26)."""
    better = _alt_naming_is_better(batch, atom14_positions.detach())

    def choose(name: str, alternative: str) -> Tensor:
        value = batch[name]
        choice = better.reshape(*better.shape, *[1] * (value.ndim - 2))
        return (1 - choice) * value + choice * batch[alternative]

    return RenamedGroundTruth(
        better,
        choose("atom14_gt_positions", "atom14_alt_gt_positions"),
        choose("atom14_gt_exists", "atom14_alt_gt_exists"),
        rigid_from_flat12(choose("rigidgroups_gt_frames", "rigidgroups_alt_gt_frames")),
    )


def _alt_naming_is_better(
    batch: Mapping[str, Tensor], pred: Float[Tensor, "b r 14 3"]
) -> Float[Tensor, "b r"]:
    """1 where the swapped names agree better with distances to all atoms of certain name."""
    ambiguous, exists = batch["atom14_atom_is_ambiguous"], batch["atom14_gt_exists"]
    mask = _pairs(_ambiguous_slots(exists * ambiguous), exists * (1 - ambiguous))
    pred_distance = _distances_to_all(pred)

    def disagreement(name: str) -> Tensor:
        difference = pred_distance - _distances_to_all(batch[name])
        return torch.sum(mask * torch.sqrt(1e-10 + difference * difference), dim=(2, 3, 4))

    swapped, original = (
        disagreement(name) for name in ("atom14_alt_gt_positions", "atom14_gt_positions")
    )
    return (swapped < original).to(pred.dtype)


def _ambiguous_slots(atoms: Float[Tensor, "b r 14 ..."]) -> Float[Tensor, "b r a ..."]:
    return torch.stack([atoms[:, :, slot] for slot in _AMBIGUOUS_SLOTS], dim=2)


def _distances_to_all(positions: Float[Tensor, "b r 14 3"]) -> Float[Tensor, "b i a j 14"]:
    """Distances of the atoms in the ambiguous slots to every atom."""
    rows = _ambiguous_slots(positions)
    return distance(rows[:, :, :, None, None], positions[:, None, None], 1e-10)


def _pairs(
    rows: Float[Tensor, "b i a"], columns: Float[Tensor, "b j c"]
) -> Float[Tensor, "b i a j c"]:
    return rows[:, :, :, None, None] * columns[:, None, None]


def sidechain_fape_loss(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], renamed: RenamedGroundTruth
) -> Float[Tensor, " b"]:
    """FAPE of all rigid groups and all atoms of the last iteration (Suppl. Alg. 20, line 28)."""

    def flat(x: Tensor, axes: int) -> Tensor:
        return x.reshape(x.shape[0], -1, *x.shape[3 : 3 + axes])

    return compute_fape(
        Rigid(
            flat(outputs["sidechain_frames_rotation"], 2),
            flat(outputs["sidechain_frames_translation"], 1),
        ),
        Rigid(flat(renamed.frames.rotation, 2), flat(renamed.frames.translation, 1)),
        flat(batch["rigidgroups_gt_exists"], 0),
        flat(outputs["final_atom14_positions"], 1),
        flat(renamed.positions, 1),
        flat(renamed.exists, 0),
    )


def chi_loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
    """Side-chain torsions of every iteration, as points on a circle (Suppl. Alg. 27, lines 1-5)."""
    pred = torch.movedim(outputs["angles"], 0, 1)[..., 3:, :]
    truth = torch.stack([torch.sin(batch["chi_angles"]), torch.cos(batch["chi_angles"])], dim=-1)
    periodic = table("chi_pi_periodic", pred.dtype, pred.device)[batch["aatype"]]
    turned = (1 - 2 * periodic)[..., None] * truth
    error = torch.minimum(
        torch.sum((pred - truth[:, None]) ** 2, dim=-1),
        torch.sum((pred - turned[:, None]) ** 2, dim=-1),
    )
    return masked_mean(batch["chi_mask"][:, None], error, 1e-10)


def angle_norm_loss(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> Float[Tensor, " b"]:
    """Keeps raw (sin, cos) pairs near the unit circle (Suppl. Alg. 27, line 6)."""
    raw = torch.movedim(outputs["unnormalized_angles"], 0, 1)
    error = torch.abs(torch.sqrt(torch.sum(raw * raw, dim=-1) + 1e-6) - 1)
    return masked_mean(batch["seq_mask"][:, None, :, None], error, 1e-10)
