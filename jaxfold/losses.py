"""The training loss and the terms that need no 3-D geometry of their own (Suppl. 1.9).

Every term has one value an example, [b]; nothing mixes examples, because gradients are clipped
example by example. Structure terms live in ``structure_losses.py`` and ``violations.py``.

Legend: k classes of a prediction. Lengths in angstrom.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from foldcore import constants
from foldcore.config import LossConfig
from jaxfold.heads import ALIGNED_ERROR_LIMITS, DISTOGRAM_LIMITS
from jaxfold.ops import at_least_float32
from jaxfold.rigid import Rigid, distance, dot, rigid_from_quaternion
from jaxfold.structure_losses import (
    angle_norm_loss,
    backbone_fape_loss,
    chi_loss,
    masked_mean,
    rename_symmetric_ground_truth_atoms,
    sidechain_fape_loss,
)
from jaxfold.violations import structural_violation_loss

Arrays = Mapping[str, Array]

_CA = constants.atom_order["CA"]
# Of a bin. Scores are ratios of small whole numbers, often right at the edge of a bin, where their
# last digit must not decide; any other score of thousands of pairs is further from one.
AT_EDGE = 1e-4


def alphafold_loss(
    outputs: Arrays, batch: Arrays, config: LossConfig, also: Sequence[str] = ()
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Weighted total of each example, and its unweighted terms (Suppl. 1.9, eq. 7; 1.11.1).

    All terms are computed, for the log, but ``violation`` and ``aligned_error``: these are costly
    and are computed only where they have a weight or are named in ``also``.
    """
    terms = _terms(outputs, batch, config, {"violation", "aligned_error"} - set(also))
    total = sum(
        (getattr(config, name) * term for name, term in terms.items() if getattr(config, name)),
        start=jnp.zeros_like(terms["distogram"]),
    )
    if config.scale_by_sqrt_length:
        total = total * jnp.sqrt(batch["seq_length"].astype(total.dtype))
    return total, terms


def _terms(
    outputs: Arrays, batch: Arrays, config: LossConfig, optional: set[str]
) -> dict[str, Float[Array, " b"]]:
    renamed = rename_symmetric_ground_truth_atoms(batch, outputs["final_atom14_positions"])
    accepted = resolution_accepted(batch["resolution"], config)
    terms: dict[str, Callable[[], Array]] = {
        "backbone_fape": lambda: backbone_fape_loss(outputs, batch),
        "sidechain_fape": lambda: sidechain_fape_loss(outputs, batch, renamed),
        "chi": lambda: chi_loss(outputs, batch),
        "angle_norm": lambda: angle_norm_loss(outputs, batch),
        "violation": lambda: structural_violation_loss(outputs, batch, config.ca_c_n_stddev),
        "distogram": lambda: distogram_loss(outputs, batch),
        "masked_msa": lambda: masked_msa_loss(outputs, batch),
        "plddt": lambda: accepted * plddt_loss(outputs, batch),
        "experimentally_resolved": lambda: accepted * experimentally_resolved_loss(outputs, batch),
        "aligned_error": lambda: accepted * aligned_error_loss(outputs, batch),
    }
    return {
        name: term()
        for name, term in terms.items()
        if name not in optional or getattr(config, name)
    }


def resolution_accepted(resolution: Float[Array, " b"], config: LossConfig) -> Float[Array, " b"]:
    """1 where confidence is trained: on structures of known, good resolution (Suppl. 1.9.6)."""
    known = (resolution >= config.min_resolution) & (resolution <= config.max_resolution)
    unknown = (resolution == 0) & config.accept_unknown_resolution
    return (known | unknown).astype(resolution.dtype)


