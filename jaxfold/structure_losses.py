"""Losses on the predicted structure: FAPE, symmetric atoms, torsions (Suppl. 1.8.5, 1.9.1-1.9.3).

Each loss has one value an example, [b]; nothing mixes examples.

Legend: l structure iterations, f frames, p points. Lengths in angstrom.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from foldcore import constants
from jaxfold.rigid import Rigid, distance, rigid_from_flat12, rigid_from_quaternion

LENGTH_SCALE = 10.0  # FAPE counts in units of 1 nm
CLAMP = 10.0

# Atoms whose names a symmetry exchanges sit in a few of the 14 slots; only these need distances.
# int32 means the same in and out of JAX's 64-bit mode, which tests switch within a process.
_AMBIGUOUS_SLOTS = np.flatnonzero(constants.restype_atom14_is_ambiguous.any(axis=0)).astype(
    np.int32
)


def masked_mean(
    mask: Float[Array, "..."], value: Float[Array, "b ..."], eps: float
) -> Float[Array, " b"]:
    """Mean of ``value`` where ``mask`` (broadcast against it) counts, for each example."""
    mask = jnp.broadcast_to(mask, value.shape)
    axes = tuple(range(1, value.ndim))
    return jnp.sum(mask * value, axis=axes) / (eps + jnp.sum(mask, axis=axes))


def compute_fape(
    pred_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Float[Array, "*batch f"],
    pred_positions: Float[Array, "*batch p 3"],
    target_positions: Float[Array, "*batch p 3"],
    positions_mask: Float[Array, "*batch p"],
    clamped: Float[Array, "*batch"] | float = 1.0,
) -> Float[Array, "*batch"]:
    """Frame aligned point error (Suppl. Alg. 28), in nanometres.

    ``clamped`` is the share of the error clamped at 10 angstrom; the rest counts in full.
    """
    pred_local = pred_frames[..., None].invert_apply(pred_positions[..., None, :, :])
    target_local = target_frames[..., None].invert_apply(target_positions[..., None, :, :])
    error = distance(pred_local, target_local, 1e-4)
    share = jnp.asarray(clamped, error.dtype)[..., None, None]
    error = share * jnp.minimum(error, CLAMP) + (1 - share) * error
    weighted = frames_mask[..., :, None] * positions_mask[..., None, :] * error / LENGTH_SCALE
    pairs = jnp.sum(frames_mask, axis=-1) * jnp.sum(positions_mask, axis=-1)
    return jnp.sum(weighted, axis=(-2, -1)) / (1e-4 + pairs)


def backbone_fape_loss(
    outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> Float[Array, " b"]:
    """FAPE of the backbone after every structure iteration (Suppl. Alg. 20, line 17; 1.11.5)."""
    pred = Rigid(outputs["traj_rotation"], outputs["traj"][..., 4:])
    target = rigid_from_quaternion(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]
    clamped = batch["use_clamped_fape"]
    fape = compute_fape(pred, target, mask, pred.translation, target.translation, mask, clamped)
    return jnp.mean(fape, axis=0)


class RenamedGroundTruth(NamedTuple):
    """Ground truth under the naming of symmetric atoms that fits the prediction better."""

    alt_naming_is_better: Float[Array, "b r"]
    positions: Float[Array, "b r 14 3"]
    exists: Float[Array, "b r 14"]
    frames: Rigid  # [b r 8]


def rename_symmetric_ground_truth_atoms(
    batch: Mapping[str, Array], atom14_positions: Float[Array, "b r 14 3"]
) -> RenamedGroundTruth:
    """Choose the names of symmetric atoms residue by residue (Suppl. Alg. 26)."""
    better = _alt_naming_is_better(batch, jax.lax.stop_gradient(atom14_positions))

    def choose(name: str, alternative: str) -> Array:
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
    batch: Mapping[str, Array], pred: Float[Array, "b r 14 3"]
) -> Float[Array, "b r"]:
    """1 where the swapped names agree better with distances to all atoms of certain name."""
    ambiguous, exists = batch["atom14_atom_is_ambiguous"], batch["atom14_gt_exists"]
    mask = _pairs((exists * ambiguous)[:, :, _AMBIGUOUS_SLOTS], exists * (1 - ambiguous))
    pred_distance = _distances_to_all(pred)

    def disagreement(name: str) -> Array:
        difference = pred_distance - _distances_to_all(batch[name])
        return jnp.sum(mask * jnp.sqrt(1e-10 + difference * difference), axis=(2, 3, 4))

    swapped, original = (
        disagreement(name) for name in ("atom14_alt_gt_positions", "atom14_gt_positions")
    )
    return (swapped < original).astype(pred.dtype)


def _distances_to_all(positions: Float[Array, "b r 14 3"]) -> Float[Array, "b i a j 14"]:
    """Distances of the atoms in the ambiguous slots to every atom."""
    rows = positions[:, :, _AMBIGUOUS_SLOTS]
    return distance(rows[:, :, :, None, None], positions[:, None, None], 1e-10)


def _pairs(
    rows: Float[Array, "b i a"], columns: Float[Array, "b j c"]
) -> Float[Array, "b i a j c"]:
    return rows[:, :, :, None, None] * columns[:, None, None]


def sidechain_fape_loss(
    outputs: Mapping[str, Array], batch: Mapping[str, Array], renamed: RenamedGroundTruth
) -> Float[Array, " b"]:
    """FAPE of all rigid groups and all atoms of the last iteration (Suppl. Alg. 20, line 28)."""

    def flat(x: Array, axes: int) -> Array:
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


def chi_loss(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, " b"]:
    """Side-chain torsions of every iteration, as points on a circle (Suppl. Alg. 27, lines 1-5)."""
    pred = jnp.moveaxis(outputs["angles"], 0, 1)[..., 3:, :]
    truth = jnp.stack([jnp.sin(batch["chi_angles"]), jnp.cos(batch["chi_angles"])], axis=-1)
    periodic = jnp.asarray(constants.chi_pi_periodic, pred.dtype)[batch["aatype"]]
    turned = (1 - 2 * periodic)[..., None] * truth
    error = jnp.minimum(
        jnp.sum((pred - truth[:, None]) ** 2, axis=-1),
        jnp.sum((pred - turned[:, None]) ** 2, axis=-1),
    )
    return masked_mean(batch["chi_mask"][:, None], error, 1e-10)


def angle_norm_loss(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Float[Array, " b"]:
    """Keeps raw (sin, cos) pairs near the unit circle (Suppl. Alg. 27, line 6)."""
    raw = jnp.moveaxis(outputs["unnormalized_angles"], 0, 1)
    error = jnp.abs(jnp.sqrt(jnp.sum(raw * raw, axis=-1) + 1e-6) - 1)
    return masked_mean(batch["seq_mask"][:, None, :, None], error, 1e-10)
