"""Heads on the finished representations, and what their predictions mean (Suppl. 1.9.6-1.9.10).

All heads compute in at least float32. Legend: k classes of a prediction.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfold._arrays import table
from torchfold.ops import at_least_float32
from torchfold.primitives import LayerNorm, Linear

# first and last limit between the bins, angstrom
DISTOGRAM_LIMITS = (2.3125, 21.6875)
ALIGNED_ERROR_LIMITS = (0.0, 31.0)


def _wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return x.to(at_least_float32(x.dtype))


class DistogramHead(nn.Module):
    """Distance of pseudo-beta atoms, symmetric by construction (Suppl. 1.9.8)."""

    def __init__(self, c_z: int, num_bins: int = 64):
        super().__init__()
        self.half_logits = Linear(c_z, num_bins, init="final")

    def forward(self, pair: Float[Tensor, "b i j c_z"]) -> Float[Tensor, "b i j k"]:
        half = self.half_logits(_wide(pair))
        return half + half.transpose(1, 2)


class MaskedMSAHead(nn.Module):
    """Letters of the clustered MSA (Suppl. 1.9.9): 20 residue types, X, gap, masked."""

    def __init__(self, c_m: int, num_classes: int = 23):
        super().__init__()
        self.logits = Linear(c_m, num_classes, init="final")

    def forward(self, msa: Float[Tensor, "b s r c_m"]) -> Float[Tensor, "b s r k"]:
        return self.logits(_wide(msa))


class ExperimentallyResolvedHead(nn.Module):
    """Whether each of the 37 atoms is seen in an experiment (Suppl. 1.9.10)."""

    def __init__(self, c_s: int, num_atoms: int = 37):
        super().__init__()
        self.logits = Linear(c_s, num_atoms, init="final")

    def forward(self, single: Float[Tensor, "b r c_s"]) -> Float[Tensor, "b r 37"]:
        return self.logits(_wide(single))


class PredictedLDDTHead(nn.Module):
    """The confidence of each residue, from the structure module's activations (Suppl. Alg. 29)."""

    def __init__(self, c_s: int, c_hidden: int, num_bins: int = 50):
        super().__init__()
        self.input_layer_norm = LayerNorm(c_s)
        self.act_0 = Linear(c_s, c_hidden, init="relu")
        self.act_1 = Linear(c_hidden, c_hidden, init="relu")
        self.logits = Linear(c_hidden, num_bins, init="final")

    def forward(self, single: Float[Tensor, "b r c_s"]) -> Float[Tensor, "b r k"]:
        hidden = self.input_layer_norm(_wide(single))
        hidden = torch.relu(self.act_0(hidden))
        hidden = torch.relu(self.act_1(hidden))
        return self.logits(hidden)


class PredictedAlignedErrorHead(nn.Module):
    """Error of residue j once frame i is aligned (Suppl. 1.9.7)."""

    def __init__(self, c_z: int, num_bins: int = 64):
        super().__init__()
        self.logits = Linear(c_z, num_bins, init="final")

    def forward(self, pair: Float[Tensor, "b i j c_z"]) -> Float[Tensor, "b i j k"]:
        return self.logits(_wide(pair))


def compute_plddt(logits: Float[Tensor, "b r k"]) -> Float[Tensor, "b r"]:
    """Expected lDDT-C-alpha of each residue, 0..100 (Suppl. Alg. 29)."""
    bins = logits.shape[-1]
    centres = (torch.arange(bins, dtype=logits.dtype, device=logits.device) + 0.5) / bins
    return 100 * torch.sum(torch.softmax(logits, dim=-1) * centres, dim=-1)


def compute_predicted_aligned_error(logits: Float[Tensor, "b i j k"]) -> Float[Tensor, "b i j"]:
    """Expected aligned error in angstrom (Suppl. 1.9.7)."""
    probabilities = torch.softmax(logits, dim=-1)
    return torch.sum(probabilities * _aligned_error_centres(logits), dim=-1)


def predicted_tm_score(
    logits: Float[Tensor, "b i j k"], seq_mask: Float[Tensor, "b r"]
) -> Float[Tensor, " b"]:
    """Expected TM-score of the best alignment frame, over real residues (Suppl. 1.9.7, eq. 38)."""
    length = torch.sum(seq_mask, dim=-1)
    # the scale of Zhang and Skolnick, undefined for short chains
    d0 = 1.24 * (torch.clamp(length, min=19) - 15) ** (1 / 3) - 1.8
    ratio = _aligned_error_centres(logits) / d0[:, None]
    kernel = 1 / (1 + ratio * ratio)
    score = torch.sum(torch.softmax(logits, dim=-1) * kernel[:, None, None], dim=-1)
    by_frame = torch.sum(score * seq_mask[:, None], dim=-1) / (1e-8 + length[:, None])
    return torch.amax(by_frame * seq_mask, dim=-1)


def _aligned_error_centres(logits: Float[Tensor, "b i j k"]) -> Float[Tensor, " k"]:
    """Middles of the bins; the last bin is open and counts as wide as the others."""
    edges = *ALIGNED_ERROR_LIMITS, logits.shape[-1] - 1
    limits = table("bin_edges", logits.dtype, logits.device, *edges)
    step = limits[1] - limits[0]
    return torch.cat([limits + step / 2, limits[-1:] + 1.5 * step])
