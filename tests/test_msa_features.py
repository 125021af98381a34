"""MSA features: sampling and masking by their statistics, clusters by brute force."""

import numpy as np
import pytest
from scipy import stats

from foldcore.data import msa_features as f


def random_msa(rows: int, length: int, seed: int, codes: int = 22) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, codes, (rows, length)).astype(np.uint8)


def test_profile_counts_letters() -> None:
    msa = random_msa(13, 9, 0)
    expected = np.eye(22)[msa].mean(0)
    np.testing.assert_allclose(f.alignment_profile(msa), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11, 100])
def test_block_deletion_removes_at_most_the_blocks(rows: int) -> None:
    block = int(0.3 * rows)
    for seed in range(200):
        kept = f.delete_blocks(rows, 0.3, 5, np.random.default_rng(seed))
        deleted = sorted(set(range(rows)) - set(kept.tolist()))
        assert kept[0] == 0 and (np.diff(kept) > 0).all()
        assert len(deleted) <= 5 * block
        runs = np.split(deleted, np.flatnonzero(np.diff(deleted) != 1) + 1)
        for run in runs if deleted else []:  # only at the end may a block be cut short
            assert len(run) >= block or run[-1] == rows - 1


def test_block_deletion_starts_anywhere() -> None:
    """With one block of one row in four, each row goes with its own probability."""
    rng = np.random.default_rng(0)
    counts = np.zeros(4)
    for _ in range(3000):
        counts[np.setdiff1d(np.arange(4), f.delete_blocks(4, 0.3, 1, rng))] += 1
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_sampled_rows_are_uniform_and_keep_the_first() -> None:
    rng = np.random.default_rng(0)
    rows = np.array([0, 3, 4, 7, 9])
    counts = np.zeros(10)
    for _ in range(4000):
        kept, rest = f.sample_rows(rows, 3, rng)
        assert kept[0] == 0
        np.testing.assert_array_equal(np.sort(np.concatenate([kept, rest])), rows)
        counts[kept[1:]] += 1
    assert stats.chisquare(counts[rows[1:]]).pvalue > 1e-3


