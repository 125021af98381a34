"""Structure module: from representations to atoms (Suppl. Alg. 20, 22-24).

All in at least float32. Translations are in nanometres (10 angstrom) inside, in angstrom outside.

Legend: l structure iterations, p points of a head, n = 7 torsions. ``frames`` are the backbone's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxfold import ops
from jaxfold._masks import draw_ahead, key_of
from jaxfold.ops import at_least_float32
from jaxfold.primitives import DropoutKey, LayerNorm, Linear, parameter
from jaxfold.primitives import dropout as drop
from jaxfold.rigid import (
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


class StructureModule(nnx.Module):
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

    def __call__(
        self,
        single: Float[Array, "b r c_s"],
        pair: Float[Array, "b i j c_z"],
        batch: Mapping[str, Array],
        dropout: DropoutKey | None = None,
    ) -> dict[str, Array]:
        """The structure's entries of the model's outputs."""
        initial = self.single_layer_norm(single.astype(at_least_float32(single.dtype)))
        pair = self.pair_layer_norm(pair.astype(at_least_float32(pair.dtype)))
        singles, quaternions, translations = self._iterate(
            initial, pair, batch["seq_mask"], dropout
        )
        angles, raw_angles = self.fold_iteration.rigid_sidechain(singles, initial)
        rotations = quaternion_to_rotation(quaternions)
        backbone = Rigid(rotations[-1], translations[-1])
        return {
            "structure_module_single": singles[-1],
            "traj": jnp.concatenate([quaternions, translations], axis=-1),
            "traj_rotation": rotations,
            "angles": angles,
            "unnormalized_angles": raw_angles,
            **_place_atoms(backbone, angles[-1], batch),
        }

    def _iterate(
        self,
        initial: Float[Array, "b r c_s"],
        pair: Float[Array, "b i j c_z"],
        seq_mask: Float[Array, "b r"],
        dropout: DropoutKey | None,
    ) -> tuple[Float[Array, "l b r c_s"], Float[Array, "l b r 4"], Float[Array, "l b r 3"]]:
        """Activations, quaternions and translations (angstrom) after every iteration."""
        shared = self.fold_iteration.invariant_point_attention.prepare(pair, seq_mask)

        def iterate(carry: tuple[Array, ...], key: DropoutKey | None) -> tuple[Any, Any]:
            single, quaternion, translation = carry
            # no gradient through the chain of rotations: it makes training unstable
            quaternion = jax.lax.stop_gradient(quaternion)
            frames = Rigid(quaternion_to_rotation(quaternion), translation)
            single, update = self.fold_iteration(single, shared, frames, key)
            quaternion, translation = backbone_update(quaternion, translation, update)
            carry = single, quaternion, translation
            return carry, carry

        start = jnp.zeros((*initial.shape[:2], 7), initial.dtype).at[..., 0].set(1)
        carry = self.initial_projection(initial), start[..., :4], start[..., 4:]
        stack = dropout and dropout.enter("fold_iteration")
        factors = draw_ahead(stack, self.num_iterations, lambda key: iterate(carry, key))
        _, (singles, quaternions, translations) = jax.lax.scan(
            lambda carry, layer: iterate(carry, key_of(stack, layer)),
            carry,
            (jnp.arange(self.num_iterations), factors),
        )
        return singles, quaternions, translations * POSITION_SCALE


def _place_atoms(
    backbone: Rigid, angles: Float[Array, "b r 7 2"], batch: Mapping[str, Array]
) -> dict[str, Array]:
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

    pair: Float[Array, "b i j c_z"]
    bias: Float[Array, "b h i j"]  # of the logits, by the pairs and where there is no residue
    weights: Float[Array, "c_s c"]  # of all projections of a residue, and their offset
    offset: Float[Array, "1 c"]
    point_weights: Float[Array, " h"]


class FoldIteration(nnx.Module):
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

    def __call__(
        self,
        single: Float[Array, "b r c_s"],
        shared: Shared,
        frames: Rigid,
        dropout: DropoutKey | None = None,
    ) -> tuple[Float[Array, "b r c_s"], Float[Array, "b r 6"]]:
        """The new activations, and the update of the backbone they ask for."""
        rate = self.dropout_rate
        single = single + self.invariant_point_attention(single, shared, frames)
        single = drop(single, rate, dropout, "attention")
        single = self.attention_layer_norm(single)
        hidden = jax.nn.relu(self.transition(single))
        hidden = jax.nn.relu(self.transition_1(hidden))
        single = drop(single + self.transition_2(hidden), rate, dropout, "transition")
        single = self.transition_layer_norm(single)
        return single, self.affine_update(single)


class InvariantPointAttention(nnx.Module):
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

    def prepare(self, pair: Float[Array, "b i j c_z"], seq_mask: Float[Array, "b r"]) -> Shared:
        """What does not change from one iteration to the next."""
        weights = jax.nn.softplus(self.trainable_point_weights[...]).astype(pair.dtype)
        weights = weights * (3 * self.sizes[2] * 9 / 2) ** -0.5
        bias = jnp.moveaxis(self.attention_2d(pair), -1, 1) * 3**-0.5
        absent = 1 - seq_mask[:, None, :, None] * seq_mask[:, None, None, :]
        matrix, offset = jnp.split(self._projection(), [len(self.q_scalar.weights[...])])
        return Shared(pair, bias - 1e5 * absent, matrix, offset, weights)

    def _projection(self) -> Float[Array, "c_s+1 c"]:
        """For each head query, key and value; then all x, all y, all z of each head's points."""
        heads, c_hidden, _, _ = self.sizes
        q, kv, q_points, kv_points = (
            jnp.concatenate([linear.weights[...], linear.bias[...][None]])
            for linear in (self.q_scalar, self.kv_scalar, self.q_point_local, self.kv_point_local)
        )
        rows = len(q)
        scalars = [x.reshape(rows, heads, -1) for x in (q * (3 * c_hidden) ** -0.5, kv)]
        points = [x.reshape(rows, 3, heads, -1) for x in (q_points, kv_points)]
        parts = [jnp.concatenate(x, axis=-1).reshape(rows, -1) for x in (scalars, points)]
        return jnp.concatenate(parts, axis=1)

    def __call__(
        self, single: Float[Array, "b r c_s"], shared: Shared, frames: Rigid
    ) -> Float[Array, "b r c_s"]:
        """Update of the single representation; ``shared`` is what ``prepare`` made of the pairs."""
        heads, c_hidden, query_points, _ = self.sizes
        projected = ops._plus(single @ shared.weights, shared.offset[0])
        scalars, local = jnp.split(projected, [3 * heads * c_hidden], axis=-1)
        shape = single.shape[:2]
        q, k, v = jnp.unstack(scalars.reshape(*shape, heads, 3, c_hidden), axis=-2)
        local = jnp.moveaxis(local.reshape(*shape, 3, heads, -1), 2, -1)
        points = frames[..., None, None].apply(local)
        q_points, k_points, v_points = jnp.split(points, [query_points, 2 * query_points], axis=-2)
        logits = self._logits(q, k, q_points, k_points, shared)
        attention = jax.nn.softmax(logits, axis=-1)
        return self.output_projection(self._gather(attention, v, v_points, shared.pair, frames))

    def _logits(
        self, q: Array, k: Array, q_points: Array, k_points: Array, shared: Shared
    ) -> Float[Array, "b h i j"]:
        """The three parts count alike: each is scaled to unit variance, then by sqrt(1/3).

        Of the squared distance |q|^2 - 2 qk + |k|^2, the first term is the same for all keys.
        """
        scale = shared.point_weights[:, None]
        q_points, k_points = (x.reshape(*x.shape[:3], -1) for x in (q_points, k_points))
        square = -0.5 * scale * jnp.sum(k_points * k_points, axis=-1, keepdims=True)
        left = jnp.concatenate([q, scale * q_points, jnp.ones_like(square)], axis=-1)
        right = jnp.concatenate([k, k_points, square], axis=-1)
        return _exact_product("bihc,bjhc->bhij", left, right) + shared.bias

    def _gather(
        self, attention: Array, v: Array, v_points: Array, pair: Array, frames: Rigid
    ) -> Float[Array, "b r c"]:
        """What each residue reads: scalars, points in its own frame, their norms, pairs."""
        values = jnp.concatenate([v, v_points.reshape(*v.shape[:3], -1)], axis=-1)
        gathered = _exact_product("bhij,bjhc->bihc", attention, values)
        scalar, points = jnp.split(gathered, [v.shape[-1]], axis=-1)
        local = frames[..., None, None].invert_apply(points.reshape(*v.shape[:3], -1, 3))
        norm = jnp.sqrt(1e-8 + dot(local, local))
        from_pair = jnp.einsum("bhij,bijc->bihc", attention, pair)
        parts = (scalar, jnp.moveaxis(local, -1, 2), norm, from_pair)
        return jnp.concatenate([part.reshape(*v.shape[:2], -1) for part in parts], axis=-1)


