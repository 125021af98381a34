"""From features to the first MSA and pair representations (Suppl. 1.5, 1.7.1, 1.10).

Geometry is taken in at least float32; embeddings have the dtype of the parameters.

Legend: x2 = (sin, cos) of n = 7 torsions.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foldcore import constants
from torchfold._arrays import one_hot, table
from torchfold._compiled import constant_piece
from torchfold.ops import at_least_float32
from torchfold.primitives import LayerNorm, Linear
from torchfold.rigid import torsion_angles_from_atom37

TARGET_CHANNELS = 22
MSA_CHANNELS = 49
EXTRA_MSA_CHANNELS = 25
TEMPLATE_ANGLE_CHANNELS = 57
MSA_CLASSES = 23
TEMPLATE_CLASSES = 22  # 20 residue types, X, gap

# distance bins: first and last lower edge in angstrom, and their number
RECYCLING_BINS = (3.25, 20.75, 15)

_GLYCINE = constants.restype_order["G"]
_CA, _CB = constants.atom_order["CA"], constants.atom_order["CB"]


def distance_bins(
    positions: Float[Tensor, "*batch r 3"],
    first: float,
    last: float,
    num_bins: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch r r k"]:
    """One-hot bins of the distances; below ``first`` angstrom there is no bin (Suppl. Alg. 32)."""
    positions = positions.to(at_least_float32(positions.dtype))
    edges = table("bin_edges", positions.dtype, positions.device, first, last, num_bins)
    lower = torch.square(edges)
    upper = torch.cat([lower[1:], torch.full_like(lower[:1], 1e8)])
    offset = positions[..., :, None, :] - positions[..., None, :, :]
    squared = torch.sum(torch.square(offset), dim=-1, keepdim=True)
    return ((squared > lower) & (squared < upper)).to(dtype)


class InputEmbedder(nn.Module):
    """MSA and pair representations of the sequence and its clustered MSA (Suppl. Alg. 3, 4)."""

    def __init__(self, c_m: int, c_z: int, max_relative_position: int):
        super().__init__()
        self.max_relative_position = max_relative_position
        self.preprocess_1d = Linear(TARGET_CHANNELS, c_m)
        self.preprocess_msa = Linear(MSA_CHANNELS, c_m)
        self.left_single = Linear(TARGET_CHANNELS, c_z)
        self.right_single = Linear(TARGET_CHANNELS, c_z)
        # the published parameters have this spelling
        self.pair_activiations = Linear(2 * max_relative_position + 1, c_z)

    def forward(
        self,
        target_feat: Float[Tensor, "b r 22"],
        residue_index: Int[Tensor, "b r"],
        msa_feat: Float[Tensor, "b s r 49"],
    ) -> tuple[Float[Tensor, "b s r c_m"], Float[Tensor, "b i j c_z"]]:
        target = target_feat.to(self.left_single.weights.dtype)
        msa = self.preprocess_msa(msa_feat.to(target.dtype))
        msa = msa + self.preprocess_1d(target)[:, None]
        pair = self.left_single(target)[:, :, None] + self.right_single(target)[:, None]
        return msa, pair + self._relpos(residue_index)

    def _relpos(self, residue_index: Int[Tensor, "b r"]) -> Float[Tensor, "b i j c_z"]:
        """How far apart in the chain, up to a limit (Suppl. Alg. 4)."""
        limit = self.max_relative_position
        offset = residue_index[:, :, None] - residue_index[:, None, :]
        index = torch.clamp(offset + limit, 0, 2 * limit)
        dtype = self.pair_activiations.weights.dtype
        return self.pair_activiations(one_hot(index, 2 * limit + 1, dtype))


class RecyclingEmbedder(nn.Module):
    """What the previous pass found (Suppl. Alg. 32); the first pass gets zeros."""

    def __init__(self, c_m: int, c_z: int):
        super().__init__()
        self.prev_pos_linear = Linear(RECYCLING_BINS[2], c_z)
        self.prev_msa_first_row_norm = LayerNorm(c_m)
        self.prev_pair_norm = LayerNorm(c_z)

    def forward(
        self,
        aatype: Int[Tensor, "b r"],
        prev_msa_first_row: Float[Tensor, "b r c_m"],
        prev_pair: Float[Tensor, "b i j c_z"],
        prev_pos: Float[Tensor, "b r 37 3"],
    ) -> tuple[Float[Tensor, "b r c_m"], Float[Tensor, "b i j c_z"]]:
        """Updates of the first MSA row and of the pair representation."""
        glycine = (aatype == _GLYCINE)[..., None]
        pseudo_beta = torch.where(glycine, prev_pos[..., _CA, :], prev_pos[..., _CB, :])
        bins = distance_bins(pseudo_beta, *RECYCLING_BINS, self.prev_pos_linear.weights.dtype)
        pair = self.prev_pos_linear(bins) + self.prev_pair_norm(prev_pair)
        return self.prev_msa_first_row_norm(prev_msa_first_row), pair


class ExtraMSAEmbedder(nn.Module):
    """Sequences that are no cluster centres (Suppl. Alg. 2, lines 14-15)."""

    def __init__(self, c_e: int):
        super().__init__()
        self.extra_msa_activations = Linear(EXTRA_MSA_CHANNELS, c_e)

    def forward(
        self,
        extra_msa: Int[Tensor, "b e r"],
        extra_has_deletion: Float[Tensor, "b e r"],
        extra_deletion_value: Float[Tensor, "b e r"],
    ) -> Float[Tensor, "b e r c_e"]:
        dtype = self.extra_msa_activations.weights.dtype
        letters = one_hot(extra_msa, MSA_CLASSES, dtype)
        deletions = torch.stack([extra_has_deletion, extra_deletion_value], dim=-1).to(dtype)
        return self.extra_msa_activations(torch.cat([letters, deletions], dim=-1))


class TemplateAngleEmbedder(nn.Module):
    """Torsions of templates as further MSA rows (Suppl. Alg. 2, lines 7-8)."""

    def __init__(self, c_m: int):
        super().__init__()
        self.template_single_embedding = Linear(TEMPLATE_ANGLE_CHANNELS, c_m, init="relu")
        self.template_projection = Linear(c_m, c_m, init="relu")

    def forward(
        self,
        template_aatype: Int[Tensor, "b t r"],
        positions: Float[Tensor, "b t r 37 3"],
        mask: Float[Tensor, "b t r 37"],
    ) -> tuple[Float[Tensor, "b t r c_m"], Float[Tensor, "b t r"]]:
        """The rows, and where they count: psi is defined."""
        dtype = self.template_single_embedding.weights.dtype
        x, has_psi = _torsion_features(template_aatype, positions, mask, dtype)
        rows = self.template_projection(torch.relu(self.template_single_embedding(x)))
        return rows, has_psi


@constant_piece
def _torsion_features(
    aatype: Int[Tensor, "b t r"],
    positions: Float[Tensor, "b t r 37 3"],
    mask: Float[Tensor, "b t r 37"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b t r 57"], Float[Tensor, "b t r"]]:
    """What is embedded, and where psi is defined."""
    torsions = torsion_angles_from_atom37(aatype, positions, mask)
    flat = (*aatype.shape, 14)
    features = [
        one_hot(aatype, TEMPLATE_CLASSES, dtype),
        torsions.sin_cos.reshape(flat),
        torsions.alt_sin_cos.reshape(flat),
        torsions.mask,
    ]
    return torch.cat([feature.to(dtype) for feature in features], dim=-1), torsions.mask[..., 2]
