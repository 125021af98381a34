"""The training loss and the terms that need no 3-D geometry of their own (Suppl. 1.9).

Every term has one value an example, [b]; nothing mixes examples, because gradients are clipped
example by example. Structure terms live in ``structure_losses.py`` and ``violations.py``.

Legend: k classes of a prediction. Lengths in angstrom.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from foldcore import constants
from foldcore.config import LossConfig
from torchfold._arrays import one_hot, table
from torchfold._compiled import piece
from torchfold.heads import ALIGNED_ERROR_LIMITS, DISTOGRAM_LIMITS
from torchfold.ops import at_least_float32
from torchfold.rigid import Rigid, distance, dot, rigid_from_quaternion
from torchfold.structure_losses import (
    angle_norm_loss,
    backbone_fape_loss,
    chi_loss,
    masked_mean,
    rename_symmetric_ground_truth_atoms,
    sidechain_fape_loss,
)
from torchfold.violations import structural_violation_loss

Arrays = Mapping[str, Tensor]

_CA = constants.atom_order["CA"]
# Of a bin. Scores are ratios of small whole numbers, often right at the edge of a bin, where their
# last digit must not decide; any other score of thousands of pairs is further from one.
AT_EDGE = 1e-4


def alphafold_loss(
    outputs: Arrays, batch: Arrays, config: LossConfig, also: Sequence[str] = ()
) -> tuple[Float[Tensor, " b"], dict[str, Float[Tensor, " b"]]]:
    """Weighted total of each example, and its unweighted terms (Suppl. 1.9, eq. 7; 1.11.1).

    All terms are computed, for the log, but ``violation`` and ``aligned_error``: these are costly
    and are computed only where they have a weight or are named in ``also``.
    """
    # where a piece cannot look: which sample is the last is known on the host
    last = {name: _last_sample(batch, name)[:, None] for name in ("true_msa", "bert_mask")}
    return _weighted(outputs, {**batch, **last}, config, tuple(also))


@piece
def _weighted(
    outputs: Arrays, batch: Arrays, config: LossConfig, also: tuple[str, ...]
) -> tuple[Float[Tensor, " b"], dict[str, Float[Tensor, " b"]]]:
    """The same, for MSA labels of one pass."""
    terms = _terms(outputs, batch, config, {"violation", "aligned_error"} - set(also))
    total = sum(
        (getattr(config, name) * term for name, term in terms.items() if getattr(config, name)),
        start=torch.zeros_like(terms["distogram"]),
    )
    if config.scale_by_sqrt_length:
        total = total * torch.sqrt(batch["seq_length"].to(total.dtype))
    return total, terms


def _terms(
    outputs: Arrays, batch: Arrays, config: LossConfig, optional: set[str]
) -> dict[str, Float[Tensor, " b"]]:
    renamed = rename_symmetric_ground_truth_atoms(batch, outputs["final_atom14_positions"])
    accepted = resolution_accepted(batch["resolution"], config)
    terms: dict[str, Callable[[], Tensor]] = {
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


def resolution_accepted(resolution: Float[Tensor, " b"], config: LossConfig) -> Float[Tensor, " b"]:
    """1 where confidence is trained: on structures of known, good resolution (Suppl. 1.9.6)."""
    known = (resolution >= config.min_resolution) & (resolution <= config.max_resolution)
    unknown = (resolution == 0) & config.accept_unknown_resolution
    return (known | unknown).to(resolution.dtype)


def cross_entropy(
    logits: Float[Tensor, "*batch k"], label: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Negative log likelihood of one class, in at least float32."""
    logits = logits.to(at_least_float32(logits.dtype))
    # one-hot, because the gradient of a gather is a scatter
    chosen = one_hot(label, logits.shape[-1], logits.dtype)
    return -torch.sum(chosen * torch.log_softmax(logits, dim=-1), dim=-1)


def distogram_loss(outputs: Arrays, batch: Arrays) -> Float[Tensor, " b"]:
    """Distances between pseudo-beta atoms (Suppl. 1.9.8)."""
    logits = outputs["distogram_logits"]
    points, mask = batch["pseudo_beta"], batch["pseudo_beta_mask"]
    difference = points[:, :, None] - points[:, None]
    label = _squared_bin(dot(difference, difference), DISTOGRAM_LIMITS, logits.shape[-1])
    pair_mask = mask[:, :, None] * mask[:, None]
    return masked_mean(pair_mask, cross_entropy(logits, label), 1e-6)


