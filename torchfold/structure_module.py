"""Structure module: from representations to atoms (Suppl. Alg. 20, 22-24).

All in at least float32. Translations are in nanometres (10 angstrom) inside, in angstrom outside.

Legend: l structure iterations, p points of a head, n = 7 torsions. ``frames`` are the backbone's.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from torchfold._compiled import piece
from torchfold._products import exact_product
from torchfold.ops import at_least_float32
from torchfold.primitives import DropoutKey, LayerNorm, Linear, parameter
from torchfold.primitives import dropout as drop
from torchfold.rigid import (
    Rigid,
    atom14_to_atom37,
    dot,
    frames_to_atom14,
    multiply_by_vector,
    quaternion_to_rotation,
    rotate,
    torsion_angles_to_frames,
)

POSITION_SCALE = 10.0  # angstrom in a nanometre


class StructureModule(nn.Module):
    """Frames, torsions and atoms from the representations (Suppl. Alg. 20)."""

    def __init__(
        self,
        c_s: int,
        c_z: int,
        *,
        num_iterations: int,
        num_heads: int,
        c_hidden: int,
        num_query_points: int,
        num_value_points: int,
        sidechain_channels: int,
        dropout_rate: float,
    ):
        super().__init__()
        self.num_iterations = num_iterations
        self.single_layer_norm = LayerNorm(c_s)
        self.initial_projection = Linear(c_s, c_s)
        self.pair_layer_norm = LayerNorm(c_z)
        self.fold_iteration = FoldIteration(
            c_s,
            c_z,
            num_heads=num_heads,
            c_hidden=c_hidden,
            num_query_points=num_query_points,
            num_value_points=num_value_points,
            sidechain_channels=sidechain_channels,
            dropout_rate=dropout_rate,
        )

    def forward(
        self,
        single: Float[Tensor, "b r c_s"],
        pair: Float[Tensor, "b i j c_z"],
        batch: Mapping[str, Tensor],
        dropout: DropoutKey | None = None,
    ) -> dict[str, Tensor]:
        """The structure's entries of the model's outputs."""
        initial = self.single_layer_norm(single.to(at_least_float32(single.dtype)))
        pair = self.pair_layer_norm(pair.to(at_least_float32(pair.dtype)))
        singles, quaternions, translations = self._iterate(
            initial, pair, batch["seq_mask"], dropout
        )
        return self._finish(singles, initial, quaternions, translations, batch)

    @piece
    def _finish(
        self,
        singles: Float[Tensor, "l b r c_s"],
        initial: Float[Tensor, "b r c_s"],
        quaternions: Float[Tensor, "l b r 4"],
        translations: Float[Tensor, "l b r 3"],
        batch: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Torsions and atoms, once all iterations are done (Suppl. Alg. 20, lines 11-14, 24)."""
        angles, raw_angles = self.fold_iteration.rigid_sidechain(singles, initial)
        rotations = quaternion_to_rotation(quaternions)
        backbone = Rigid(rotations[-1], translations[-1])
        return {
            "structure_module_single": singles[-1],
            "traj": torch.cat([quaternions, translations], dim=-1),
            "traj_rotation": rotations,
            "angles": angles,
            "unnormalized_angles": raw_angles,
            **_place_atoms(backbone, angles[-1], batch),
        }

    def _iterate(
        self,
        initial: Float[Tensor, "b r c_s"],
        pair: Float[Tensor, "b i j c_z"],
        seq_mask: Float[Tensor, "b r"],
        dropout: DropoutKey | None,
    ) -> tuple[Float[Tensor, "l b r c_s"], Float[Tensor, "l b r 4"], Float[Tensor, "l b r 3"]]:
        """Activations, quaternions and translations (angstrom) after every iteration."""
        shared = self.fold_iteration.invariant_point_attention.prepare(pair, seq_mask)

        single = self.initial_projection(initial)
        start = torch.zeros_like(single[..., :1])
        quaternion = torch.cat([start + 1, start, start, start], dim=-1)
        translation = torch.cat([start, start, start], dim=-1)
        # as after an iteration: all are one program then, if compiled
        translation.requires_grad_(torch.is_grad_enabled())
        found = []
        for iteration in range(self.num_iterations):
            key = dropout and dropout.enter("fold_iteration", iteration)
            # no gradient through the chain of rotations: it makes training unstable
            single, quaternion, translation = self._iteration(
                single, quaternion.detach(), translation, shared, key
            )
            found.append((single, quaternion, translation))
        singles, quaternions, translations = (torch.stack(x) for x in zip(*found, strict=True))
        return singles, quaternions, translations * POSITION_SCALE

    @piece
    def _iteration(
        self,
        single: Float[Tensor, "b r c_s"],
        quaternion: Float[Tensor, "b r 4"],
        translation: Float[Tensor, "b r 3"],
        shared: "Shared",
        dropout: DropoutKey | None,
    ) -> tuple[Float[Tensor, "b r c_s"], Float[Tensor, "b r 4"], Float[Tensor, "b r 3"]]:
        """One iteration; the program of all, where it is compiled."""
        frames = Rigid(quaternion_to_rotation(quaternion), translation)
        single, update = self.fold_iteration(single, shared, frames, dropout)
        return single, *backbone_update(quaternion, translation, update)


