"""The structure module: invariance, masking, gradients between iterations; and the heads."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from foldcore import constants
from jaxfold.heads import DistogramHead, PredictedLDDTHead
from jaxfold.primitives import DropoutKey
from jaxfold.rigid import Rigid, quaternion_to_rotation, rigid_from_quaternion
from jaxfold.structure_module import FoldIteration, StructureModule, backbone_update

C_S, C_Z, RESIDUES, BATCH, ITERATIONS, PADDING = 12, 6, 7, 2, 2, 2
SIZES: dict[str, Any] = {
    "num_heads": 3,
    "c_hidden": 4,
    "num_query_points": 2,
    "num_value_points": 3,
    "sidechain_channels": 8,
    "dropout_rate": 0.1,
}
PARAMETERS = """
fold_iteration/affine_update fold_iteration/attention_layer_norm
fold_iteration/invariant_point_attention/attention_2d
fold_iteration/invariant_point_attention/kv_point_local
fold_iteration/invariant_point_attention/kv_scalar
fold_iteration/invariant_point_attention/output_projection
fold_iteration/invariant_point_attention/q_point_local
fold_iteration/invariant_point_attention/q_scalar
fold_iteration/rigid_sidechain/input_projection fold_iteration/rigid_sidechain/input_projection_1
fold_iteration/rigid_sidechain/resblock1 fold_iteration/rigid_sidechain/resblock1_1
fold_iteration/rigid_sidechain/resblock2 fold_iteration/rigid_sidechain/resblock2_1
fold_iteration/rigid_sidechain/unnormalized_angles
fold_iteration/transition fold_iteration/transition_1 fold_iteration/transition_2
fold_iteration/transition_layer_norm initial_projection pair_layer_norm single_layer_norm
"""
Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def randomised(module: nnx.Module, seed: int = 0) -> tuple[Any, Any]:
    """Graph and state of a module whose every parameter takes part."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(module)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        del path
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.4 + 0.1)

    return graph, jax.tree_util.tree_map_with_path(draw, state)


@pytest.fixture(scope="module")
def module() -> tuple[Any, Any]:
    with jax.enable_x64(True):
        return randomised(StructureModule(C_S, C_Z, num_iterations=ITERATIONS, **SIZES))


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray, Arrays]:
    rng = np.random.default_rng(1)
    aatype = rng.integers(0, 20, (BATCH, RESIDUES)).astype(np.int32)
    seq_mask = np.ones((BATCH, RESIDUES))
    seq_mask[1, -PADDING:] = 0
    batch = {
        "aatype": aatype,
        "seq_mask": seq_mask,
        "residx_atom37_to_atom14": constants.restype_atom37_to_atom14[aatype],
        "atom37_atom_exists": constants.restype_atom37_mask[aatype] * seq_mask[..., None],
    }
    single = rng.normal(size=(BATCH, RESIDUES, C_S))
    return single, rng.normal(size=(BATCH, RESIDUES, RESIDUES, C_Z)), batch


def run(module: Any, inputs: Any, dropout: DropoutKey | None = None) -> Arrays:
    graph, state = module
    return _run(graph, state, *inputs, dropout)


def _apply(graph: Any, state: Any, single: Any, pair: Any, batch: Arrays, dropout: Any) -> Arrays:
    return nnx.merge(graph, state)(single, pair, batch, dropout)


_run = jax.jit(_apply, static_argnums=0)


def key(step: int) -> DropoutKey:
    return DropoutKey(jnp.uint32(0), jnp.uint32(step), jnp.arange(BATCH, dtype=jnp.int32))


def random_frames(seed: int, *shape: int) -> Rigid:
    tensor = np.random.default_rng(seed).normal(size=(*shape, 7))
    tensor[..., :4] /= np.linalg.norm(tensor[..., :4], axis=-1, keepdims=True)
    return rigid_from_quaternion(jnp.asarray(tensor))


def test_parameters_carry_their_published_names() -> None:
    module = StructureModule(C_S, C_Z, num_iterations=ITERATIONS, **SIZES)
    scopes = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert scopes == {*PARAMETERS.split(), "fold_iteration/invariant_point_attention"}


