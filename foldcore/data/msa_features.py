"""From an alignment to the MSA features of one recycling pass (Suppl. 1.2.6, 1.2.7).

Codes: 0..19 amino acids, 20 X, 21 gap, 22 masked. Row 0 is the chain itself. Rows are chosen as
index arrays, so the alignment is copied once. Clusters are assigned over the whole chain and only
then cut to the crop, as published; everything after the assignment works on the crop alone.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Integer, UInt8, UInt64

from foldcore.constants import gap_code, mask_code, num_msa_codes

NUM_CLASSES = 23  # one-hot width: 22 codes and the masked token
_NO_CODE = np.uint8(31)  # all five bits: differs from every code, and any code becomes it by "or"
_PAIRS = 1 << 15  # of a centre and an extra row, compared at a time: they fit in a core's cache
_ALONE = 1 + 1e-6  # members of a cluster that is its centre alone
# the 49 features of a cell of such a cluster without deletions, for each letter, and of no cell
_LETTERS, _NOTHING = np.zeros((NUM_CLASSES + 1, 49), np.float32), NUM_CLASSES
_LETTERS[range(NUM_CLASSES), range(NUM_CLASSES)] = 1
_LETTERS[range(NUM_CLASSES), range(25, 48)] = 1 / _ALONE
REPLACE_UNIFORM, REPLACE_PROFILE, REPLACE_SAME = 0.1, 0.1, 0.1  # else the masked token
_UNUSED = np.uint64(11)  # low bits of a word of chance that no number in [0, 1) has room for
_EDGES = np.cumsum([REPLACE_UNIFORM, REPLACE_PROFILE, REPLACE_SAME]).tolist()


class Masking(NamedTuple):
    """The chance of BERT masking: which letters are selected, and what is drawn for each."""

    at: Int[np.ndarray, "n"]  # in all rows end to end
    kind: Float[np.ndarray, "n"]
    uniform: UInt8[np.ndarray, "n"]
    level: Float[np.ndarray, "n"]


def alignment_profile(msa: UInt8[np.ndarray, "n r"]) -> Float[np.ndarray, "r 22"]:
    """Share of each code in each column of the whole alignment."""
    rows, length = msa.shape
    flat = msa + num_msa_codes * np.arange(length)
    counts = np.bincount(flat.ravel(), minlength=length * num_msa_codes)
    return counts.reshape(length, num_msa_codes) / rows


def cumulative(profile: Float[np.ndarray, "r 22"]) -> Float[np.ndarray, "r 22"]:
    """The cumulative distribution of each column; the last is 1."""
    sums = np.cumsum(profile, axis=1)
    sums /= sums[:, -1:]
    return sums


def delete_blocks(
    num_rows: int, fraction: float, count: int, rng: np.random.Generator
) -> Int[np.ndarray, "kept"]:
    """Rows left after removing ``count`` blocks of neighbouring rows; row 0 stays (Alg. 1)."""
    block = int(fraction * num_rows)
    if block == 0 or num_rows < 2:
        return np.arange(num_rows)
    starts = rng.integers(1, num_rows, size=count)
    # A block that runs past the end is cut there, so late rows go more often, as published.
    kept = np.ones(num_rows, bool)
    for start in starts.tolist():
        kept[start : start + block] = False
    return kept.nonzero()[0]


def sample_rows(
    rows: Int[np.ndarray, "n"], size: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "m"]]:
    """Split rows at random into ``size`` kept ones, the first row among them, and the rest."""
    shuffled = np.concatenate([rows[:1], rng.permutation(rows[1:])])
    return shuffled[:size], shuffled[size:]


def draw_masking(size: int, fraction: float, rng: np.random.Generator) -> Masking:
    """Chance of the BERT masking of so many letters (Suppl. 1.2.7)."""
    words = rng.bit_generator.random_raw
    at = (words(size) >> _UNUSED < math.ceil(fraction * 2**53)).nonzero()[0]
    kind = _number(words(size)[at])  # few: the other words need not become numbers
    uniform = rng.integers(20, size=size, dtype=np.uint8)[at]
    return Masking(at, kind, uniform, _number(words(size)[at]))


def join_maskings(parts: Sequence[Masking], sizes: Sequence[int]) -> Masking:
    """Of several alignments with so many letters, one below the other."""
    at = [part.at + start for part, start in zip(parts, accumulate(sizes, initial=0), strict=False)]
    rest = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[1:])
    return Masking(np.concatenate(at), *rest)


def _number(words: UInt64[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """What numpy's ``random`` makes of words of chance: numbers in [0, 1)."""
    return (words >> _UNUSED) * 2.0**-53


def mask_msa(
    msa: UInt8[np.ndarray, "s r"], levels: Float[np.ndarray, "r 22"], masking: Masking
) -> tuple[UInt8[np.ndarray, "s r"], Bool[np.ndarray, "s r"]]:
    """The corrupted alignment, and where a loss is taken (Suppl. 1.2.7).

    A selected letter becomes an amino acid drawn uniformly, a letter drawn from its column, whose
    cumulative distribution is given, or stays (10 % each); otherwise it becomes the masked token.
    """
    at, kind, flat = masking.at, masking.kind, msa.ravel()
    is_uniform = kind < _EDGES[0]
    letters = np.where(kind < _EDGES[2], flat[at], np.uint8(mask_code))
    letters = np.where(is_uniform, masking.uniform, letters)
    drawn = ((kind < _EDGES[1]) > is_uniform).nonzero()[0]
    edges = levels[at[drawn] % msa.shape[1], :-1]
    # the inverse of the cumulative distribution at its level; its last edge is 1
    letters[drawn] = np.count_nonzero(masking.level[drawn, None] >= edges, axis=1)
    masked, selected = flat.copy(), np.zeros(msa.size, bool)
    masked[at], selected[at] = letters, True
    return masked.reshape(msa.shape), selected.reshape(msa.shape)


