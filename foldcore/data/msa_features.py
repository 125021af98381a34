"""From an alignment to the MSA features of one recycling pass (Suppl. 1.2.6, 1.2.7).

Codes: 0..19 amino acids, 20 X, 21 gap, 22 masked. Row 0 is the chain itself. Rows are chosen as
index arrays, so the alignment is copied once. Clusters are assigned over the whole chain and only
then cut to the crop, as published; everything after the assignment works on the crop alone.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Integer, UInt8, UInt16, UInt64

from foldcore.constants import gap_code, mask_code, num_msa_codes

NUM_CLASSES = 23  # one-hot width: 22 codes and the masked token
_NO_CODE = 31  # its five bits differ from those of every code
_PAIRS = 1 << 15  # of a centre and an extra row, compared at a time: they fit in a core's cache
_ALONE = 1 + 1e-6  # members of a cluster that is its centre alone
# the 49 features of a cell of such a cluster without deletions, for each letter, and of no cell
_LETTERS, _NOTHING = np.zeros((NUM_CLASSES + 1, 49), np.float32), NUM_CLASSES
_LETTERS[range(NUM_CLASSES), range(NUM_CLASSES)] = 1
_LETTERS[range(NUM_CLASSES), range(25, 48)] = 1 / _ALONE
REPLACE_UNIFORM, REPLACE_PROFILE, REPLACE_SAME = 0.1, 0.1, 0.1  # else the masked token


def alignment_profile(msa: UInt8[np.ndarray, "n r"]) -> Float[np.ndarray, "r 22"]:
    """Share of each code in each column of the whole alignment."""
    rows, length = msa.shape
    flat = msa + num_msa_codes * np.arange(length)
    counts = np.bincount(flat.ravel(), minlength=length * num_msa_codes)
    return counts.reshape(length, num_msa_codes) / rows


def delete_blocks(
    num_rows: int, fraction: float, count: int, rng: np.random.Generator
) -> Int[np.ndarray, "kept"]:
    """Rows left after removing ``count`` blocks of neighbouring rows; row 0 stays (Alg. 1)."""
    block = int(fraction * num_rows)
    rows = np.arange(num_rows)
    if block == 0 or num_rows < 2:
        return rows
    starts = rng.integers(1, num_rows, size=count)
    # A block that runs past the end is cut there, so late rows go more often, as published.
    kept = np.ones(num_rows, bool)
    for start in starts.tolist():
        kept[start : start + block] = False
    return rows[kept]


def sample_rows(
    rows: Int[np.ndarray, "n"], size: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "m"]]:
    """Split rows at random into ``size`` kept ones, the first row among them, and the rest."""
    shuffled = np.concatenate([rows[:1], rng.permutation(rows[1:])])
    return shuffled[:size], shuffled[size:]


def mask_msa(
    msa: UInt8[np.ndarray, "s r"],
    profile: Float[np.ndarray, "r 22"],
    fraction: float,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "s r"], Bool[np.ndarray, "s r"]]:
    """BERT masking: the corrupted alignment and where a loss is taken (Suppl. 1.2.7).

    A selected letter becomes an amino acid drawn uniformly, a letter drawn from the profile of its
    column, or stays (10 % each); otherwise it becomes the masked token.
    """
    selected = rng.random(msa.shape) < fraction
    kind, uniform = rng.random(msa.shape), rng.integers(20, size=msa.shape, dtype=np.uint8)
    level = rng.random(msa.shape)
    at = np.flatnonzero(selected)  # few: everything below looks at these alone
    kind, letters = kind.ravel()[at], np.full(len(at), mask_code, np.uint8)
    edges = np.cumsum([REPLACE_UNIFORM, REPLACE_PROFILE, REPLACE_SAME])
    is_uniform, is_same = kind < edges[0], (kind >= edges[1]) & (kind < edges[2])
    letters[is_uniform] = uniform.ravel()[at[is_uniform]]
    letters[is_same] = msa.ravel()[at[is_same]]
    drawn = (kind >= edges[0]) & (kind < edges[1])
    columns = at[drawn] % msa.shape[1]
    letters[drawn] = _draw_from_profile(profile[columns], level.ravel()[at[drawn]])
    masked = msa.copy()
    masked.ravel()[at] = letters
    return masked, selected


def _draw_from_profile(
    profile: Float[np.ndarray, "n 22"], level: Float[np.ndarray, "n"]
) -> UInt8[np.ndarray, "n"]:
    """Inverse of each cumulative distribution at its level."""
    cumulative = np.cumsum(profile, axis=1)
    cumulative /= cumulative[:, -1:]
    return (level[:, None] >= cumulative[:, :-1]).sum(1, dtype=np.uint8)  # the last edge is 1


def assign_clusters(
    centres: UInt8[np.ndarray, "s r"], extra: UInt8[np.ndarray, "e r"]
) -> Int[np.ndarray, "e"]:
    """Centre that shares most letters with each extra row; the first of equals (Suppl. 1.2.7)."""
    return nearest_centres(centres, bit_planes(extra))


def bit_planes(msa: UInt8[np.ndarray, "n r"]) -> UInt64[np.ndarray, "5 w n"]:
    """The five bits of each code apart, 64 columns a word."""
    rows, length = msa.shape
    planes = np.zeros((5, rows, -(-length // 64) * 8), np.uint8)
    for bit in range(5):
        planes[bit, :, : -(-length // 8)] = np.packbits(msa & (1 << bit), axis=1)
    return np.ascontiguousarray(planes.view(np.uint64).transpose(0, 2, 1))


def nearest_centres(
    centres: UInt8[np.ndarray, "s r"], extra_planes: UInt64[np.ndarray, "5 w e"]
) -> Int[np.ndarray, "e"]:
    """Centre of each extra row, given as bit planes; gaps and masked letters do not count.

    Exact, and much faster than a product of one-hot matrices. Columns that do not count differ from
    every code, so the nearest centre is the one with the fewest differences.
    """
    nearest = np.zeros(extra_planes.shape[-1], np.intp)
    if not len(nearest):
        return nearest
    planes = bit_planes(np.where(centres < gap_code, centres, _NO_CODE))[..., None]
    for start in range(0, len(nearest), _PAIRS // len(centres) + 1):
        block = slice(start, start + _PAIRS // len(centres) + 1)
        nearest[block] = _differences(planes, extra_planes[..., block]).argmin(0)
    return nearest


def _differences(
    planes: UInt64[np.ndarray, "5 w s 1"], extra_planes: UInt64[np.ndarray, "5 w e"]
) -> UInt16[np.ndarray, "s e"]:
    """In how many columns each pair of rows differs."""
    shape = (planes.shape[2], extra_planes.shape[2])
    total = np.zeros(shape, np.uint16 if planes.shape[1] < 2**10 else np.uint32)
    differs, other = np.empty((2, *shape), np.uint64)
    for word in range(planes.shape[1]):
        np.bitwise_xor(planes[0, word], extra_planes[0, word], out=differs)
        for bit in range(1, 5):
            np.bitwise_xor(planes[bit, word], extra_planes[bit, word], out=other)
            np.bitwise_or(differs, other, out=differs)
        total += np.bitwise_count(differs)
    return total


def cluster_statistics(
    centres: UInt8[np.ndarray, "s r"],
    centre_deletions: Integer[np.ndarray, "s r"],
    extra: UInt8[np.ndarray, "e r"],
    extra_deletions: Integer[np.ndarray, "e r"],
    nearest: Int[np.ndarray, "e"],
) -> tuple[Float[np.ndarray, "s r 23"], Float[np.ndarray, "s r"]]:
    """Profile and mean deletion count of each cluster, its centre included."""
    rows, length = centres.shape
    size = length * NUM_CLASSES
    column = np.arange(0, size, NUM_CLASSES)
    code = extra + column + (nearest * size)[:, None]
    counts = np.bincount(code.ravel(), minlength=rows * size)
    counts[(centres + column + (np.arange(rows) * size)[:, None]).ravel()] += 1
    row, at = _nonzero(extra_deletions)  # few
    cell = nearest[row] * length + at
    sums = np.bincount(cell, extra_deletions[row, at], minlength=rows * length)
    members = 1e-6 + (1 + np.bincount(nearest, minlength=rows))[:, None]
    profile = counts.astype(np.float64).reshape(rows, size)  # numpy divides integers slowly
    profile /= members
    mean = (sums.reshape(rows, length) + centre_deletions) / members
    return profile.reshape(rows, length, NUM_CLASSES), mean


def deletion_value(deletions: np.ndarray) -> Float[np.ndarray, "..."]:
    """Deletion counts squeezed into 0..1."""
    return np.arctan(deletions / 3.0) * (2 / np.pi)


def msa_feat(
    centres: UInt8[np.ndarray, "s r"],
    centre_deletions: Integer[np.ndarray, "s r"],
    extra: UInt8[np.ndarray, "e r"],
    extra_deletions: Integer[np.ndarray, "e r"],
    nearest: Int[np.ndarray, "e"],
    out: Float32[np.ndarray, "s crop 49"] | None = None,
) -> Float32[np.ndarray, "s crop 49"]:
    """One-hot letter, has-deletion, deletion value, cluster profile, mean deletion value.

    A cluster that is its centre alone has that row's letters as its profile; only the others are
    counted, and only deletions that there are become values. ``out`` may be wider than the rows; it
    is zero beyond.
    """
    features = np.zeros((*centres.shape, 49), np.float32) if out is None else out
    rows, length = centres.shape
    letters = np.full(features.shape[:2], _NOTHING, np.uint8)
    letters[:, :length] = centres
    _LETTERS.take(letters, axis=0, out=features, mode="clip")
    at = _nonzero(centre_deletions)
    features[..., 23][at] = 1
    features[..., 24][at] = deletion_value(centre_deletions[at])
    features[..., 48][at] = deletion_value(centre_deletions[at] / _ALONE)
    if len(nearest):
        is_joined = np.bincount(nearest, minlength=rows) > 0
        joined, number = np.flatnonzero(is_joined), np.cumsum(is_joined) - 1
        profile, mean = cluster_statistics(
            centres[joined], centre_deletions[joined], extra, extra_deletions, number[nearest]
        )
        features[joined, :length, 25:48] = profile
        features[joined, :length, 48] = deletion_value(mean)
    return features


def _nonzero(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Like ``np.nonzero``, which takes several times as long for numbers as for truth values."""
    rows, columns = np.divmod(np.flatnonzero(matrix != 0), matrix.shape[1])
    return rows, columns


def extra_features(
    extra: UInt8[np.ndarray, "e r"],
    deletions: Integer[np.ndarray, "e r"],
    out: Mapping[str, np.ndarray],
) -> None:
    """Write the features of rows that are not cluster centres into arrays of zeros."""
    rows, length = extra.shape
    corner = (slice(rows), slice(length))
    at = _nonzero(deletions)
    out["extra_msa"][corner] = extra
    out["extra_has_deletion"][corner][at] = 1
    out["extra_deletion_value"][corner][at] = deletion_value(deletions[at])
    out["extra_msa_mask"][corner] = 1
    out["extra_msa_row_mask"][:rows] = 1
