"""Frames obey the algebra of rigid motions, and build residues of the right geometry."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_chain import ubiquitin

from foldcore import constants
from jaxfold.rigid import (
    Rigid,
    atom14_to_atom37,
    frames_to_atom14,
    multiply,
    multiply_by_vector,
    quaternion_to_rotation,
    rigid_from_3_points,
    rigid_from_flat12,
    rigid_from_quaternion,
    rotate,
)
from jaxfold.rigid import torsion_angles_from_atom37 as torsions_eagerly
from jaxfold.rigid import torsion_angles_to_frames as frames_eagerly

torsion_angles_from_atom37 = jax.jit(torsions_eagerly)  # one compilation instead of many small
torsion_angles_to_frames = jax.jit(frames_eagerly)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_rigid(seed: int, *shape: int) -> Rigid:
    tensor = np.random.default_rng(seed).normal(size=(*shape, 7))
    tensor[..., :4] /= np.linalg.norm(tensor[..., :4], axis=-1, keepdims=True)
    return rigid_from_quaternion(jnp.asarray(tensor))


def random_points(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)) * 5)


def test_a_quaternion_gives_a_proper_rotation() -> None:
    rotation = random_rigid(0, 6).rotation
    np.testing.assert_allclose(
        multiply(rotation, rotation.swapaxes(-1, -2)), np.tile(np.eye(3), (6, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-12)
    # a quarter turn about z takes x to y
    quarter = jnp.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])
    turned = rotate(quaternion_to_rotation(quarter), jnp.array([1.0, 0, 0]))
    np.testing.assert_allclose(turned, [0, 1, 0], atol=1e-12)


def test_the_quaternion_product_composes_rotations() -> None:
    quaternion = jnp.asarray(np.random.default_rng(1).normal(size=4))
    quaternion = quaternion / jnp.linalg.norm(quaternion)
    vector = jnp.array([0.6, 0.0, 0.8])
    product = quaternion_to_rotation(multiply_by_vector(quaternion, vector))
    half_turn = quaternion_to_rotation(jnp.concatenate([jnp.zeros(1), vector]))
    np.testing.assert_allclose(
        product, multiply(quaternion_to_rotation(quaternion), half_turn), atol=1e-12
    )


def test_compose_and_invert_agree_with_matrices() -> None:
    first, second, points = random_rigid(2, 5), random_rigid(3, 5), random_points(4, 5)
    np.testing.assert_allclose(
        first.apply(points),
        np.einsum("fij,fj->fi", first.rotation, points) + first.translation,
        atol=1e-12,
    )
    both = first.compose(second)
    np.testing.assert_allclose(both.apply(points), first.apply(second.apply(points)), atol=1e-12)
    np.testing.assert_allclose(first.invert_apply(first.apply(points)), points, atol=1e-12)
    np.testing.assert_allclose(first.invert().apply(points), first.invert_apply(points), atol=1e-12)


def test_frames_are_indexed_on_their_batch_axes() -> None:
    rigid = random_rigid(5, 2, 3)
    assert rigid[..., None].rotation.shape == (2, 3, 1, 3, 3)
    assert rigid[1].translation.shape == (3, 3)
    np.testing.assert_array_equal(rigid[..., 2].rotation, rigid.rotation[:, 2])


def test_three_points_lie_where_the_frame_says() -> None:
    negative_x, origin, plane = (random_points(seed, 4) for seed in (6, 7, 8))
    frame = rigid_from_3_points(negative_x, origin, plane)
    local = frame.invert_apply(negative_x)
    np.testing.assert_allclose(
        local[:, 0], -np.linalg.norm(origin - negative_x, axis=-1), rtol=1e-8
    )
    np.testing.assert_allclose(local[:, 1:], 0, atol=1e-8)
    local = frame.invert_apply(plane)
    assert np.all(local[:, 1] > 0)
    np.testing.assert_allclose(local[:, 2], 0, atol=1e-8)


def idealised(angles: jax.Array) -> jax.Array:
    """Atoms of all twenty residue types at random places, from their torsions."""
    aatype = jnp.arange(20)
    return frames_to_atom14(aatype, torsion_angles_to_frames(aatype, random_rigid(9, 20), angles))


def random_angles(seed: int, residues: int) -> jax.Array:
    theta = np.random.default_rng(seed).uniform(-np.pi, np.pi, size=(residues, 7))
    return jnp.asarray(np.stack([np.sin(theta), np.cos(theta)], axis=-1))


def test_every_residue_has_the_bond_lengths_of_the_literature() -> None:
    positions = idealised(random_angles(10, 20))
    lower, upper = constants.atom14_distance_bounds(factor=3.0)
    length = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    bonded = (upper[:20] > 0) & (upper[:20] < 1e9)  # bonds, and distances across an angle
    bonded[constants.restype_order["P"]] = False  # random torsions open its ring
    assert bonded.sum() > 500
    excess = np.maximum(lower[:20] - length, length - upper[:20])[bonded]
    assert excess.max() < 0.01, "a bond is over 3 standard deviations off its ideal length"


def test_torsions_are_recovered_from_the_atoms_they_placed() -> None:
    aatype, angles = jnp.arange(20), random_angles(11, 20)
    exists = jnp.asarray(constants.restype_atom37_mask, jnp.float64)[aatype]
    index = jnp.asarray(constants.restype_atom37_to_atom14)[aatype]
    atoms = atom14_to_atom37(idealised(angles), index, exists)
    found = torsion_angles_from_atom37(aatype, atoms, exists)
    chi_mask = constants.chi_angles_mask[:20]
    np.testing.assert_array_equal(found.mask[:, 3:], chi_mask)
    mine = chi_mask[..., None] * np.asarray(angles[:, 3:])
    # the idealised positions have three decimals, so they are planar to about a degree
    np.testing.assert_allclose(chi_mask[..., None] * found.sin_cos[:, 3:], mine, atol=0.02)
    np.testing.assert_allclose(found.sin_cos[:, 2], angles[:, 2], atol=0.02)


def test_a_real_chain_is_rebuilt_from_its_backbone_and_torsions() -> None:
    chain = ubiquitin()
    torsions = torsion_angles_from_atom37(
        chain["aatype"], jnp.asarray(chain["all_atom_positions"]), chain["all_atom_mask"]
    )
    backbone = rigid_from_quaternion(jnp.asarray(chain["backbone_affine_tensor"]))
    frames = torsion_angles_to_frames(chain["aatype"], backbone, torsions.sin_cos)
    truth = rigid_from_flat12(jnp.asarray(chain["rigidgroups_gt_frames"]))
    offset = np.linalg.norm(frames.translation - truth.translation, axis=-1)
    assert np.median(offset[chain["rigidgroups_gt_exists"] == 1]) < 0.05
    error = frames_to_atom14(chain["aatype"], frames) - chain["atom14_gt_positions"]
    squared = np.sum(np.square(error), axis=-1)[chain["atom14_gt_exists"] > 0]
    # long side chains add up the deviations of the crystal's bond angles from ideal ones
    assert np.sqrt(np.median(squared)) < 0.1 and np.sqrt(squared.mean()) < 0.3


def test_helix_and_strand_have_the_torsions_of_textbooks() -> None:
    chain = ubiquitin()
    torsions = torsion_angles_from_atom37(
        chain["aatype"], jnp.asarray(chain["all_atom_positions"]), chain["all_atom_mask"]
    )
    degrees = np.degrees(np.arctan2(torsions.sin_cos[..., 0], torsions.sin_cos[..., 1]))
    helix, strand = slice(23, 33), slice(2, 6)
    np.testing.assert_allclose(np.median(degrees[helix, 1]), -63, atol=6)
    np.testing.assert_allclose(np.median(degrees[helix, 2]), -42, atol=6)
    assert np.median(degrees[strand, 1]) < -90 and np.median(degrees[strand, 2]) > 110
    assert np.all(np.cos(np.radians(degrees[1:, 0])) < -0.9), "all peptides are trans"
    np.testing.assert_array_equal(torsions.mask[0, :3], [0, 0, 1])
    alternative = np.asarray(torsions.alt_sin_cos / torsions.sin_cos)
    turned = constants.chi_pi_periodic[chain["aatype"]] * np.asarray(torsions.mask[:, 3:])
    np.testing.assert_allclose(alternative[:, 3:][turned == 1], -1)
    np.testing.assert_allclose(alternative[:, :3][torsions.mask[:, :3] == 1], 1)


def test_torsions_without_atoms_are_zero_and_finite() -> None:
    aatype = jnp.array([[20, 21, 0]])
    torsions = torsion_angles_from_atom37(aatype, jnp.zeros((1, 3, 37, 3)), jnp.zeros((1, 3, 37)))
    for value in torsions:
        np.testing.assert_array_equal(value, 0)


def test_placement_moves_with_the_backbone() -> None:
    aatype, angles, motion = jnp.arange(20), random_angles(12, 20), random_rigid(13)
    backbone = random_rigid(14, 20)
    moved = torsion_angles_to_frames(aatype, motion[None].compose(backbone), angles)
    still = frames_to_atom14(aatype, torsion_angles_to_frames(aatype, backbone, angles))
    mask = constants.restype_atom14_mask[:20, :, None]
    np.testing.assert_allclose(
        frames_to_atom14(aatype, moved), mask * motion[None, None].apply(still), atol=1e-12
    )