def test_full_size_has_the_published_number_of_parameters() -> None:
    sizes = SIZES | {"num_heads": 12, "c_hidden": 16, "num_query_points": 4}
    sizes |= {"num_value_points": 8, "sidechain_channels": 128}
    module = nnx.eval_shape(lambda: StructureModule(384, 128, num_iterations=8, **sizes))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(nnx.state(module)))
    assert count == 2_019_116


def test_outputs_have_their_shapes_and_constraints(module: Any, inputs: Any) -> None:
    outputs = run(module, inputs)
    leading = (ITERATIONS, BATCH, RESIDUES)
    assert {name: value.shape for name, value in outputs.items()} == {
        "structure_module_single": (*leading[1:], C_S),
        "traj": (*leading, 7),
        "traj_rotation": (*leading, 3, 3),
        "angles": (*leading, 7, 2),
        "unnormalized_angles": (*leading, 7, 2),
        "sidechain_frames_rotation": (*leading[1:], 8, 3, 3),
        "sidechain_frames_translation": (*leading[1:], 8, 3),
        "final_atom14_positions": (*leading[1:], 14, 3),
        "final_atom37_positions": (*leading[1:], 37, 3),
    }
    np.testing.assert_allclose(np.linalg.norm(outputs["angles"], axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(outputs["traj"][..., :4], axis=-1), 1, rtol=1e-12)
    alpha = outputs["final_atom14_positions"][:, :, 1]
    np.testing.assert_allclose(alpha, outputs["traj"][-1, ..., 4:], atol=1e-9)
    np.testing.assert_array_equal(outputs["final_atom37_positions"][1, -PADDING:], 0)


def test_residues_stay_at_the_origin_until_updates_are_learnt(module: Any, inputs: Any) -> None:
    graph, state = module
    traj = run((graph, jax.tree_util.tree_map(jnp.zeros_like, state)), inputs)["traj"]
    np.testing.assert_array_equal(traj, np.broadcast_to([1, 0, 0, 0, 0, 0, 0], traj.shape))


def test_attention_does_not_see_where_the_molecule_lies(inputs: Any) -> None:
    single, pair, batch = inputs
    graph, state = randomised(FoldIteration(C_S, C_Z, **SIZES), seed=2)
    frames, motion = random_frames(3, BATCH, RESIDUES), random_frames(4)

    @jax.jit
    def attend(state: Any, frames: Rigid) -> jax.Array:
        attention = nnx.merge(graph, state).invariant_point_attention
        return attention(single, attention.prepare(pair, batch["seq_mask"]), frames)

    still = attend(state, frames)
    np.testing.assert_allclose(
        attend(state, motion[None, None].compose(frames)), still, rtol=1e-9, atol=1e-9
    )
    stretched = Rigid(frames.rotation, 2 * frames.translation)
    assert np.abs(attend(state, stretched) - still).max() > 1e-3, "the points take no part"


def test_padding_does_not_reach_real_residues(module: Any, inputs: Any) -> None:
    single, pair, batch = inputs
    other_single, other_pair = single.copy(), pair.copy()
    other_single[1, -PADDING:] = single[0, -PADDING:]
    other_pair[1, -PADDING:] = pair[0, -PADDING:]
    other_pair[1, :, -PADDING:] = pair[0, :, -PADDING:]
    one, other = run(module, inputs), run(module, (other_single, other_pair, batch))
    for name in ("traj", "angles"):
        real = (slice(None), 1, slice(None, -PADDING))
        np.testing.assert_allclose(other[name][real], one[name][real], rtol=1e-12, err_msg=name)
    assert np.abs(other["traj"][:, 1, -PADDING:] - one["traj"][:, 1, -PADDING:]).max() > 1e-3


def unrolled(graph: Any, state: Any, inputs: Any, through_rotation: Any) -> jax.Array:
    """Trajectory by a plain loop; a share of the gradient passes through the chain of rotations."""
    single, pair, batch = inputs
    module = nnx.merge(graph, state)
    pair = module.pair_layer_norm(jnp.asarray(pair))
    single = module.initial_projection(module.single_layer_norm(jnp.asarray(single)))
    quaternion = jnp.zeros((BATCH, RESIDUES, 4)).at[..., 0].set(1)
    translation, traj = jnp.zeros((BATCH, RESIDUES, 3)), []
    shared = module.fold_iteration.invariant_point_attention.prepare(pair, batch["seq_mask"])
    for _ in range(ITERATIONS):
        fixed = jax.lax.stop_gradient(quaternion)
        quaternion = fixed + through_rotation * (quaternion - fixed)
        frames = Rigid(quaternion_to_rotation(quaternion), translation)
        single, update = module.fold_iteration(single, shared, frames)
        quaternion, translation = backbone_update(quaternion, translation, update)
        traj.append(jnp.concatenate([quaternion, 10 * translation], axis=-1))
    return jnp.stack(traj)


def test_rotations_carry_no_gradient_between_iterations(module: Any, inputs: Any) -> None:
    graph, state = module
    _, direction = randomised(nnx.merge(graph, state), seed=5)

    @jax.jit
    def scanned(state: Any, direction: Any) -> jax.Array:
        return jax.jvp(lambda x: _apply(graph, x, *inputs, None)["traj"], (state,), (direction,))[1]

    @jax.jit
    def looped(state: Any, direction: Any, through_rotation: Any) -> jax.Array:
        return jax.jvp(
            lambda x: unrolled(graph, x, inputs, through_rotation), (state,), (direction,)
        )[1]

    slope = scanned(state, direction)
    np.testing.assert_allclose(slope, looped(state, direction, 0.0), rtol=1e-9, atol=1e-9)
    flowing = looped(state, direction, 1.0)
    assert np.abs(slope - flowing).max() > 1e-2, "this test cannot tell the two apart"


def test_dropout_is_drawn_anew_in_each_step_and_iteration(module: Any, inputs: Any) -> None:
    plain, first, again, later = (run(module, inputs, k) for k in (None, key(1), key(1), key(2)))
    np.testing.assert_array_equal(first["traj"], again["traj"])
    assert np.abs(first["traj"] - plain["traj"]).max() > 1e-3
    assert np.abs(first["traj"] - later["traj"]).max() > 1e-3


def test_low_precision_is_left_at_the_door(module: Any, inputs: Any) -> None:
    graph, state = module
    state = jax.tree_util.tree_map(lambda x: x.astype(jnp.float32), state)
    single, pair, batch = inputs
    low = jnp.asarray(single, jnp.bfloat16), jnp.asarray(pair, jnp.bfloat16)
    batch = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in batch.items()}
    with jax.enable_x64(False):
        outputs = jax.eval_shape(lambda: _apply(graph, state, *low, batch, None))
    assert {value.dtype for value in outputs.values()} == {jnp.dtype("float32")}


