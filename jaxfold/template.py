"""The pair representation's share of template structures (Suppl. Alg. 2, 16, 17).

Templates pass through their own small pair stack side by side, as part of the batch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from foldcore import constants
from jaxfold import primitives
from jaxfold._masks import run_with_dropout
from jaxfold.embedders import TEMPLATE_CLASSES, distance_bins
from jaxfold.primitives import Attention, DropoutKey, LayerNorm, Linear, Transition
from jaxfold.stack import Recompute, stack
from jaxfold.triangle import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)

TEMPLATE_PAIR_CHANNELS = 88
# distance bins: first and last lower edge in angstrom, and their number
TEMPLATE_BINS = (3.25, 50.75, 39)

_BACKBONE = tuple(constants.atom_order[name] for name in ("N", "CA", "C"))


class TemplatePairBlock(nnx.Module):
    """One block of the template pair stack (Suppl. Alg. 16).

    Differs from the supplement: attention comes before multiplication, as in DeepMind's code and
    published weights.
    """

    def __init__(
        self,
        c_t: int,
        *,
        num_heads: int,
        c_hidden: int,
        triangle_hidden: int,
        transition_factor: int,
        dropout_rate: float,
    ):
        self.dropout_rate = dropout_rate
        self.triangle_attention_starting_node = TriangleAttentionStartingNode(
            c_t, num_heads, c_hidden
        )
        self.triangle_attention_ending_node = TriangleAttentionEndingNode(c_t, num_heads, c_hidden)
        self.triangle_multiplication_outgoing = TriangleMultiplicationOutgoing(c_t, triangle_hidden)
        self.triangle_multiplication_incoming = TriangleMultiplicationIncoming(c_t, triangle_hidden)
        self.pair_transition = Transition(c_t, transition_factor)

    def __call__(
        self,
        pair: Float[Array, "b i j c_t"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
        transposed_mask: Float[Array, "b j i"] | None = None,
    ) -> Float[Array, "b i j c_t"]:
        rate = self.dropout_rate
        for module, name, shared_axis in (
            (self.triangle_attention_starting_node, "triangle_attention_starting_node", 1),
            (self.triangle_attention_ending_node, "triangle_attention_ending_node", 2),
        ):
            factor = primitives.dropout_factor(pair, rate, dropout, name, shared_axis)
            pair = module(pair, pair_mask, factor, residual=True, transposed_mask=transposed_mask)
        for multiplication, name in (
            (self.triangle_multiplication_outgoing, "triangle_multiplication_outgoing"),
            (self.triangle_multiplication_incoming, "triangle_multiplication_incoming"),
        ):
            factor = primitives.dropout_factor(pair, rate, dropout, name, shared_axis=1)
            pair = multiplication(pair, pair_mask, factor, residual=True)
        return self.pair_transition(pair, residual=True)


class TemplatePairStack(nnx.Module):
    """All blocks (Suppl. Alg. 16, lines 2-8). ``block`` shows what is stacked."""

    def __init__(
        self,
        block: TemplatePairBlock,
        num_blocks: int,
        *,
        recompute: Recompute = "none",
        unroll: bool = False,
    ):
        self.recompute = recompute
        self.unroll = unroll
        self.blocks = stack(block, num_blocks)

    def __call__(
        self,
        pair: Float[Array, "b i j c_t"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
    ) -> Float[Array, "b i j c_t"]:
        transposed = pair_mask.mT  # the same for all blocks

        def call(block: TemplatePairBlock, pair: Array, key: DropoutKey | None) -> Array:
            return block(pair, pair_mask, key, transposed)

        key = dropout.enter("template_pair_stack") if dropout else None
        return run_with_dropout(self.blocks, pair, call, key, self.recompute, self.unroll)


class SingleTemplateEmbedding(nnx.Module):
    """Each template by itself (Suppl. Alg. 2, line 11; Alg. 16)."""

    def __init__(self, c_t: int, template_pair_stack: TemplatePairStack):
        self.embedding2d = Linear(TEMPLATE_PAIR_CHANNELS, c_t, init="relu")
        self.template_pair_stack = template_pair_stack
        self.output_layer_norm = LayerNorm(c_t)

    def __call__(
        self,
        features: Float[Array, "b i j 88"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
    ) -> Float[Array, "b i j c_t"]:
        pair = self.embedding2d(features)
        return self.output_layer_norm(self.template_pair_stack(pair, pair_mask, dropout))


class TemplateEmbedding(nnx.Module):
    """All templates, gathered by attention at each pair of residues (Suppl. Alg. 2, 16, 17)."""

    def __init__(
        self, c_z: int, c_t: int, num_heads: int, c_hidden: int, pair_stack: TemplatePairStack
    ):
        self.single_template_embedding = SingleTemplateEmbedding(c_t, pair_stack)
        self.attention = Attention(c_z, c_t, c_z, num_heads, c_hidden, gating=False)

    def __call__(
        self,
        pair: Float[Array, "b i j c_z"],
        pair_mask: Float[Array, "b i j"],
        template_aatype: Int[Array, "b t r"],
        template_pseudo_beta: Float[Array, "b t r 3"],
        template_pseudo_beta_mask: Float[Array, "b t r"],
        template_all_atom_masks: Float[Array, "b t r 37"],
        template_mask: Float[Array, "b t"],
        dropout: DropoutKey | None = None,
    ) -> Float[Array, "b i j c_z"]:
        """The update of the pair representation; zero where an example has no template."""
        batch, templates, length = template_aatype.shape
        features = template_pair_features(
            template_aatype,
            template_pseudo_beta,
            template_pseudo_beta_mask,
            template_all_atom_masks,
            dtype=pair.dtype,
        )
        # the templates of an example share its dropout masks, as they do in DeepMind's code
        embedded = self.single_template_embedding(
            features.reshape(batch * templates, *features.shape[2:]),
            jnp.repeat(pair_mask, templates, axis=0),
            dropout.repeat(templates) if dropout else None,
        )
        embedded = embedded.reshape(*features.shape[:4], -1)
        update = self.attention.to_templates(pair, embedded, template_mask)
        any_template = jnp.sum(template_mask, axis=-1) > 0
        return update * any_template[:, None, None, None].astype(update.dtype)


def template_pair_features(
    template_aatype: Int[Array, "b t r"],
    template_pseudo_beta: Float[Array, "b t r 3"],
    template_pseudo_beta_mask: Float[Array, "b t r"],
    template_all_atom_masks: Float[Array, "b t r 37"],
    dtype: DTypeLike,
) -> Float[Array, "b t i j 88"]:
    """Distances, types of column and row residue, and masks of every pair (Suppl. Table 1).

    Differs from the supplement: the unit vectors are zero, as in the published monomer models.
    """
    shape = (*template_aatype.shape, template_aatype.shape[-1])
    types = jax.nn.one_hot(template_aatype, TEMPLATE_CLASSES, dtype=dtype)
    backbone = _outer(jnp.prod(template_all_atom_masks[..., _BACKBONE], axis=-1)).astype(dtype)
    features = [
        distance_bins(template_pseudo_beta, *TEMPLATE_BINS, dtype),
        _outer(template_pseudo_beta_mask).astype(dtype)[..., None],
        jnp.broadcast_to(types[..., None, :, :], (*shape, TEMPLATE_CLASSES)),
        jnp.broadcast_to(types[..., :, None, :], (*shape, TEMPLATE_CLASSES)),
        jnp.zeros((*shape, 3), dtype),
        backbone[..., None],
    ]
    return jnp.concatenate(features, axis=-1) * backbone[..., None]


def _outer(mask: Float[Array, "b t r"]) -> Float[Array, "b t i j"]:
    return mask[..., :, None] * mask[..., None, :]
