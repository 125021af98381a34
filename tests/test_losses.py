"""Each loss is zero where it should be, has the value worked out by hand, and a right gradient."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_chain import ubiquitin

from foldcore import constants, metrics
from foldcore.config import LossConfig
from jaxfold import heads, losses, structure_losses
from jaxfold.losses import alphafold_loss, resolution_accepted
from jaxfold.rigid import Rigid, rigid_from_quaternion
from jaxfold.violations import structural_violation_loss

Arrays = dict[str, Any]
LENGTH, LAYERS, ROWS = 60, 2, 3  # ubiquitin has its TYR at residue 59
FLOOR = 1e-3  # FAPE of a perfect prediction: sqrt(1e-4) / 10
CONFIG = LossConfig(violation=1.0, aligned_error=0.1, experimentally_resolved=0.01)
TERMS = (
    "backbone_fape",
    "sidechain_fape",
    "chi",
    "angle_norm",
    "violation",
    "distogram",
    "masked_msa",
    "plddt",
    "experimentally_resolved",
    "aligned_error",
)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


loss = jax.jit(partial(alphafold_loss, config=CONFIG))
compute_fape = jax.jit(structure_losses.compute_fape)
lddt_ca = jax.jit(losses.lddt_ca)
compute_plddt = jax.jit(heads.compute_plddt)
compute_predicted_aligned_error = jax.jit(heads.compute_predicted_aligned_error)
predicted_tm_score = jax.jit(heads.predicted_tm_score)
masked_msa_loss = jax.jit(losses.masked_msa_loss)
rename_symmetric_ground_truth_atoms = jax.jit(structure_losses.rename_symmetric_ground_truth_atoms)
violation = jax.jit(partial(structural_violation_loss, ca_c_n_stddev=0.0311))


LAYERED = ("traj", "traj_rotation", "angles", "unnormalized_angles")  # iterations come first


@pytest.fixture(scope="module")
def batch() -> Arrays:
    return make_batch(LENGTH, LENGTH - 7)


@pytest.fixture(scope="module")
def perfect(batch: Arrays) -> Arrays:
    return repeat_the_truth(batch)


@pytest.fixture(scope="module")
def small() -> tuple[Arrays, Arrays]:
    """Few residues, imperfect outputs, and FAPE half clamped: all that a gradient can depend on."""
    labels = make_batch(12, 10) | {"use_clamped_fape": np.full(2, 0.5)}
    outputs = repeat_the_truth(labels)
    unsure = {k: 0.05 * v if "logits" in k else v for k, v in outputs.items()}
    return perturbed(unsure, 0.3, seed=2), labels


def make_batch(*lengths: int) -> Arrays:
    """Crops of ubiquitin, padded to the first, that end with different recycling passes."""
    rng = np.random.default_rng(0)
    shape = (4, ROWS, lengths[0])
    examples = []
    for last_pass, length in zip((1, 3), lengths, strict=True):
        example = ubiquitin(lengths[0])
        for name in example:
            if "mask" in name or "exists" in name:
                example[name] = example[name].copy()
                example[name][length:] = 0
        examples.append(
            example
            | {
                "seq_length": np.array(length, np.int32),
                "num_iter_recycling": np.array(last_pass, np.int32),
                "true_msa": rng.integers(0, 22, shape).astype(np.int32),
                "bert_mask": (rng.random(shape) < 0.3).astype(np.float64),
                "resolution": np.array(1.8),
                "use_clamped_fape": np.array(1.0),
            }
        )
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def repeat_the_truth(batch: Arrays) -> Arrays:
    """Outputs that are the labels; logits are sure of the classes given by their definitions."""
    affine, frames, beta = (
        batch[k] for k in ("backbone_affine_tensor", "rigidgroups_gt_frames", "pseudo_beta")
    )
    pairs = (*affine.shape[:2], affine.shape[1])
    angles = np.zeros((*pairs[:2], 7, 2))
    angles[..., 1] = 1
    angles[:, :, 3:] = np.stack([np.sin(batch["chi_angles"]), np.cos(batch["chi_angles"])], -1)
    spacing = np.linalg.norm(beta[:, :, None] - beta[:, None], axis=-1)
    rotation = frames[:, :, 0, :9].reshape(*pairs[:2], 3, 3)
    return {
        "traj": np.stack([affine] * LAYERS),
        "traj_rotation": np.stack([rotation] * LAYERS),
        "angles": np.stack([angles] * LAYERS),
        "unnormalized_angles": np.stack([angles] * LAYERS),
        "sidechain_frames_rotation": frames[..., :9].reshape(*pairs[:2], 8, 3, 3),
        "sidechain_frames_translation": frames[..., 9:],
        "final_atom14_positions": batch["atom14_gt_positions"],
        "final_atom37_positions": batch["all_atom_positions"],
        "distogram_logits": sure(np.digitize(spacing, np.linspace(2.3125, 21.6875, 63)), 64),
        "masked_msa_logits": sure(batch["true_msa"][[0, 1], batch["num_iter_recycling"]], 23),
        "plddt_logits": sure(np.full(pairs[:2], 49), 50),
        "experimentally_resolved_logits": 60 * batch["all_atom_mask"] - 30,
        "aligned_error_logits": sure(np.zeros(pairs, int), 64),
    }


def sure(label: np.ndarray, classes: int) -> np.ndarray:
    return 30 * np.eye(classes)[label]


def perturbed(outputs: Arrays, scale: float, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    return {k: v + scale * rng.normal(size=v.shape) for k, v in outputs.items()}


def random_motion(seed: int) -> Rigid:
    tensor = np.random.default_rng(seed).normal(size=7)
    tensor[:4] /= np.linalg.norm(tensor[:4])
    return rigid_from_quaternion(jnp.asarray(tensor))


# The whole loss -----------------------------------------------------------------------------------


def test_a_perfect_prediction_costs_nothing(perfect: Arrays, batch: Arrays) -> None:
    _, terms = loss(perfect, batch)
    assert set(terms) == set(TERMS)
    for name in ("backbone_fape", "sidechain_fape"):
        np.testing.assert_allclose(terms[name], FLOOR, rtol=1e-3, err_msg=name)
    for name in set(TERMS) - {"backbone_fape", "sidechain_fape", "aligned_error"}:
        np.testing.assert_allclose(terms[name], 0, atol=1e-6, err_msg=name)
    # an error of exactly 0 falls into the first bin, which round-off can leave for the second
    assert np.all(terms["aligned_error"] < 30)


def test_a_wrong_prediction_costs_in_every_term(perfect: Arrays, batch: Arrays) -> None:
    _, right = loss(perfect, batch)
    undecided = {k: 0 * v if "logits" in k else v for k, v in perfect.items()}
    _, wrong = loss(perturbed(undecided, 3.0), batch)
    for name in set(TERMS) - {"aligned_error"}:
        assert np.all(wrong[name] > right[name] + 1e-3), name


def test_the_total_weighs_the_terms_and_the_length(perfect: Arrays, batch: Arrays) -> None:
    outputs = perturbed(perfect, 0.5)
    total, terms = loss(outputs, batch)
    weighted = sum(getattr(CONFIG, name) * np.asarray(terms[name]) for name in TERMS)
    np.testing.assert_allclose(total, weighted * np.sqrt(batch["seq_length"]), rtol=1e-12)


def test_the_length_may_be_left_out(small: tuple[Arrays, Arrays]) -> None:
    config = LossConfig(scale_by_sqrt_length=False)
    total, terms = jax.jit(partial(alphafold_loss, config=config))(*small)
    weighted = sum(getattr(config, name) * np.asarray(terms[name]) for name in terms)
    np.testing.assert_allclose(total, weighted, rtol=1e-12)


def test_costly_terms_are_left_out_unless_wanted(perfect: Arrays, batch: Arrays) -> None:
    def names(**also: Any) -> set[str]:
        return set(jax.eval_shape(partial(alphafold_loss, config=LossConfig(), **also), *args)[1])

    args = perfect, batch
    assert names() == set(TERMS) - {"violation", "aligned_error"}
    assert names(also=("violation",)) == set(TERMS) - {"aligned_error"}


def test_examples_do_not_mix(perfect: Arrays, batch: Arrays) -> None:
    outputs = perturbed(perfect, 0.5)
    total, terms = loss(outputs, batch)
    for example in (0, 1):
        twice = [example, example]
        copies = {k: v[:, twice] if k in LAYERED else v[twice] for k, v in outputs.items()}
        alone, alone_terms = loss(copies, {k: v[twice] for k, v in batch.items()})
        np.testing.assert_allclose(alone, total[example], rtol=1e-12)
        for name in TERMS:
            np.testing.assert_allclose(alone_terms[name], terms[name][example], rtol=1e-12)


def test_padding_changes_nothing(perfect: Arrays, batch: Arrays) -> None:
    outputs = perturbed(perfect, 0.5)
    garbage = dict(outputs)
    for name, value in outputs.items():
        garbage[name] = value.copy()
        if name == "masked_msa_logits":
            continue  # its mask is the data's, which hides nothing in padding
        index = (slice(None),) * (name in LAYERED) + (1, slice(LENGTH - 7, None))
        garbage[name][index] += 5.0
        if name in ("distogram_logits", "aligned_error_logits"):
            garbage[name][1, :, LENGTH - 7 :] += 5.0
    total, _ = loss(outputs, batch)
    np.testing.assert_allclose(loss(garbage, batch)[0], total, rtol=1e-12)


@jax.jit
def gradient(outputs: Arrays, batch: Arrays) -> Arrays:
    return jax.grad(lambda x: jnp.sum(alphafold_loss(x, batch, CONFIG)[0]))(outputs)


def test_gradients_are_the_slopes(small: tuple[Arrays, Arrays]) -> None:
    outputs, labels = small
    step, gradients = 1e-6, gradient(outputs, labels)
    for name, value in outputs.items():
        direction = np.random.default_rng(3).normal(size=value.shape)
        above, _ = loss(outputs | {name: value + step * direction}, labels)
        below, _ = loss(outputs | {name: value - step * direction}, labels)
        slope = np.sum(above - below) / (2 * step)
        along = np.sum(gradients[name] * direction)
        np.testing.assert_allclose(along, slope, rtol=1e-5, atol=1e-7, err_msg=name)
        if name != "final_atom37_positions":  # serves a score without gradient
            assert abs(slope) > 1e-5, name


@pytest.mark.parametrize("case", ["atoms coincide", "all masked"])
def test_gradients_stay_finite(case: str, small: tuple[Arrays, Arrays]) -> None:
    outputs, labels = small
    if case == "atoms coincide":
        outputs = {k: np.zeros_like(v) for k, v in outputs.items()}
    else:
        masked = ("mask", "exists", "positions", "frames", "tensor", "pseudo_beta", "chi_angles")
        empty = {k: np.zeros_like(v) for k, v in labels.items() if any(m in k for m in masked)}
        labels = labels | empty
    total, terms = loss(outputs, labels)
    assert np.all(np.isfinite(total))
    for name in TERMS:
        assert np.all(np.isfinite(terms[name])), name
    for name, value in gradient(outputs, labels).items():
        assert np.all(np.isfinite(value)), name


# FAPE ---------------------------------------------------------------------------------------------


def test_fape_of_displaced_points_is_their_distance() -> None:
    frames = Rigid(jnp.eye(3)[None], jnp.zeros((1, 3)))
    truth = jnp.zeros((3, 3))
    predicted = jnp.array([[3.0, 0, 0], [0, 0, 25.0], [0, 99.0, 0]])
    masks = jnp.ones(1), jnp.array([1.0, 1.0, 0.0])  # the last point does not count
    fape = partial(compute_fape, frames, frames, masks[0], predicted, truth, masks[1])
    np.testing.assert_allclose(fape(), (0.3 + 1.0) / 2, rtol=1e-4)
    np.testing.assert_allclose(fape(clamped=0.0), (0.3 + 2.5) / 2, rtol=1e-4)
    np.testing.assert_allclose(fape(clamped=0.9), (0.3 + 0.9 + 0.25) / 2, rtol=1e-4)


def test_fape_ignores_where_the_molecule_lies_but_not_its_hand() -> None:
    rng = np.random.default_rng(4)
    tensor = rng.normal(size=(2, 6, 7))
    tensor[..., :4] /= np.linalg.norm(tensor[..., :4], axis=-1, keepdims=True)
    predicted, truth = (rigid_from_quaternion(jnp.asarray(t)) for t in tensor)
    points, mask = jnp.asarray(rng.normal(size=(2, 9, 3)) * 4), (jnp.ones(6), jnp.ones(9))

    def fape(frames: Rigid, atoms: jax.Array) -> jax.Array:
        return compute_fape(frames, truth, mask[0], atoms, points[1], mask[1])

    motion = random_motion(5)
    still = fape(predicted, points[0])
    moved = fape(motion[None].compose(predicted), motion[None].apply(points[0]))
    np.testing.assert_allclose(moved, still, rtol=1e-12)
    mirrored = compute_fape(
        truth, truth, mask[0], points[1] * jnp.array([1, 1, -1]), *points[1:], mask[1]
    )
    assert mirrored > 0.1


def test_half_of_the_backbone_error_can_be_unclamped(perfect: Arrays, batch: Arrays) -> None:
    outputs = perfect | {"traj": perfect["traj"] * np.array([1.0] * 4 + [3.0] * 3)}
    fape = {
        share: loss(outputs, batch | {"use_clamped_fape": np.full(2, share)})[1]["backbone_fape"]
        for share in (0.0, 0.5, 1.0)
    }
    assert np.all(fape[1.0] <= 1.0) and np.all(fape[0.0] > 1.0)
    np.testing.assert_allclose(fape[0.5], (fape[0.0] + fape[1.0]) / 2, rtol=1e-12)


# Symmetric atoms ----------------------------------------------------------------------------------


def exchanged(outputs: Arrays, batch: Arrays) -> Arrays:
    """The prediction of the same molecule under the other names."""
    frames = batch["rigidgroups_alt_gt_frames"]
    angles = outputs["angles"].copy()
    turned = 1 - 2 * constants.chi_pi_periodic[batch["aatype"]]
    angles[..., 3:, :] *= turned[None, ..., None]
    return outputs | {
        "final_atom14_positions": batch["atom14_alt_gt_positions"],
        "sidechain_frames_rotation": frames[..., :9].reshape(2, LENGTH, 8, 3, 3),
        "angles": angles,
    }


def test_names_of_symmetric_atoms_are_free(perfect: Arrays, batch: Arrays) -> None:
    outputs = exchanged(perfect, batch)
    moved = outputs["final_atom14_positions"] != perfect["final_atom14_positions"]
    assert {"ASP", "GLU", "PHE", "TYR"} == {
        constants.resnames[t] for t in batch["aatype"][moved.any(axis=(-1, -2))]
    }
    renamed = rename_symmetric_ground_truth_atoms(
        batch, jnp.asarray(outputs["final_atom14_positions"])
    )
    symmetric = (batch["atom14_atom_is_ambiguous"] * batch["atom14_gt_exists"]).any(axis=-1)
    np.testing.assert_array_equal(renamed.alt_naming_is_better, symmetric)
    _, straight = loss(perfect, batch)
    _, swapped = loss(outputs, batch)
    for name in TERMS:
        np.testing.assert_allclose(swapped[name], straight[name], atol=1e-9, err_msg=name)


def test_the_names_in_the_file_do_not_matter(perfect: Arrays, batch: Arrays) -> None:
    outputs = perturbed(perfect, 0.2)
    swaps = {
        "atom14_gt_positions": "atom14_alt_gt_positions",
        "atom14_gt_exists": "atom14_alt_gt_exists",
        "rigidgroups_gt_frames": "rigidgroups_alt_gt_frames",
    }
    other = (
        batch | {a: batch[b] for a, b in swaps.items()} | {b: batch[a] for a, b in swaps.items()}
    )
    np.testing.assert_allclose(
        loss(outputs, other)[1]["sidechain_fape"], loss(outputs, batch)[1]["sidechain_fape"]
    )


# Violations ---------------------------------------------------------------------------------------


def test_a_stretched_peptide_bond_costs_its_excess(perfect: Arrays, batch: Arrays) -> None:
    positions = perfect["final_atom14_positions"].copy()
    carbon, nitrogen = positions[:, 19, 2].copy(), positions[:, 20, 0].copy()
    towards = (nitrogen - carbon) / np.linalg.norm(nitrogen - carbon, axis=-1, keepdims=True)
    positions[:, 20:] += 2.0 * towards[:, None, None]
    cost = violation({"final_atom14_positions": positions}, batch)
    bonds = np.array([LENGTH - 1, LENGTH - 8])
    length = np.linalg.norm(nitrogen - carbon, axis=-1) + 2.0
    excess = length - constants.between_res_bond_length_c_n[0] - 12 * 0.014
    np.testing.assert_allclose(cost, excess / bonds, rtol=0.02)
    # without a bond between the residues there is nothing to violate
    gap = batch["residue_index"] + 100 * (np.arange(LENGTH) >= 20)
    broken_chain = violation({"final_atom14_positions": positions}, batch | {"residue_index": gap})
    np.testing.assert_allclose(broken_chain, 0, atol=1e-6)


def test_a_clash_costs_both_atoms(perfect: Arrays, batch: Arrays) -> None:
    positions = perfect["final_atom14_positions"].copy()
    positions[:, :, :, 0] += 1000.0 * np.arange(LENGTH)[None, :, None]  # residues far apart
    labels = batch | {"residue_index": batch["residue_index"] * 2}  # and not bonded
    atoms = batch["atom14_atom_exists"].sum(axis=(1, 2))
    np.testing.assert_allclose(
        violation({"final_atom14_positions": positions}, labels), 0, atol=1e-9
    )
    # residue 5 moves until its CA meets that of residue 1 in 1 angstrom
    positions[:, 5] += positions[:, [1], 1] - positions[:, [5], 1] + np.array([0, 0, 1.0])
    cost = violation({"final_atom14_positions": positions}, labels)
    assert np.all(cost > 2 * (1.7 + 1.7 - 1.5 - 1.0) / atoms), "the two CA alone cost this much"


def test_a_bond_within_a_residue_costs_its_excess(perfect: Arrays, batch: Arrays) -> None:
    positions = perfect["final_atom14_positions"].copy()
    glycine = int(np.flatnonzero(batch["aatype"][0] == constants.restype_order["G"])[0])
    carbon, oxygen = positions[:, glycine, 2], positions[:, glycine, 3]
    towards = (oxygen - carbon) / np.linalg.norm(oxygen - carbon, axis=-1, keepdims=True)
    positions[:, glycine, 3] += 1.0 * towards
    cost = violation({"final_atom14_positions": positions}, batch)
    atoms = batch["atom14_atom_exists"].sum(axis=(1, 2))
    _, upper = constants.atom14_distance_bounds()
    excess = np.zeros(2)
    for atom in (0, 1, 2):  # O to N, CA, C; each pair counts four times
        length = np.linalg.norm(positions[:, glycine, 3] - positions[:, glycine, atom], axis=-1)
        excess += np.maximum(length - upper[constants.restype_order["G"], 3, atom], 0)
    assert np.all(excess > 0.5)
    np.testing.assert_allclose(cost, 4 * excess / atoms, rtol=1e-3)


# Confidence and MSA -------------------------------------------------------------------------------


def test_only_good_resolution_trains_confidence() -> None:
    resolution = jnp.array([0.0, 0.05, 0.1, 2.0, 3.0, 3.1])
    config = LossConfig(accept_unknown_resolution=False)
    np.testing.assert_array_equal(resolution_accepted(resolution, config), [0, 0, 1, 1, 1, 0])
    config = LossConfig(accept_unknown_resolution=True)
    np.testing.assert_array_equal(resolution_accepted(resolution, config), [1, 0, 1, 1, 1, 0])


def test_poor_resolution_silences_confidence_only(perfect: Arrays, batch: Arrays) -> None:
    outputs = perturbed(perfect, 0.5)
    _, sharp = loss(outputs, batch)
    _, blurred = loss(outputs, batch | {"resolution": np.array([1.8, 8.0])})
    for name in TERMS:
        confidence = name in ("plddt", "experimentally_resolved", "aligned_error")
        expected = sharp[name] * np.array([1, 0 if confidence else 1])
        np.testing.assert_allclose(blurred[name], expected, rtol=1e-12, err_msg=name)


def test_masked_msa_reads_the_sample_of_the_last_pass(perfect: Arrays, batch: Arrays) -> None:
    true_msa = batch["true_msa"].copy()
    true_msa[0, [0, 2, 3]] = 22  # example 0 ends with pass 1
    same = masked_msa_loss(perfect, batch | {"true_msa": true_msa})
    np.testing.assert_allclose(same, 0, atol=1e-9)
    other = masked_msa_loss(perfect, batch | {"num_iter_recycling": np.array([0, 3])})
    assert other[0] > 20 and other[1] < 1e-9


def test_lddt_agrees_with_the_metric(batch: Arrays) -> None:
    truth = batch["all_atom_positions"][:, :, 1]
    predicted = truth + np.random.default_rng(6).normal(size=truth.shape)
    mask = batch["all_atom_mask"][:, :, 1]
    score = lddt_ca(jnp.asarray(predicted), jnp.asarray(truth), jnp.asarray(mask))
    pairs = (np.linalg.norm(truth[0][:, None] - truth[0], axis=-1) < 15).sum(axis=-1) - 1
    whole = np.sum(score[0] * pairs) / pairs.sum()  # residues weigh by their number of pairs
    assert 0.2 < whole < 0.95
    np.testing.assert_allclose(whole, metrics.lddt_ca(predicted[0], truth[0], mask[0]), rtol=1e-6)


def test_a_score_at_the_edge_of_a_bin_is_not_decided_by_its_last_digit() -> None:
    pairs = np.arange(1, 200)[:, None]
    quarters = np.arange(0, 800)[None, :]
    kept, total = (x.ravel() for x in np.broadcast_arrays(quarters, 4 * pairs))
    real = kept <= total
    kept, total = kept[real], total[real]
    exact = np.minimum(50 * kept // total, 49)
    score = (kept / 4).astype(np.float32) * (1 / (total / 4).astype(np.float32))
    assert np.any(np.floor(score * 50) < 50 * kept // total)  # a division by the reciprocal
    for nudged in (score, np.nextafter(score, np.float32(0)), np.nextafter(score, np.float32(2))):
        np.testing.assert_array_equal(losses.lddt_bin(jnp.asarray(nudged), 50), exact)


def test_confidence_is_decoded_from_its_bins() -> None:
    np.testing.assert_allclose(
        compute_plddt(jnp.asarray(sure(np.array([[0, 25, 49]]), 50))), [[1, 51, 99]]
    )
    label = np.array([[[0, 1, 63]] * 3])
    error = compute_predicted_aligned_error(jnp.asarray(sure(label, 64)))
    np.testing.assert_allclose(error[0, 0], [0.25, 0.75, 31.75], rtol=1e-6)


def test_predicted_tm_score_takes_the_best_frame() -> None:
    length = 100
    label = np.full((1, length, length), 63)
    label[0, 7, :50] = 0  # only frame 7 is good, for half of the residues
    mask = np.ones((1, length))
    d0 = 1.24 * (length - 15) ** (1 / 3) - 1.8
    good, bad = (1 / (1 + (error / d0) ** 2) for error in (0.25, 31.75))
    score = predicted_tm_score(jnp.asarray(sure(label, 64)), jnp.asarray(mask))
    np.testing.assert_allclose(score, [(good + bad) / 2], rtol=1e-6)
    mask[0, 7] = 0  # padding cannot be the best frame
    np.testing.assert_allclose(
        predicted_tm_score(jnp.asarray(sure(label, 64)), mask), [bad], rtol=0.02
    )
