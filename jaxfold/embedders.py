"""From features to the first MSA and pair representations (Suppl. 1.5, 1.7.1, 1.10).

Geometry is taken in at least float32; embeddings have the dtype of the parameters.

Legend: x2 = (sin, cos) of n = 7 torsions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from foldcore import constants
from jaxfold.ops import at_least_float32
from jaxfold.primitives import LayerNorm, Linear
from jaxfold.rigid import torsion_angles_from_atom37

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
    positions: Float[Array, "*batch r 3"],
    first: float,
    last: float,
    num_bins: int,
    dtype: DTypeLike,
) -> Float[Array, "*batch r r k"]:
    """One-hot bins of the distances; below ``first`` angstrom there is no bin (Suppl. Alg. 32)."""
    positions = positions.astype(at_least_float32(positions.dtype))
    lower = jnp.square(jnp.asarray(constants.bin_edges(first, last, num_bins), positions.dtype))
    upper = jnp.append(lower[1:], jnp.asarray(1e8, positions.dtype))
    offset = positions[..., :, None, :] - positions[..., None, :, :]
    squared = jnp.sum(jnp.square(offset), axis=-1, keepdims=True)
    return ((squared > lower) & (squared < upper)).astype(dtype)


class InputEmbedder(nnx.Module):
    """MSA and pair representations of the sequence and its clustered MSA (Suppl. Alg. 3, 4)."""

    def __init__(self, c_m: int, c_z: int, max_relative_position: int):
        self.max_relative_position = max_relative_position
        self.preprocess_1d = Linear(TARGET_CHANNELS, c_m)
        self.preprocess_msa = Linear(MSA_CHANNELS, c_m)
        self.left_single = Linear(TARGET_CHANNELS, c_z)
        self.right_single = Linear(TARGET_CHANNELS, c_z)
        # the published parameters have this spelling
        self.pair_activiations = Linear(2 * max_relative_position + 1, c_z)

    def __call__(
        self,
        target_feat: Float[Array, "b r 22"],
        residue_index: Int[Array, "b r"],
        msa_feat: Float[Array, "b s r 49"],
    ) -> tuple[Float[Array, "b s r c_m"], Float[Array, "b i j c_z"]]:
        target = target_feat.astype(self.left_single.weights.dtype)
        msa = self.preprocess_msa(msa_feat.astype(target.dtype))
        msa = msa + self.preprocess_1d(target)[:, None]
        pair = self.left_single(target)[:, :, None] + self.right_single(target)[:, None]
        return msa, pair + self._relpos(residue_index)

    def _relpos(self, residue_index: Int[Array, "b r"]) -> Float[Array, "b i j c_z"]:
        """How far apart in the chain, up to a limit (Suppl. Alg. 4)."""
        limit = self.max_relative_position
        offset = residue_index[:, :, None] - residue_index[:, None, :]
        index = jnp.clip(offset + limit, 0, 2 * limit)
        dtype = self.pair_activiations.weights.dtype
        return self.pair_activiations(jax.nn.one_hot(index, 2 * limit + 1, dtype=dtype))


class RecyclingEmbedder(nnx.Module):
    """What the previous pass found (Suppl. Alg. 32); the first pass gets zeros."""

    def __init__(self, c_m: int, c_z: int):
        self.prev_pos_linear = Linear(RECYCLING_BINS[2], c_z)
        self.prev_msa_first_row_norm = LayerNorm(c_m)
        self.prev_pair_norm = LayerNorm(c_z)

    def __call__(
        self,
        aatype: Int[Array, "b r"],
        prev_msa_first_row: Float[Array, "b r c_m"],
        prev_pair: Float[Array, "b i j c_z"],
        prev_pos: Float[Array, "b r 37 3"],
    ) -> tuple[Float[Array, "b r c_m"], Float[Array, "b i j c_z"]]:
        """Updates of the first MSA row and of the pair representation."""
        glycine = (aatype == _GLYCINE)[..., None]
        pseudo_beta = jnp.where(glycine, prev_pos[..., _CA, :], prev_pos[..., _CB, :])
        bins = distance_bins(pseudo_beta, *RECYCLING_BINS, self.prev_pos_linear.weights.dtype)
        pair = self.prev_pos_linear(bins) + self.prev_pair_norm(prev_pair)
        return self.prev_msa_first_row_norm(prev_msa_first_row), pair


class ExtraMSAEmbedder(nnx.Module):
    """Sequences that are no cluster centres (Suppl. Alg. 2, lines 14-15)."""

    def __init__(self, c_e: int):
        self.extra_msa_activations = Linear(EXTRA_MSA_CHANNELS, c_e)

    def __call__(
        self,
        extra_msa: Int[Array, "b e r"],
        extra_has_deletion: Float[Array, "b e r"],
        extra_deletion_value: Float[Array, "b e r"],
    ) -> Float[Array, "b e r c_e"]:
        dtype = self.extra_msa_activations.weights.dtype
        letters = jax.nn.one_hot(extra_msa, MSA_CLASSES, dtype=dtype)
        deletions = jnp.stack([extra_has_deletion, extra_deletion_value], axis=-1).astype(dtype)
        return self.extra_msa_activations(jnp.concatenate([letters, deletions], axis=-1))


class TemplateAngleEmbedder(nnx.Module):
    """Torsions of templates as further MSA rows (Suppl. Alg. 2, lines 7-8)."""

    def __init__(self, c_m: int):
        self.template_single_embedding = Linear(TEMPLATE_ANGLE_CHANNELS, c_m, init="relu")
        self.template_projection = Linear(c_m, c_m, init="relu")

    def __call__(
        self,
        template_aatype: Int[Array, "b t r"],
        positions: Float[Array, "b t r 37 3"],
        mask: Float[Array, "b t r 37"],
    ) -> tuple[Float[Array, "b t r c_m"], Float[Array, "b t r"]]:
        """The rows, and where they count: psi is defined."""
        torsions = torsion_angles_from_atom37(template_aatype, positions, mask)
        dtype = self.template_single_embedding.weights.dtype
        flat = (*template_aatype.shape, 14)
        features = [
            jax.nn.one_hot(template_aatype, TEMPLATE_CLASSES),
            torsions.sin_cos.reshape(flat),
            torsions.alt_sin_cos.reshape(flat),
            torsions.mask,
        ]
        x = jnp.concatenate([feature.astype(dtype) for feature in features], axis=-1)
        rows = self.template_projection(jax.nn.relu(self.template_single_embedding(x)))
        return rows, torsions.mask[..., 2]
