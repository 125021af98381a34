"""Structure metrics: known cases, brute force, and DeepMind's lDDT."""

import deepmind
import numpy as np
import pytest
from raw_examples import embedded_raw
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from foldcore.metrics import drmsd, gdt_ts, lddt_ca, superpose, tm_score

METRICS = [lddt_ca, drmsd, gdt_ts, tm_score]


def trace(length: int = 60, seed: int = 0) -> np.ndarray:
    """A chain of alpha carbons 3.8 angstrom apart that turns at random."""
    steps = np.random.default_rng(seed).normal(size=(length, 3))
    steps = np.cumsum(0.6 * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)
    steps = 3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True)
    return np.cumsum(steps, axis=0)


def move(positions: np.ndarray, seed: int = 0) -> np.ndarray:
    return Rotation.random(rng=seed).apply(positions) + [30.0, -5.0, 12.0]


@pytest.mark.parametrize("length", [2, 3, 4, 7, 60])
def test_the_same_structure_moved_is_perfect(length: int) -> None:
    true = trace(length)
    mask = np.ones(length)
    scores = [metric(move(true), true, mask) for metric in METRICS]
    np.testing.assert_allclose(scores, [1, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_ignore_rigid_motion_and_unresolved_residues(metric) -> None:
    rng = np.random.default_rng(1)
    true = trace()
    predicted = true + rng.normal(scale=1.5, size=true.shape)
    mask = (rng.random(60) < 0.8).astype(np.float32)
    expected = metric(predicted[mask == 1], true[mask == 1], np.ones(int(mask.sum())))
    assert metric(move(predicted), move(true, 1), mask) == pytest.approx(expected, abs=2e-3)
    true[mask == 0] = 0.0
    assert metric(predicted, true, mask) == pytest.approx(expected)


def test_metrics_tell_better_from_worse() -> None:
    noise = np.random.default_rng(2).normal(size=(60, 3))
    rows = [
        [m(trace() + scale * noise, trace(), np.ones(60)) for m in METRICS]
        for scale in (0.1, 0.5, 1.0, 2.0, 4.0)
    ]
    lddt, distance, gdt, tm = np.array(rows).T
    assert (np.diff(distance) > 0).all()
    assert all((np.diff(score) < 0).all() for score in (lddt, gdt, tm))


def test_a_mirror_image_is_not_a_superposition() -> None:
    true = np.array(embedded_raw("1ubq_A").positions[:, 1])
    mirrored, mask = true * [1, 1, -1], np.ones(len(true))
    assert lddt_ca(mirrored, true, mask) == pytest.approx(1)
    assert drmsd(mirrored, true, mask) == pytest.approx(0, abs=1e-6)
    assert tm_score(mirrored, true, mask) < 0.5
    assert gdt_ts(mirrored, true, mask) < 0.5


def test_two_domains_that_moved_apart_fit_one_at_a_time() -> None:
    """Each half alone fits exactly, both together not at all: the larger one counts."""
    true = trace(100)
    predicted = true.copy()
    predicted[60:] = Rotation.from_euler("xyz", [2, 1, 0.5]).apply(true[60:]) + 500
    assert gdt_ts(predicted, true, np.ones(100)) == pytest.approx(0.6)
    assert tm_score(predicted, true, np.ones(100)) == pytest.approx(0.6, abs=1e-3)


def test_lddt_and_drmsd_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    true = trace(30)
    predicted = true + rng.normal(size=true.shape)
    kept, counted, squares = 0.0, 0, []
    for i in range(30):
        for j in range(30):
            wanted = np.linalg.norm(true[i] - true[j])
            error = abs(wanted - np.linalg.norm(predicted[i] - predicted[j]))
            if i != j:
                squares.append(error**2)
            if i != j and wanted < 15:
                counted += 1
                kept += sum(error < t for t in (0.5, 1, 2, 4)) / 4
    assert lddt_ca(predicted, true, np.ones(30)) == pytest.approx(kept / counted)
    assert drmsd(predicted, true, np.ones(30)) == pytest.approx(np.sqrt(np.mean(squares)))
    assert counted < 30 * 29, "some pairs must lie beyond the cutoff"


def test_superposition_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    true, predicted = trace(20), move(trace(20, 5)) + rng.normal(size=(20, 3))
    weights = (rng.random((3, 20)) < 0.5).astype(float)
    moved = superpose(np.tile(predicted, (3, 1, 1)), np.tile(true, (3, 1, 1)), weights)
    for k in range(3):
        own, other = (np.average(x, axis=0, weights=weights[k]) for x in (true, predicted))
        rotation, _ = Rotation.align_vectors(true - own, predicted - other, weights[k])
        np.testing.assert_allclose(moved[k], rotation.apply(predicted - other) + own, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_superposition_found_otherwise_is_better(seed: int) -> None:
    """Maximising the TM-score over rotations and translations directly, from many starts."""
    rng = np.random.default_rng(seed)
    length, true = 40, trace(40, seed)
    bend = np.linspace(0, 1, length)[:, None]  # a smooth distortion that no motion undoes
    predicted = true + 6 * np.sin(3 * bend + rng.random(3)) + rng.normal(size=true.shape)
    d0 = 1.24 * (length - 15) ** (1 / 3) - 1.8

    def loss(pose: np.ndarray) -> float:
        moved = Rotation.from_rotvec(pose[:3]).apply(predicted) + pose[3:]
        return -float(np.mean(1 / (1 + ((moved - true) ** 2).sum(-1) / d0**2)))

    starts = [np.concatenate([rng.normal(scale=0.3, size=3), np.zeros(3)]) for _ in range(6)]
    best = max(-minimize(loss, start, method="BFGS").fun for start in starts)
    found = tm_score(predicted, true, np.ones(length))
    assert best - 0.01 < found < best + 1e-3


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_compare_is_nan(metric) -> None:
    assert np.isnan(metric(trace(5), trace(5), np.zeros(5)))
    assert np.isnan(metric(trace(5), trace(5), np.eye(5)[2]))


def test_lddt_agrees_with_deepmind() -> None:
    deepmind.load()
    from alphafold.model import lddt

    rng = np.random.default_rng(6)
    true = trace(50).astype(np.float32)
    predicted = true + rng.normal(size=true.shape).astype(np.float32)
    mask = (rng.random(50) < 0.9).astype(np.float32)
    expected = lddt.lddt(predicted[None], true[None], mask[None, :, None])
    assert lddt_ca(predicted, true, mask) == pytest.approx(float(expected[0]), abs=1e-5)
