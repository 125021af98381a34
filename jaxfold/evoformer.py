"""The Evoformer and its small relative for the extra MSA (Suppl. 1.6, 1.7.2).

Legend: s counts all MSA rows, clusters or extra sequences, and the rows of template torsions.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxfold import ops, primitives, projections
from jaxfold._masks import run_with_dropout
from jaxfold.primitives import (
    Attention,
    DropoutKey,
    GlobalAttention,
    LayerNorm,
    Linear,
    Transition,
    parameter,
)
from jaxfold.stack import Recompute, stack
from jaxfold.triangle import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)

Msa = Float[Array, "b s r c_m"]
Pair = Float[Array, "b i j c_z"]
Count = Float[Array, "b i j"]


class MSARowAttentionWithPairBias(nnx.Module):
    """Attention along each sequence, biased by the pair representation (Suppl. Alg. 7)."""

    def __init__(self, c_m: int, c_z: int, num_heads: int, c_hidden: int):
        self.query_norm = LayerNorm(c_m)
        self.feat_2d_norm = LayerNorm(c_z)
        self.feat_2d_weights = parameter((c_z, num_heads), "normal")
        self.attention = Attention(c_m, c_m, c_m, num_heads, c_hidden)

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        pair: Float[Array, "b i j c_z"],
        msa_mask: Float[Array, "b s r"],
        factor: Float[Array, "b 1 r c_m"] | None = None,
        residual: bool = False,
    ) -> Float[Array, "b s r c_m"]:
        return self.with_pair(msa, pair, msa_mask, factor, residual)[0]

    def with_pair(
        self,
        msa: Msa,
        pair: Pair,
        msa_mask: Float[Array, "b s r"],
        factor: Float[Array, "b 1 r c_m"] | None = None,
        residual: bool = False,
    ) -> tuple[Msa, Pair]:
        """The same, and the pair to go on with: its gradients are added in the norm's kernel."""
        x, msa = self.query_norm.with_residual(msa)
        norm = self.feat_2d_norm
        bias, pair = projections.pair_bias(
            pair, norm.scale[...], norm.offset[...], self.feat_2d_weights[...]
        )
        projected = self.attention.project(x)
        update = self.attention.within(projected, msa_mask, msa, bias, 2, factor, residual)
        return update, pair


class MSAColumnAttention(nnx.Module):
    """Attention among the sequences at each residue (Suppl. Alg. 8)."""

    def __init__(self, c_m: int, num_heads: int, c_hidden: int):
        self.query_norm = LayerNorm(c_m)
        self.attention = Attention(c_m, c_m, c_m, num_heads, c_hidden)

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        msa_mask: Float[Array, "b s r"],
        residual: bool = False,
    ) -> Float[Array, "b s r c_m"]:
        x, msa = self.query_norm.with_residual(msa)
        projected = self.attention.project(x)
        return self.attention.within(projected, msa_mask, msa, axis=1, residual=residual)


class MSAColumnGlobalAttention(nnx.Module):
    """The same with one query a residue, for many sequences (Suppl. Alg. 19)."""

    def __init__(self, c_m: int, num_heads: int, c_hidden: int):
        self.query_norm = LayerNorm(c_m)
        self.attention = GlobalAttention(c_m, num_heads, c_hidden)

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        msa_mask: Float[Array, "b s r"],
        residual: bool = False,
    ) -> Float[Array, "b s r c_m"]:
        x, msa = self.query_norm.with_residual(msa)
        return self.attention(x, msa_mask, msa, axis=1, residual=residual)


def sequence_count(mask: Float[Array, "b s r"]) -> Count:
    """How many sequences have both residues of a pair, which ``OuterProductMean`` divides by."""
    return jnp.einsum("bsi,bsj->bij", mask, mask)