def assign_clusters(
    centres: UInt8[np.ndarray, "s r"], extra: UInt8[np.ndarray, "e r"]
) -> Int[np.ndarray, "e"]:
    """Centre that shares most letters with each extra row; the first of equals (Suppl. 1.2.7).

    Gaps and masked letters do not count. Exact, and much faster than a product of one-hot matrices.
    Columns that do not count differ from every code, so the nearest centre is the one with the
    fewest differences.
    """
    planes = _bit_planes(centres | _NO_CODE * (centres >= gap_code))
    extra_planes = _bit_planes(extra)
    differences = np.zeros((len(centres), len(extra)), np.min_scalar_type(64 * planes.shape[1]))
    count = _PAIRS // max(len(extra), 1) + 1
    for start in range(0, len(centres), count):
        block = slice(start, start + count)
        _add_differences(planes[..., block, None], extra_planes, differences[block])
    return differences.argmin(0)


def _bit_planes(msa: UInt8[np.ndarray, "n r"]) -> UInt64[np.ndarray, "5 w n"]:
    """The five bits of each code apart, 64 columns a word."""
    rows, length = msa.shape
    words = -(-length // 64)
    padded = np.zeros((words, rows, 64), np.uint8)
    for word in range(words):
        columns = msa[:, 64 * word : 64 * word + 64]
        padded[word, :, : columns.shape[1]] = columns
    planes = np.empty((5, words * rows), np.uint64)
    for bit in range(5):
        planes[bit] = np.packbits(padded & (1 << bit)).view(np.uint64)
    return planes.reshape(5, words, rows)


def _add_differences(
    planes: UInt64[np.ndarray, "5 w s 1"],
    extra_planes: UInt64[np.ndarray, "5 w e"],
    total: Integer[np.ndarray, "s e"],
) -> None:
    """In how many columns each pair of rows differs."""
    differs, other = np.empty((2, *total.shape), np.uint64)
    for word in range(planes.shape[1]):
        np.bitwise_xor(planes[0, word], extra_planes[0, word], out=differs)
        for bit in range(1, 5):
            np.bitwise_xor(planes[bit, word], extra_planes[bit, word], out=other)
            np.bitwise_or(differs, other, out=differs)
        total += np.bitwise_count(differs)


def deletion_value(deletions: np.ndarray) -> Float[np.ndarray, "..."]:
    """Deletion counts squeezed into 0..1."""
    return np.arctan(deletions / 3.0) * (2 / np.pi)


def deletion_values(deletions: Integer[np.ndarray, "n r"]) -> Float32[np.ndarray, "n r"]:
    """Of a matrix that is zero nearly everywhere."""
    values, at = np.zeros(deletions.shape, np.float32), _nonzero(deletions)
    values[at] = deletion_value(deletions[at])
    return values


def write_letters(
    letters: UInt8[np.ndarray, "s r"], features: Float32[np.ndarray, "s crop 49"]
) -> None:
    """``msa_feat`` of clusters that are their centre alone, without deletions; zero beyond them."""
    padded = np.full(features.shape[:2], _NOTHING, np.uint8)
    padded[:, : letters.shape[1]] = letters
    _LETTERS.take(padded, axis=0, out=features, mode="clip")


def write_deletions(
    deletions: Integer[np.ndarray, "n r"],
    rows: tuple[Int[np.ndarray, "n"], ...],
    features: Float32[np.ndarray, "... crop 49"],
) -> None:
    """Has-deletion and deletion value, and the mean of clusters that are no more than their row.

    ``rows`` are the places of the rows among the features.
    """
    row, column = _nonzero(deletions)  # few
    found, at = deletions[row, column], (*(place[row] for place in rows), column)
    features[(*at, 23)] = 1
    features[(*at, 24)] = deletion_value(found)
    features[(*at, 48)] = deletion_value(found / _ALONE)


def write_clusters(
    centres: UInt8[np.ndarray, "s r"],
    centre_deletions: Integer[np.ndarray, "s r"],
    extra: UInt8[np.ndarray, "e r"],
    extra_deletions: Integer[np.ndarray, "e r"],
    nearest: Int[np.ndarray, "e"],
    features: Float32[np.ndarray, "s crop 49"],
) -> None:
    """Profile and mean deletion value of every cluster that has more rows than its centre."""
    rows, length = centres.shape
    sizes = 1 + np.bincount(nearest, minlength=rows)
    members, joined, width = 1e-6 + sizes, (sizes > 1).nonzero()[0], length * NUM_CLASSES
    order = np.concatenate([nearest, joined]).argsort(kind="stable")
    cells = np.concatenate([extra, centres[joined]])[order] + np.arange(0, width, NUM_CLASSES)
    end = 0
    for row in joined.tolist():  # dense counts of one at a time stay in a core's cache
        start, end = end, end + int(sizes[row])
        counts = np.bincount(cells[start:end].ravel(), minlength=width)
        features[row, :length, 25:48] = (counts / members[row]).reshape(length, NUM_CLASSES)
    at = _nonzero(extra_deletions)  # few
    place = nearest[at[0]] * length + at[1]
    sums = np.bincount(place, extra_deletions[at], minlength=rows * length)
    sums = sums.reshape(rows, length) + centre_deletions
    at = _nonzero(sums)
    features[..., 48][at] = deletion_value(sums[at] / members[at[0]])


def _nonzero(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Like ``np.nonzero``, which takes several times as long for numbers as for truth values."""
    rows, columns = np.divmod((matrix != 0).ravel().nonzero()[0], matrix.shape[1])
    return rows, columns
