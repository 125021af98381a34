"""Updates of the pair representation around triangles of residues (Suppl. Alg. 11-15)."""

from collections.abc import Iterator

from flax import nnx
from jaxtyping import Array, Float

from jaxfold import ops, projections
from jaxfold.primitives import Attention, LayerNorm, Linear, parameter
from jaxfold.stack import Deriving


class TriangleMultiplication(Deriving):
    """Edge ij from all edges to a third residue k (Suppl. Alg. 11 and 12).

    With ``factor`` the update is multiplied by it, with ``residual`` added to the pair.
    """

    outgoing: bool
    folded: nnx.Variable[Array] | None = None
    folded_bias: nnx.Variable[Array] | None = None
    output_folded: nnx.Variable[Array] | None = None
    output_folded_bias: nnx.Variable[Array] | None = None

    def __init__(self, c_z: int, c_hidden: int):
        self.layer_norm_input = LayerNorm(c_z)
        self.left_projection = Linear(c_z, c_hidden)
        self.right_projection = Linear(c_z, c_hidden)
        self.left_gate = Linear(c_z, c_hidden, init="gating")
        self.right_gate = Linear(c_z, c_hidden, init="gating")
        self.center_layer_norm = LayerNorm(c_hidden)
        self.output_projection = Linear(c_hidden, c_z, init="final")
        self.gating_linear = Linear(c_z, c_z, init="gating")

    def derive(self) -> dict[str, Array]:
        """What kernels take in place of parameters."""
        folded = projections.fold_triangle(*self._parameters_in_order())
        return folded._asdict() if folded else {}

    def _parameters_in_order(self) -> Iterator[Array]:
        """As TriangleParameters."""
        norm, center = self.layer_norm_input, self.center_layer_norm
        sides = (self.left_projection, self.left_gate, self.right_projection, self.right_gate)
        for module in (norm, *sides, center, self.output_projection, self.gating_linear):
            if isinstance(module, LayerNorm):
                yield from (module.scale[...], module.offset[...])
            else:
                yield from (module.weights[...], module.bias[...])

    def __call__(
        self,
        pair: Float[Array, "b i j c_z"],
        pair_mask: Float[Array, "b i j"],
        factor: Float[Array, "b 1 j c_z"] | None = None,
        residual: bool = False,
    ) -> Float[Array, "b i j c_z"]:
        given = self.folded, self.folded_bias, self.output_folded, self.output_folded_bias
        folded = [x[...] for x in given if x is not None]
        parameters = folded or self._parameters_in_order()
        return ops.triangle_multiplication(
            pair,
            pair_mask,
            factor,
            *parameters,
            outgoing=self.outgoing,
            residual=residual,
        )


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """Over the edges that leave i and j (Suppl. Alg. 11)."""

    outgoing = True


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """Over the edges that arrive at i and j (Suppl. Alg. 12)."""

    outgoing = False


class TriangleAttention(nnx.Module):
    """Attention among the edges that share a residue, biased by the third edge (Alg. 13, 14)."""

    starting: bool

    def __init__(self, c_z: int, num_heads: int, c_hidden: int):
        self.query_norm = LayerNorm(c_z)
        self.feat_2d_weights = parameter((c_z, num_heads), "normal")
        self.attention = Attention(c_z, c_z, c_z, num_heads, c_hidden)

    def __call__(
        self,
        pair: Float[Array, "b i j c_z"],
        pair_mask: Float[Array, "b i j"],
        factor: Float[Array, "b ..."] | None = None,
        residual: bool = False,
        transposed_mask: Float[Array, "b j i"] | None = None,
    ) -> Float[Array, "b i j c_z"]:
        """``transposed_mask`` is ``pair_mask`` transposed, where that is known."""
        norm, weights = self.query_norm, self.feat_2d_weights[...]
        # among edges that end at a residue, query and key are where they start: along columns,
        # which are rows of the transposed table
        columns = pair_mask.mT if transposed_mask is None else transposed_mask
        axis, mask = (2, pair_mask) if self.starting else (1, columns)
        x, bias, pair = projections.layer_norm_pair_bias(
            pair, norm.scale[...], norm.offset[...], weights, axis=axis
        )
        projected = self.attention.project(x)
        return self.attention.within(
            projected,
            mask,
            pair,
            bias,
            factor=factor,
            residual=residual,
            transposed=not self.starting,
        )


class TriangleAttentionStartingNode(TriangleAttention):
    """Among the edges that start at i (Suppl. Alg. 13)."""

    starting = True


class TriangleAttentionEndingNode(TriangleAttention):
    """Among the edges that end at j (Suppl. Alg. 14)."""

    starting = False