def test_backbone_update_composes_in_the_old_frame() -> None:
    quaternion = jnp.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])  # x -> y
    update = jnp.array([0, 0, 1.0, 2.0, 0, 0])  # another quarter turn; a step along x
    turned, translation = backbone_update(quaternion, jnp.array([1.0, 1.0, 0]), update)
    np.testing.assert_allclose(turned, [0, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(translation, [1, 3, 0], atol=1e-12)
    same, _ = backbone_update(quaternion, jnp.zeros(3), jnp.zeros(6))
    np.testing.assert_allclose(same, quaternion, rtol=1e-12)


def test_distogram_is_symmetric(inputs: Any) -> None:
    graph, state = randomised(DistogramHead(C_Z))
    logits = nnx.merge(graph, state)(jnp.asarray(inputs[1]))
    assert logits.shape == (BATCH, RESIDUES, RESIDUES, 64)
    np.testing.assert_allclose(logits, logits.swapaxes(1, 2), rtol=1e-12)
    assert np.ptp(logits) > 0.1


def test_heads_start_undecided_and_in_float32(inputs: Any) -> None:
    with jax.enable_x64(False):
        head = PredictedLDDTHead(C_S, 8)
        logits = head(jnp.asarray(inputs[0], jnp.bfloat16))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, 0)
