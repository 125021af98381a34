"""Updates of the pair representation around triangles of residues (Suppl. Alg. 11-15)."""

from jaxtyping import Float
from torch import Tensor, nn

from torchfold import ops, projections
from torchfold.primitives import Attention, LayerNorm, Linear, parameter


class TriangleMultiplication(nn.Module):
    """Edge ij from all edges to a third residue k (Suppl. Alg. 11 and 12).

    With ``factor`` the update is multiplied by it, with ``residual`` added to the pair.
    """

    outgoing: bool

    def __init__(self, c_z: int, c_hidden: int):
        super().__init__()
        self.layer_norm_input = LayerNorm(c_z)
        self.left_projection = Linear(c_z, c_hidden)
        self.right_projection = Linear(c_z, c_hidden)
        self.left_gate = Linear(c_z, c_hidden, init="gating")
        self.right_gate = Linear(c_z, c_hidden, init="gating")
        self.center_layer_norm = LayerNorm(c_hidden)
        self.output_projection = Linear(c_hidden, c_z, init="final")
        self.gating_linear = Linear(c_z, c_z, init="gating")

    def forward(
        self,
        pair: Float[Tensor, "b i j c_z"],
        pair_mask: Float[Tensor, "b i j"],
        factor: Float[Tensor, "b 1 j c_z"] | None = None,
        residual: bool = False,
    ) -> Float[Tensor, "b i j c_z"]:
        projections = (self.left_projection, self.left_gate, self.right_projection, self.right_gate)
        return ops.triangle_multiplication(
            pair,
            pair_mask,
            factor,
            *_norm(self.layer_norm_input),
            *(array for linear in projections for array in _linear(linear)),
            *_norm(self.center_layer_norm),
            *_linear(self.output_projection),
            *_linear(self.gating_linear),
            outgoing=self.outgoing,
            residual=residual,
        )


def _linear(module: Linear) -> tuple[Tensor, Tensor]:
    return module.weights, module.bias


def _norm(module: LayerNorm) -> tuple[Tensor, Tensor]:
    return module.scale, module.offset


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """Over the edges that leave i and j (Suppl. Alg. 11)."""

    outgoing = True


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """Over the edges that arrive at i and j (Suppl. Alg. 12)."""

    outgoing = False


class TriangleAttention(nn.Module):
    """Attention among the edges that share a residue, biased by the third edge (Alg. 13, 14)."""

    starting: bool

    def __init__(self, c_z: int, num_heads: int, c_hidden: int):
        super().__init__()
        self.query_norm = LayerNorm(c_z)
        self.feat_2d_weights = parameter((c_z, num_heads), "normal")
        self.attention = Attention(c_z, c_z, c_z, num_heads, c_hidden)

    def forward(
        self,
        pair: Float[Tensor, "b i j c_z"],
        pair_mask: Float[Tensor, "b i j"],
        factor: Float[Tensor, "b ..."] | None = None,
        residual: bool = False,
    ) -> Float[Tensor, "b i j c_z"]:
        norm, weights = self.query_norm, self.feat_2d_weights
        # among edges that end at a residue, query and key are where they start: along columns,
        # which are rows of the transposed table
        axis, mask = (2, pair_mask) if self.starting else (1, pair_mask.mT)
        x, bias, pair = projections.layer_norm_pair_bias(
            pair, norm.scale, norm.offset, weights, axis=axis
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