def _squared_bin(
    squared: Float[Tensor, "b i j"], limits: tuple[float, float], bins: int
) -> Int[Tensor, "b i j"]:
    """Index of the bin a squared distance falls into."""
    breaks = table("bin_edges", squared.dtype, squared.device, *limits, bins - 1)
    return torch.sum(squared[..., None] > breaks**2, dim=-1)


def masked_msa_loss(outputs: Arrays, batch: Arrays) -> Float[Tensor, " b"]:
    """Letters hidden from the network, in the sample of the last recycling pass (Suppl. 1.9.9)."""
    true_msa, mask = (_last_sample(batch, name) for name in ("true_msa", "bert_mask"))
    return masked_mean(mask, cross_entropy(outputs["masked_msa_logits"], true_msa), 1e-8)


def _last_sample(batch: Arrays, name: str) -> Float[Tensor, "b s r"]:
    samples = batch[name]
    if samples.shape[1] == 1:  # the passes before were run apart
        return samples[:, 0]
    # known on the host, so these are slices, not gathers
    last = enumerate(int(count) for count in batch["num_iter_recycling"])
    return torch.stack([samples[i, count] for i, count in last])


def plddt_loss(outputs: Arrays, batch: Arrays) -> Float[Tensor, " b"]:
    """The network's own lDDT-C-alpha, in bins (Suppl. Alg. 29 and 1.9.6)."""
    logits = outputs["plddt_logits"]
    mask = batch["all_atom_mask"][..., _CA]
    predicted = outputs["final_atom37_positions"][..., _CA, :].detach()
    score = lddt_ca(predicted, batch["all_atom_positions"][..., _CA, :], mask)
    label = lddt_bin(score, logits.shape[-1])
    return masked_mean(mask, cross_entropy(logits, label), 1e-8)


def lddt_bin(score: Float[Tensor, "*batch"], bins: int) -> Int[Tensor, "*batch"]:
    """Which of equal bins of 0..1 a score is in; one at an edge belongs to the bin above it."""
    return torch.clamp(torch.floor(score * bins + AT_EDGE).to(torch.int32), max=bins - 1)


def lddt_ca(
    predicted: Float[Tensor, "b r 3"], truth: Float[Tensor, "b r 3"], mask: Float[Tensor, "b r"]
) -> Float[Tensor, "b r"]:
    """lDDT of each residue, 0..1, over pairs truly within 15 angstrom (Suppl. 1.9.6)."""
    true_distance = distance(truth[:, :, None], truth[:, None], 1e-10)
    error = torch.abs(true_distance - distance(predicted[:, :, None], predicted[:, None], 1e-10))
    other = 1 - torch.eye(mask.shape[1], dtype=mask.dtype, device=mask.device)
    near = (true_distance < 15.0) * mask[:, :, None] * mask[:, None] * other
    preserved = sum((error < limit).to(mask.dtype) for limit in (0.5, 1.0, 2.0, 4.0)) / 4
    return (1e-10 + torch.sum(near * preserved, dim=-1)) / (1e-10 + torch.sum(near, dim=-1))


def experimentally_resolved_loss(outputs: Arrays, batch: Arrays) -> Float[Tensor, " b"]:
    """Whether each atom was seen in the experiment (Suppl. 1.9.10)."""
    logits = outputs["experimentally_resolved_logits"]
    resolved, exists = batch["all_atom_mask"], batch["atom37_atom_exists"]
    error = -resolved * logsigmoid(logits) - (1 - resolved) * logsigmoid(-logits)
    return masked_mean(exists, error, 1e-8)


def aligned_error_loss(outputs: Arrays, batch: Arrays) -> Float[Tensor, " b"]:
    """Error of residue j after alignment on the backbone frame of residue i (Suppl. 1.9.7)."""
    logits = outputs["aligned_error_logits"]
    last = Rigid(outputs["traj_rotation"][-1].detach(), outputs["traj"][-1, ..., 4:].detach())
    target = rigid_from_quaternion(batch["backbone_affine_tensor"])
    mask = batch["backbone_affine_mask"]
    pair_mask = mask[:, :, None] * mask[:, None]
    error = _seen_from_each_frame(last) - _seen_from_each_frame(target)
    label = _squared_bin(dot(error, error), ALIGNED_ERROR_LIMITS, logits.shape[-1])
    return masked_mean(pair_mask, cross_entropy(logits, label), 1e-8)


def _seen_from_each_frame(frames: Rigid) -> Float[Tensor, "b i j 3"]:
    return frames[..., None].invert_apply(frames.translation[:, None])