def _exact_product(equation: str, left: Array, right: Array) -> Array:
    """A product of coordinates, whose factors no ``matmul_precision`` may round."""
    return jnp.einsum(equation, left, right, precision=jax.lax.Precision.HIGHEST)


def backbone_update(
    quaternion: Float[Array, "b r 4"],
    translation: Float[Array, "b r 3"],
    update: Float[Array, "b r 6"],
) -> tuple[Float[Array, "b r 4"], Float[Array, "b r 3"]]:
    """Compose frames with a small rotation (1, b, c, d) and a shift in the old frame (Alg. 23)."""
    turned = quaternion + multiply_by_vector(quaternion, update[..., :3])
    shift = rotate(quaternion_to_rotation(quaternion), update[..., 3:])
    return turned / jnp.linalg.norm(turned, axis=-1, keepdims=True), translation + shift


class RigidSidechain(nnx.Module):
    """Torsion angles of each residue from its activations (Suppl. Alg. 20, lines 11-14)."""

    def __init__(self, c_s: int, c_hidden: int):
        self.input_projection = Linear(c_s, c_hidden)
        self.input_projection_1 = Linear(c_s, c_hidden)
        self.resblock1 = Linear(c_hidden, c_hidden, init="relu")
        self.resblock2 = Linear(c_hidden, c_hidden, init="final")
        self.resblock1_1 = Linear(c_hidden, c_hidden, init="relu")
        self.resblock2_1 = Linear(c_hidden, c_hidden, init="final")
        self.unnormalized_angles = Linear(c_hidden, 14)

    def __call__(
        self, single: Float[Array, "*batch r c_s"], initial_single: Float[Array, "*batch r c_s"]
    ) -> tuple[Float[Array, "*batch r 7 2"], Float[Array, "*batch r 7 2"]]:
        """(sin, cos) on the unit circle, and as they came."""
        relu = jax.nn.relu
        hidden = self.input_projection(relu(single))
        hidden = hidden + self.input_projection_1(relu(initial_single))
        hidden = hidden + self.resblock2(relu(self.resblock1(relu(hidden))))
        hidden = hidden + self.resblock2_1(relu(self.resblock1_1(relu(hidden))))
        raw = self.unnormalized_angles(relu(hidden)).reshape(*single.shape[:-1], 7, 2)
        squared = jnp.sum(raw * raw, axis=-1, keepdims=True)
        return raw / jnp.sqrt(jnp.maximum(squared, 1e-12)), raw