def cross_entropy(
    logits: Float[Array, "*batch k"], label: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Negative log likelihood of one class, in at least float32."""
    logits = logits.astype(at_least_float32(logits.dtype))
    # one-hot, because the gradient of a gather is a scatter
    chosen = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(chosen * jax.nn.log_softmax(logits), axis=-1)


def distogram_loss(outputs: Arrays, batch: Arrays) -> Float[Array, " b"]:
    """Distances between pseudo-beta atoms (Suppl. 1.9.8)."""
    logits = outputs["distogram_logits"]
    points, mask = batch["pseudo_beta"], batch["pseudo_beta_mask"]
    difference = points[:, :, None] - points[:, None]
    label = _squared_bin(dot(difference, difference), DISTOGRAM_LIMITS, logits.shape[-1])
    pair_mask = mask[:, :, None] * mask[:, None]
    return masked_mean(pair_mask, cross_entropy(logits, label), 1e-6)


def _squared_bin(
    squared: Float[Array, "b i j"], limits: tuple[float, float], bins: int
) -> Int[Array, "b i j"]:
    """Index of the bin a squared distance falls into."""
    breaks = jnp.asarray(constants.bin_edges(*limits, bins - 1), squared.dtype)
    return jnp.sum(squared[..., None] > breaks**2, axis=-1)


def masked_msa_loss(outputs: Arrays, batch: Arrays) -> Float[Array, " b"]:
    """Letters hidden from the network, in the sample of the last recycling pass (Suppl. 1.9.9)."""
    last = batch["num_iter_recycling"][:, None, None, None]
    true_msa = jnp.take_along_axis(batch["true_msa"], last, axis=1)[:, 0]
    mask = jnp.take_along_axis(batch["bert_mask"], last, axis=1)[:, 0]
    return masked_mean(mask, cross_entropy(outputs["masked_msa_logits"], true_msa), 1e-8)


def plddt_loss(outputs: Arrays, batch: Arrays) -> Float[Array, " b"]:
    """The network's own lDDT-C-alpha, in bins (Suppl. Alg. 29 and 1.9.6)."""
    logits = outputs["plddt_logits"]
    mask = batch["all_atom_mask"][..., _CA]
    predicted = jax.lax.stop_gradient(outputs["final_atom37_positions"][..., _CA, :])
    score = lddt_ca(predicted, batch["all_atom_positions"][..., _CA, :], mask)
    label = lddt_bin(score, logits.shape[-1])
    return masked_mean(mask, cross_entropy(logits, label), 1e-8)


def lddt_bin(score: Float[Array, "*batch"], bins: int) -> Int[Array, "*batch"]:
    """Which of equal bins of 0..1 a score is in; one at an edge belongs to the bin above it."""
    return jnp.minimum(jnp.floor(score * bins + AT_EDGE).astype(jnp.int32), bins - 1)


def lddt_ca(
    predicted: Float[Array, "b r 3"], truth: Float[Array, "b r 3"], mask: Float[Array, "b r"]
) -> Float[Array, "b r"]:
    """lDDT of each residue, 0..1, over pairs truly within 15 angstrom (Suppl. 1.9.6)."""
    true_distance = distance(truth[:, :, None], truth[:, None], 1e-10)
    error = jnp.abs(true_distance - distance(predicted[:, :, None], predicted[:, None], 1e-10))
    other = 1 - jnp.eye(mask.shape[1], dtype=mask.dtype)
    near = (true_distance < 15.0) * mask[:, :, None] * mask[:, None] * other
    preserved = sum((error < limit).astype(mask.dtype) for limit in (0.5, 1.0, 2.0, 4.0)) / 4
    return (1e-10 + jnp.sum(near * preserved, axis=-1)) / (1e-10 + jnp.sum(near, axis=-1))


def experimentally_resolved_loss(outputs: Arrays, batch: Arrays) -> Float[Array, " b"]:
    """Whether each atom was seen in the experiment (Suppl. 1.9.10)."""
    logits = outputs["experimentally_resolved_logits"]
    resolved, exists = batch["all_atom_mask"], batch["atom37_atom_exists"]
    error = -resolved * jax.nn.log_sigmoid(logits) - (1 - resolved) * jax.nn.log_sigmoid(-logits)
    return masked_mean(exists, error, 1e-8)


def aligned_error_loss(outputs: Arrays, batch: Arrays) -> Float[Array, " b"]:
    """Error of residue j after alignment on the backbone frame of residue i (Suppl. 1.9.7)."""
    logits = outputs["aligned_error_logits"]
    last = Rigid(outputs["traj_rotation"][-1], outputs["traj"][-1, ..., 4:])
    target = rigid_from_quaternion(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]
    pair_mask = mask[:, :, None] * mask[:, None]
    error = _seen_from_each_frame(jax.lax.stop_gradient(last)) - _seen_from_each_frame(target)
    label = _squared_bin(dot(error, error), ALIGNED_ERROR_LIMITS, logits.shape[-1])
    return masked_mean(pair_mask, cross_entropy(logits, label), 1e-8)


def _seen_from_each_frame(frames: Rigid) -> Float[Array, "b i j 3"]:
    return frames[..., None].invert_apply(frames.translation[:, None])
