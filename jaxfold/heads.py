"""Heads on the finished representations, and what their predictions mean (Suppl. 1.9.6-1.9.10).

All heads compute in at least float32. Legend: k classes of a prediction.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from foldcore import constants
from jaxfold.ops import at_least_float32
from jaxfold.primitives import LayerNorm, Linear

# first and last limit between the bins, angstrom
DISTOGRAM_LIMITS = (2.3125, 21.6875)
ALIGNED_ERROR_LIMITS = (0.0, 31.0)


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(at_least_float32(x.dtype))


class DistogramHead(nnx.Module):
    """Distance of pseudo-beta atoms, symmetric by construction (Suppl. 1.9.8)."""

    def __init__(self, c_z: int, num_bins: int = 64):
        self.half_logits = Linear(c_z, num_bins, init="final")

    def __call__(self, pair: Float[Array, "b i j c_z"]) -> Float[Array, "b i j k"]:
        half = self.half_logits(_wide(pair))
        return half + half.swapaxes(1, 2)


class MaskedMSAHead(nnx.Module):
    """Letters of the clustered MSA (Suppl. 1.9.9): 20 residue types, X, gap, masked."""

    def __init__(self, c_m: int, num_classes: int = 23):
        self.logits = Linear(c_m, num_classes, init="final")

    def __call__(self, msa: Float[Array, "b s r c_m"]) -> Float[Array, "b s r k"]:
        return self.logits(_wide(msa))


class ExperimentallyResolvedHead(nnx.Module):
    """Whether each of the 37 atoms is seen in an experiment (Suppl. 1.9.10)."""

    def __init__(self, c_s: int, num_atoms: int = 37):
        self.logits = Linear(c_s, num_atoms, init="final")

    def __call__(self, single: Float[Array, "b r c_s"]) -> Float[Array, "b r 37"]:
        return self.logits(_wide(single))


class PredictedLDDTHead(nnx.Module):
    """The confidence of each residue, from the structure module's activations (Suppl. Alg. 29)."""

    def __init__(self, c_s: int, c_hidden: int, num_bins: int = 50):
        self.input_layer_norm = LayerNorm(c_s)
        self.act_0 = Linear(c_s, c_hidden, init="relu")
        self.act_1 = Linear(c_hidden, c_hidden, init="relu")
        self.logits = Linear(c_hidden, num_bins, init="final")

    def __call__(self, single: Float[Array, "b r c_s"]) -> Float[Array, "b r k"]:
        hidden = self.input_layer_norm(_wide(single))
        hidden = jax.nn.relu(self.act_0(hidden))
        hidden = jax.nn.relu(self.act_1(hidden))
        return self.logits(hidden)


class PredictedAlignedErrorHead(nnx.Module):
    """Error of residue j once frame i is aligned (Suppl. 1.9.7)."""

    def __init__(self, c_z: int, num_bins: int = 64):
        self.logits = Linear(c_z, num_bins, init="final")

    def __call__(self, pair: Float[Array, "b i j c_z"]) -> Float[Array, "b i j k"]:
        return self.logits(_wide(pair))


def compute_plddt(logits: Float[Array, "b r k"]) -> Float[Array, "b r"]:
    """Expected lDDT-C-alpha of each residue, 0..100 (Suppl. Alg. 29)."""
    bins = logits.shape[-1]
    centres = (jnp.arange(bins, dtype=logits.dtype) + 0.5) / bins
    return 100 * jnp.sum(jax.nn.softmax(logits, axis=-1) * centres, axis=-1)


def compute_predicted_aligned_error(logits: Float[Array, "b i j k"]) -> Float[Array, "b i j"]:
    """Expected aligned error in angstrom (Suppl. 1.9.7)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.sum(probabilities * _aligned_error_centres(logits), axis=-1)


def predicted_tm_score(
    logits: Float[Array, "b i j k"], seq_mask: Float[Array, "b r"]
) -> Float[Array, " b"]:
    """Expected TM-score of the best alignment frame, over real residues (Suppl. 1.9.7, eq. 38)."""
    length = jnp.sum(seq_mask, axis=-1)
    # the scale of Zhang and Skolnick, undefined for short chains
    d0 = 1.24 * jnp.cbrt(jnp.maximum(length, 19) - 15) - 1.8
    ratio = _aligned_error_centres(logits) / d0[:, None]
    kernel = 1 / (1 + ratio * ratio)
    score = jnp.sum(jax.nn.softmax(logits, axis=-1) * kernel[:, None, None], axis=-1)
    by_frame = jnp.sum(score * seq_mask[:, None], axis=-1) / (1e-8 + length[:, None])
    return jnp.max(by_frame * seq_mask, axis=-1)


def _aligned_error_centres(logits: Float[Array, "b i j k"]) -> Float[Array, " k"]:
    """Middles of the bins; the last bin is open and counts as wide as the others."""
    edges = constants.bin_edges(*ALIGNED_ERROR_LIMITS, logits.shape[-1] - 1)
    limits = jnp.asarray(edges, logits.dtype)
    step = limits[1] - limits[0]
    return jnp.append(limits + step / 2, limits[-1] + 1.5 * step)
