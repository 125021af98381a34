"""Structure module: from representations to atoms (Suppl. Alg. 20, 22-24).

All in at least float32. Translations are in nanometres (10 angstrom) inside, in angstrom outside.

Legend: l structure iterations, p points of a head, n = 7 torsions. ``frames`` are the backbone's.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfold._compiled import piece
from torchfold.ops import at_least_float32
from torchfold.primitives import DropoutKey, LayerNorm, Linear, parameter
from torchfold.primitives import dropout as drop
from torchfold.rigid import (
    Rigid,
    atom14_to_atom37,
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
        pair_bias = self.fold_iteration.invariant_point_attention.attention_2d(pair)

        single = self.initial_projection(initial)
        start = torch.zeros_like(single[..., :1])
        quaternion = torch.cat([start + 1, start, start, start], dim=-1)
        translation = torch.cat([start, start, start], dim=-1)
        found = []
        for iteration in range(self.num_iterations):
            # no gradient through the chain of rotations: it makes training unstable
            quaternion = quaternion.detach()
            frames = Rigid(quaternion_to_rotation(quaternion), translation)
            key = dropout and dropout.enter("fold_iteration", iteration)
            single, update = self.fold_iteration(single, pair, pair_bias, seq_mask, frames, key)
            quaternion, translation = backbone_update(quaternion, translation, update)
            found.append((single, quaternion, translation))
        singles, quaternions, translations = (torch.stack(x) for x in zip(*found, strict=True))
        return singles, quaternions, translations * POSITION_SCALE


@piece
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

    @piece
    def forward(
        self,
        single: Float[Tensor, "b r c_s"],
        pair: Float[Tensor, "b i j c_z"],
        pair_bias: Float[Tensor, "b i j h"],
        seq_mask: Float[Tensor, "b r"],
        frames: Rigid,
        dropout: DropoutKey | None = None,
    ) -> tuple[Float[Tensor, "b r c_s"], Float[Tensor, "b r 6"]]:
        """The new activations, and the update of the backbone they ask for."""
        rate = self.dropout_rate
        single = single + self.invariant_point_attention(single, pair, pair_bias, seq_mask, frames)
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

    def forward(
        self,
        single: Float[Tensor, "b r c_s"],
        pair: Float[Tensor, "b i j c_z"],
        pair_bias: Float[Tensor, "b i j h"],
        seq_mask: Float[Tensor, "b r"],
        frames: Rigid,
    ) -> Float[Tensor, "b r c_s"]:
        """``pair_bias`` is ``attention_2d(pair)``; all iterations share it, as they do ``pair``."""
        heads, c_hidden, query_points, value_points = self.sizes
        q = self.q_scalar(single).reshape(*single.shape[:2], heads, c_hidden)
        kv = self.kv_scalar(single).reshape(*single.shape[:2], heads, 2 * c_hidden)
        k, v = torch.chunk(kv, 2, dim=-1)
        q_points = self._points(self.q_point_local(single), frames)
        kv_points = self._points(self.kv_point_local(single), frames)
        k_points, v_points = torch.split(kv_points, [query_points, value_points], dim=-2)
        logits = self._logits(q, k, q_points, k_points, pair_bias, seq_mask)
        attention = torch.softmax(logits, dim=-1)
        return self.output_projection(self._gather(attention, v, v_points, pair, frames))

    def _points(self, projected: Float[Tensor, "b r c"], frames: Rigid) -> Tensor:
        """Global points [b r h p 3] of a projection laid out as all x, all y, all z."""
        local = projected.reshape(*projected.shape[:2], 3, self.sizes[0], -1)
        return frames[..., None, None].apply(torch.movedim(local, 2, -1))

    def _logits(
        self,
        q: Tensor,
        k: Tensor,
        q_points: Tensor,
        k_points: Tensor,
        pair_bias: Tensor,
        mask: Tensor,
    ) -> Float[Tensor, "b h i j"]:
        """The three parts count alike: each is scaled to unit variance, then by sqrt(1/3)."""
        _, c_hidden, query_points, _ = self.sizes
        scalar = torch.einsum("bihc,bjhc->bhij", q * (3 * c_hidden) ** -0.5, k)
        offset = q_points[:, :, None] - k_points[:, None]
        squared = torch.movedim(torch.sum(offset * offset, dim=(-2, -1)), -1, 1)
        raw = self.trainable_point_weights
        # softplus; torch.nn.functional has one that cuts off the small part of large values
        weights = torch.logaddexp(raw, torch.zeros_like(raw)).to(squared.dtype)
        weights = weights * (3 * query_points * 9 / 2) ** -0.5
        bias = torch.movedim(pair_bias, -1, 1) * 3**-0.5
        absent = 1 - mask[:, None, :, None] * mask[:, None, None, :]
        return scalar + bias - 0.5 * weights[:, None, None] * squared - 1e5 * absent

    def _gather(
        self, attention: Tensor, v: Tensor, v_points: Tensor, pair: Tensor, frames: Rigid
    ) -> Float[Tensor, "b r c"]:
        """What each residue reads: scalars, points in its own frame, their norms, pairs."""
        scalar = torch.einsum("bhij,bjhc->bihc", attention, v)
        values = torch.movedim(v_points, 2, 1)[:, :, None]  # [b h 1 j p 3]
        points = torch.sum(attention[..., None, None] * values, dim=3)
        local = frames[..., None, None].invert_apply(torch.movedim(points, 1, 2))
        norm = torch.sqrt(1e-8 + torch.sum(local * local, dim=-1))
        from_pair = torch.einsum("bhij,bijc->bihc", attention, pair)
        parts = [scalar, *torch.unbind(local, dim=-1), norm, from_pair]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=-1)


@piece
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

    @piece
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