class OuterProductMean(nnx.Module):
    """From the MSA to the pair representation (Suppl. Alg. 10)."""

    def __init__(self, c_m: int, c_z: int, c_hidden: int):
        self.layer_norm_input = LayerNorm(c_m)
        self.left_projection = Linear(c_m, c_hidden)
        self.right_projection = Linear(c_m, c_hidden)
        self.output_w = parameter((c_hidden, c_hidden, c_z), "zeros")
        self.output_b = parameter((c_z,), "zeros")

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        msa_mask: Float[Array, "b s r"],
        pair: Float[Array, "b i j c_z"] | None = None,
    ) -> Float[Array, "b i j c_z"]:
        """The update; with ``pair``, added to it."""
        return self.with_msa(msa, msa_mask, pair)[1]

    def with_msa(
        self,
        msa: Msa,
        msa_mask: Float[Array, "b s r"],
        pair: Pair | None = None,
        count: Count | None = None,
    ) -> tuple[Msa, Pair]:
        """The MSA to go on with, whose gradients are added in the norm's kernel; and the same."""
        norm, layers = self.layer_norm_input, (self.left_projection, self.right_projection)
        linear = (array for x in layers for array in (x.weights[...], x.bias[...]))
        left, right, msa = projections.outer_product_sides(
            msa, msa_mask, norm.scale[...], norm.offset[...], *linear
        )
        output = self.output_w[...], self.output_b[...]
        return msa, ops.outer_product_mean(left, right, msa_mask, *output, pair, count)


class EvoformerBlock(nnx.Module):
    """One block of the Evoformer (Suppl. Alg. 6) or of the extra MSA stack (Alg. 18)."""

    def __init__(
        self,
        c_m: int,
        c_z: int,
        *,
        msa_heads: int,
        msa_head_dim: int,
        pair_heads: int,
        pair_head_dim: int,
        outer_product_hidden: int,
        triangle_hidden: int,
        transition_factor: int,
        msa_dropout: float,
        pair_dropout: float,
        global_column_attention: bool = False,
    ):
        self.msa_dropout = msa_dropout
        self.pair_dropout = pair_dropout
        self.global_column_attention = global_column_attention
        self.msa_row_attention_with_pair_bias = MSARowAttentionWithPairBias(
            c_m, c_z, msa_heads, msa_head_dim
        )
        if global_column_attention:
            self.msa_column_global_attention = MSAColumnGlobalAttention(
                c_m, msa_heads, msa_head_dim
            )
        else:
            self.msa_column_attention = MSAColumnAttention(c_m, msa_heads, msa_head_dim)
        self.msa_transition = Transition(c_m, transition_factor)
        self.outer_product_mean = OuterProductMean(c_m, c_z, outer_product_hidden)
        self.triangle_multiplication_outgoing = TriangleMultiplicationOutgoing(c_z, triangle_hidden)
        self.triangle_multiplication_incoming = TriangleMultiplicationIncoming(c_z, triangle_hidden)
        self.triangle_attention_starting_node = TriangleAttentionStartingNode(
            c_z, pair_heads, pair_head_dim
        )
        self.triangle_attention_ending_node = TriangleAttentionEndingNode(
            c_z, pair_heads, pair_head_dim
        )
        self.pair_transition = Transition(c_z, transition_factor)

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        pair: Float[Array, "b i j c_z"],
        msa_mask: Float[Array, "b s r"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
        count: Count | None = None,
        transposed_mask: Float[Array, "b j i"] | None = None,
    ) -> tuple[Msa, Pair]:
        """``count`` is what ``sequence_count`` makes of the MSA's mask and ``transposed_mask`` is
        the pairs', where they are known."""
        msa, pair = self._update_msa(msa, pair, msa_mask, dropout)
        msa, pair = self.outer_product_mean.with_msa(msa, msa_mask, pair, count)
        return msa, self._update_pair(pair, pair_mask, dropout, transposed_mask)

    def _update_msa(
        self, msa: Msa, pair: Pair, msa_mask: Float[Array, "b s r"], dropout: DropoutKey | None
    ) -> tuple[Msa, Pair]:
        name, row = "msa_row_attention_with_pair_bias", self.msa_row_attention_with_pair_bias
        factor = primitives.dropout_factor(msa, self.msa_dropout, dropout, name, shared_axis=1)
        msa, pair = row.with_pair(msa, pair, msa_mask, factor, residual=True)
        if self.global_column_attention:
            msa = self.msa_column_global_attention(msa, msa_mask, residual=True)
        else:
            msa = self.msa_column_attention(msa, msa_mask, residual=True)
        return self.msa_transition(msa, residual=True), pair

    def _update_pair(
        self,
        pair: Pair,
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None,
        transposed_mask: Float[Array, "b j i"] | None,
    ) -> Pair:
        rate = self.pair_dropout
        for multiplication, name in (
            (self.triangle_multiplication_outgoing, "triangle_multiplication_outgoing"),
            (self.triangle_multiplication_incoming, "triangle_multiplication_incoming"),
        ):
            factor = primitives.dropout_factor(pair, rate, dropout, name, shared_axis=1)
            pair = multiplication(pair, pair_mask, factor, residual=True)
        for module, name, shared_axis in (
            (self.triangle_attention_starting_node, "triangle_attention_starting_node", 1),
            (self.triangle_attention_ending_node, "triangle_attention_ending_node", 2),
        ):
            factor = primitives.dropout_factor(pair, rate, dropout, name, shared_axis)
            pair = module(pair, pair_mask, factor, residual=True, transposed_mask=transposed_mask)
        return self.pair_transition(pair, residual=True)