def _place_atoms(
    backbone: Rigid, angles: Float[Tensor, "b r 7 2"], batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Frames of all rigid groups and all atoms, angstrom (Suppl. Alg. 24)."""
    frames = torsion_angles_to_frames(batch["aatype"], backbone, angles)
    atom14 = frames_to_atom14(batch["aatype"], frames)
    return {
        "sidechain_frames_rotation": frames.rotation,
        "sidechain_frames_translation": frames.translation,
        "final_atom14_positions": atom14,
        "final_atom37_positions": atom14_to_atom37(
            atom14, batch["residx_atom37_to_atom14"], batch["atom37_atom_exists"]
        ),
    }


class Shared(NamedTuple):
    """What the attention of every iteration reads."""

    pair: Float[Tensor, "b i j c_z"]
    bias: Float[Tensor, "b h i j"]  # of the logits, by the pairs and where there is no residue
    weights: Float[Tensor, "c_s c"]  # of all projections of a residue, and their offset
    offset: Float[Tensor, "1 c"]
    point_weights: Float[Tensor, " h"]


class FoldIteration(nn.Module):
    """One iteration of the structure module (Suppl. Alg. 20, lines 6-10); all share its weights."""

    def __init__(
        self,
        c_s: int,
        c_z: int,
        *,
        num_heads: int,
        c_hidden: int,
        num_query_points: int,
        num_value_points: int,
        sidechain_channels: int,
        dropout_rate: float,
    ):
        super().__init__()
        self.dropout_rate = dropout_rate
        self.invariant_point_attention = InvariantPointAttention(
            c_s,
            c_z,
            num_heads=num_heads,
            c_hidden=c_hidden,
            num_query_points=num_query_points,
            num_value_points=num_value_points,
        )
        self.attention_layer_norm = LayerNorm(c_s)
        self.transition = Linear(c_s, c_s, init="relu")
        self.transition_1 = Linear(c_s, c_s, init="relu")
        self.transition_2 = Linear(c_s, c_s, init="final")
        self.transition_layer_norm = LayerNorm(c_s)
        self.affine_update = Linear(c_s, 6, init="final")
        self.rigid_sidechain = RigidSidechain(c_s, sidechain_channels)

    def forward(
        self,
        single: Float[Tensor, "b r c_s"],
        shared: Shared,
        frames: Rigid,
        dropout: DropoutKey | None = None,
    ) -> tuple[Float[Tensor, "b r c_s"], Float[Tensor, "b r 6"]]:
        """The new activations, and the update of the backbone they ask for."""
        rate = self.dropout_rate
        single = single + self.invariant_point_attention(single, shared, frames)
        single = drop(single, rate, dropout, "attention")
        single = self.attention_layer_norm(single)
        hidden = torch.relu(self.transition(single))
        hidden = torch.relu(self.transition_1(hidden))
        single = drop(single + self.transition_2(hidden), rate, dropout, "transition")
        single = self.transition_layer_norm(single)
        return single, self.affine_update(single)


class InvariantPointAttention(nn.Module):
    """Attention by scalars, pairs and distances of points held in each frame (Suppl. Alg. 22)."""

    def __init__(
        self,
        c_s: int,
        c_z: int,
        *,
        num_heads: int,
        c_hidden: int,
        num_query_points: int,
        num_value_points: int,
    ):
        super().__init__()
        self.sizes = (num_heads, c_hidden, num_query_points, num_value_points)
        points = num_query_points + num_value_points
        self.q_scalar = Linear(c_s, num_heads * c_hidden)
        self.kv_scalar = Linear(c_s, num_heads * 2 * c_hidden)
        self.q_point_local = Linear(c_s, num_heads * 3 * num_query_points)
        self.kv_point_local = Linear(c_s, num_heads * 3 * points)
        self.attention_2d = Linear(c_z, num_heads)
        self.trainable_point_weights = parameter((num_heads,), "point_weights")
        c_out = num_heads * (c_hidden + 4 * num_value_points + c_z)
        self.output_projection = Linear(c_out, c_s, init="final")

    def prepare(self, pair: Float[Tensor, "b i j c_z"], seq_mask: Float[Tensor, "b r"]) -> Shared:
        """What does not change from one iteration to the next."""
        raw = self.trainable_point_weights
        # softplus; torch.nn.functional has one that cuts off the small part of large values
        weights = torch.logaddexp(raw, torch.zeros_like(raw)).to(pair.dtype)
        weights = weights * (3 * self.sizes[2] * 9 / 2) ** -0.5
        bias = torch.movedim(self.attention_2d(pair), -1, 1) * 3**-0.5
        absent = 1 - seq_mask[:, None, :, None] * seq_mask[:, None, None, :]
        matrix, offset = self._projection().split([len(self.q_scalar.weights), 1])
        return Shared(pair, (bias - 1e5 * absent).contiguous(), matrix, offset, weights)

    def _projection(self) -> Float[Tensor, "c_s+1 c"]:
        """For each head query, key and value; then all x, all y, all z of each head's points."""
        heads, c_hidden, _, _ = self.sizes
        q, kv, q_points, kv_points = (
            torch.cat([linear.weights, linear.bias[None]])
            for linear in (self.q_scalar, self.kv_scalar, self.q_point_local, self.kv_point_local)
        )
        scalars = (q * (3 * c_hidden) ** -0.5, kv)
        by_head = torch.cat([x.unflatten(1, (heads, -1)) for x in scalars], dim=-1)
        points = torch.cat([x.unflatten(1, (3, heads, -1)) for x in (q_points, kv_points)], dim=-1)
        return torch.cat([by_head.flatten(1), points.flatten(1)], dim=1)

    def forward(
        self, single: Float[Tensor, "b r c_s"], shared: Shared, frames: Rigid
    ) -> Float[Tensor, "b r c_s"]:
        """Update of the single representation; ``shared`` is what ``prepare`` made of the pairs."""
        heads, c_hidden, query_points, value_points = self.sizes
        projected = F.linear(single, shared.weights.T, shared.offset[0])
        counts = [3 * heads * c_hidden, 3 * heads * (2 * query_points + value_points)]
        scalars, local = projected.split(counts, dim=-1)
        q, k, v = scalars.unflatten(-1, (heads, 3, c_hidden)).unbind(-2)
        local = torch.movedim(local.unflatten(-1, (3, heads, -1)), 2, -1)
        points = frames[..., None, None].apply(local)
        q_points, k_points, v_points = points.split([query_points, query_points, value_points], -2)
        logits = self._logits(q, k, q_points, k_points, shared)
        attention = torch.softmax(logits, dim=-1)
        return self.output_projection(self._gather(attention, v, v_points, shared.pair, frames))

    def _logits(
        self, q: Tensor, k: Tensor, q_points: Tensor, k_points: Tensor, shared: Shared
    ) -> Float[Tensor, "b h i j"]:
        """The three parts count alike: each is scaled to unit variance, then by sqrt(1/3).

        Of the squared distance |q|^2 - 2 qk + |k|^2, the first term is the same for all keys.
        """
        scale = shared.point_weights[:, None]
        q_points, k_points = q_points.flatten(-2), k_points.flatten(-2)
        square = -0.5 * scale * dot(k_points, k_points)[..., None]
        left = torch.cat([q, scale * q_points, torch.ones_like(square)], dim=-1)
        right = torch.cat([k, k_points, square], dim=-1)
        product = exact_product(_by_head(left), _by_head(right).mT)
        return product.view(shared.bias.shape) + shared.bias

    def _gather(
        self, attention: Tensor, v: Tensor, v_points: Tensor, pair: Tensor, frames: Rigid
    ) -> Float[Tensor, "b r c"]:
        """What each residue reads: scalars, points in its own frame, their norms, pairs."""
        values = torch.cat([v, v_points.flatten(-2)], dim=-1)
        gathered = exact_product(attention.flatten(0, 1), _by_head(values))
        gathered = gathered.unflatten(0, attention.shape[:2]).transpose(1, 2)
        scalar, points = gathered.split([v.shape[-1], 3 * v_points.shape[-2]], dim=-1)
        local = frames[..., None, None].invert_apply(points.unflatten(-1, (-1, 3)))
        norm = torch.sqrt(1e-8 + dot(local, local))
        from_pair = torch.einsum("bhij,bijc->bihc", attention, pair)
        parts = (scalar, torch.movedim(local, -1, 2), norm, from_pair)
        return torch.cat([part.flatten(2) for part in parts], dim=-1)


def _by_head(x: Float[Tensor, "b r h c"]) -> Float[Tensor, "b*h r c"]:
    return x.transpose(1, 2).flatten(0, 1)


def backbone_update(
    quaternion: Float[Tensor, "b r 4"],
    translation: Float[Tensor, "b r 3"],
    update: Float[Tensor, "b r 6"],
) -> tuple[Float[Tensor, "b r 4"], Float[Tensor, "b r 3"]]:
    """Compose frames with a small rotation (1, b, c, d) and a shift in the old frame (Alg. 23)."""
    turned = quaternion + multiply_by_vector(quaternion, update[..., :3])
    shift = rotate(quaternion_to_rotation(quaternion), update[..., 3:])
    return turned / torch.linalg.vector_norm(turned, dim=-1, keepdim=True), translation + shift


class RigidSidechain(nn.Module):
    """Torsion angles of each residue from its activations (Suppl. Alg. 20, lines 11-14)."""

    def __init__(self, c_s: int, c_hidden: int):
        super().__init__()
        self.input_projection = Linear(c_s, c_hidden)
        self.input_projection_1 = Linear(c_s, c_hidden)
        self.resblock1 = Linear(c_hidden, c_hidden, init="relu")
        self.resblock2 = Linear(c_hidden, c_hidden, init="final")
        self.resblock1_1 = Linear(c_hidden, c_hidden, init="relu")
        self.resblock2_1 = Linear(c_hidden, c_hidden, init="final")
        self.unnormalized_angles = Linear(c_hidden, 14)

    def forward(
        self, single: Float[Tensor, "*batch r c_s"], initial_single: Float[Tensor, "*batch r c_s"]
    ) -> tuple[Float[Tensor, "*batch r 7 2"], Float[Tensor, "*batch r 7 2"]]:
        """(sin, cos) on the unit circle, and as they came."""
        relu = torch.relu
        hidden = self.input_projection(relu(single))
        hidden = hidden + self.input_projection_1(relu(initial_single))
        hidden = hidden + self.resblock2(relu(self.resblock1(relu(hidden))))
        hidden = hidden + self.resblock2_1(relu(self.resblock1_1(relu(hidden))))
        raw = self.unnormalized_angles(relu(hidden)).reshape(*single.shape[:-1], 7, 2)
        squared = torch.sum(raw * raw, dim=-1, keepdim=True)
        return raw / torch.sqrt(torch.clamp(squared, min=1e-12)), raw