def test_masking_has_the_published_distribution() -> None:
    """Suppl. 1.2.7: 15 % selected; of these 70 % masked, 10 % each uniform, profile, unchanged."""
    profile = np.random.default_rng(0).dirichlet(np.ones(22), size=2)
    profile[:, [3, 21]] = 0
    profile /= profile.sum(1, keepdims=True)
    original, draws = np.array([5, 20], np.uint8), 60_000
    msa = np.tile(original, (draws, 1))
    parts = [10_000 * 2, 50_000 * 2]  # two passes, one below the other
    rng = np.random.default_rng(1)
    masking = f.join_maskings([f.draw_masking(size, 0.15, rng) for size in parts], parts)
    masked, selected = f.mask_msa(msa, f.cumulative(profile), masking)
    assert stats.binomtest(int(selected.sum()), selected.size, 0.15).pvalue > 1e-3
    assert (masked[~selected] == msa[~selected]).all()
    for column in range(2):
        expected = np.zeros(23)
        expected[:20] += 0.1 / 20
        expected[:22] += 0.1 * profile[column]
        expected[original[column]] += 0.1
        expected[22] += 0.7
        counts = np.bincount(masked[selected[:, column], column], minlength=23)
        possible = expected > 0
        assert not counts[~possible].any()
        total = counts.sum()
        assert stats.chisquare(counts[possible], total * expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("fraction", [0.0, 0.15, 1.0])
def test_words_of_chance_become_numpys_numbers(fraction: float) -> None:
    size = 1001
    rng = np.random.Generator(np.random.Philox(5))
    selected = rng.random(size) < fraction
    kind, uniform = rng.random(size), rng.integers(20, size=size, dtype=np.uint8)
    level = rng.random(size)
    masking = f.draw_masking(size, fraction, np.random.Generator(np.random.Philox(5)))
    np.testing.assert_array_equal(masking.at, np.flatnonzero(selected))
    for found, expected in zip(masking[1:], (kind, uniform, level), strict=True):
        np.testing.assert_array_equal(found, expected[selected])


def agreement(centre: np.ndarray, row: np.ndarray) -> int:
    return sum(a == b and a < 21 for a, b in zip(centre.tolist(), row.tolist(), strict=True))


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("codes", [2, 23])
def test_clusters_by_brute_force(length: int, codes: int) -> None:
    """Few codes make many ties; 23 codes include gaps and masked letters."""
    centres = 22 - random_msa(7, length, 1, codes)  # 2 codes: gap and mask, nothing counts
    extra = 22 - random_msa(40, length, 2, codes)
    extra = np.minimum(extra, 21)
    for centre_rows, extra_rows in ((centres, extra), (centres % 3, extra % 3)):
        expected = [
            int(np.argmax([agreement(c, row) for c in centre_rows.astype(int)]))
            for row in extra_rows.astype(int)
        ]
        np.testing.assert_array_equal(f.assign_clusters(centre_rows, extra_rows), expected)


def test_no_extra_rows_make_no_assignment() -> None:
    assert f.assign_clusters(random_msa(3, 5, 0), random_msa(0, 5, 0)).shape == (0,)


Rows = tuple[np.ndarray, np.ndarray]  # letters and deletions


def msa_feat(centres: Rows, extra: Rows, nearest: np.ndarray, width: int) -> np.ndarray:
    """As an example is written; it may be wider than its rows."""
    features = np.full((len(centres[0]), width, 49), 7, np.float32)
    f.write_letters(centres[0], features)
    f.write_deletions(centres[1], (np.arange(len(centres[0])),), features)
    if len(nearest):
        f.write_clusters(*centres, *extra, nearest, features)
    return features


def test_msa_feat_has_the_published_order() -> None:
    """Two clusters: a centre alone, and a centre with one more row."""
    centres, extra = np.array([[2, 22], [7, 7]], np.uint8), np.array([[7, 21]], np.uint8)
    deletions, extra_deletions = np.array([[0, 3], [0, 0]], np.uint16), np.array([[4, 0]])
    features = msa_feat((centres, deletions), (extra, extra_deletions), np.array([1]), 2)
    np.testing.assert_array_equal(features[..., :23], np.eye(23)[centres])
    np.testing.assert_array_equal(features[..., 23], [[0, 1], [0, 0]])
    np.testing.assert_allclose(features[..., 24], [[0, 0.5], [0, 0]], rtol=1e-6)
    profile = np.eye(23)[centres]
    profile[1, 1] = (np.eye(23)[7] + np.eye(23)[21]) / 2
    np.testing.assert_allclose(features[..., 25:48], profile, rtol=2e-6)
    mean = np.array([[0, 3], [2, 0]])
    np.testing.assert_allclose(features[..., 48], 2 / np.pi * np.arctan(mean / 3), rtol=2e-6)


@pytest.mark.parametrize("members", [0, 15, 400])
def test_msa_feat_by_brute_force(members: int) -> None:
    rng = np.random.default_rng(members)
    centres, extra = random_msa(9, 6, 1, 23), random_msa(members, 6, 2)
    deletions, extra_deletions = (
        rng.poisson(0.3, rows.shape).astype(np.uint16) for rows in (centres, extra)
    )
    nearest = rng.integers(0, 5, members)  # clusters 5 to 8 have their centres alone
    features = msa_feat((centres, deletions), (extra, extra_deletions), nearest, 8)
    assert not features[:, 6:].any()
    for s in range(9):
        letters = np.concatenate([centres[s : s + 1], extra[nearest == s]])
        counts = np.concatenate([deletions[s : s + 1], extra_deletions[nearest == s]])
        size, row = len(letters) + 1e-6, features[s, :6]
        np.testing.assert_array_equal(row[:, :23], np.eye(23)[centres[s]])
        np.testing.assert_array_equal(row[:, 23], deletions[s] > 0)
        np.testing.assert_array_equal(row[:, 24], np.float32(f.deletion_value(deletions[s])))
        profile = np.eye(23)[letters].sum(0) / size
        np.testing.assert_array_equal(row[:, 25:48], profile.astype(np.float32))
        mean = f.deletion_value(counts.sum(0) / size)
        np.testing.assert_array_equal(row[:, 48], mean.astype(np.float32))


def test_deletion_values() -> None:
    expected = 2 / np.pi * np.arctan(np.array([[0, 1 / 3, 2, 0], [0, 0, 0, 1e4]]))
    found = f.deletion_values(np.array([[0, 1, 6, 0], [0, 0, 0, 30_000]], np.uint16))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