class EvoformerStack(nnx.Module):
    """All blocks and the single representation (Alg. 6); ``block`` shows what is stacked."""

    def __init__(
        self,
        block: EvoformerBlock,
        num_blocks: int,
        c_m: int,
        c_s: int,
        *,
        recompute: Recompute = "none",
        unroll: bool = False,
    ):
        self.recompute = recompute
        self.unroll = unroll
        self.blocks = stack(block, num_blocks)
        self.single_activations = Linear(c_m, c_s)

    def __call__(
        self,
        msa: Float[Array, "b s r c_m"],
        pair: Float[Array, "b i j c_z"],
        msa_mask: Float[Array, "b s r"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
    ) -> tuple[Msa, Pair, Float[Array, "b r c_s"]]:
        # the same for all blocks
        count, transposed = sequence_count(msa_mask), pair_mask.mT

        def call(
            block: EvoformerBlock, carry: tuple[Msa, Pair], key: DropoutKey | None
        ) -> tuple[Msa, Pair]:
            return block(*carry, msa_mask, pair_mask, key, count, transposed)

        key = dropout.enter("evoformer_iteration") if dropout else None

        msa, pair = run_with_dropout(
            self.blocks, (msa, pair), call, key, self.recompute, self.unroll
        )
        return msa, pair, self.single_activations(msa[:, 0])


class ExtraMSAStack(nnx.Module):
    """What many unclustered sequences say about pairs (Suppl. Alg. 18)."""

    def __init__(
        self,
        block: EvoformerBlock,
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
        msa: Float[Array, "b e r c_e"],
        pair: Float[Array, "b i j c_z"],
        msa_mask: Float[Array, "b e r"],
        pair_mask: Float[Array, "b i j"],
        dropout: DropoutKey | None = None,
    ) -> Float[Array, "b i j c_z"]:
        # the same for all blocks
        count, transposed = sequence_count(msa_mask), pair_mask.mT

        def call(
            block: EvoformerBlock, carry: tuple[Msa, Pair], key: DropoutKey | None
        ) -> tuple[Msa, Pair]:
            return block(*carry, msa_mask, pair_mask, key, count, transposed)

        key = dropout.enter("extra_msa_stack") if dropout else None

        _, pair = run_with_dropout(self.blocks, (msa, pair), call, key, self.recompute, self.unroll)
        return pair
