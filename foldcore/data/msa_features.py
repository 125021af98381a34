"""From an alignment to the MSA features of one recycling pass (Suppl. 1.2.6, 1.2.7).

Codes: 0..19 amino acids, 20 X, 21 gap, 22 masked. Row 0 is the chain itself. Rows are chosen as
index arrays, so the alignment is copied once. Clusters are assigned over the whole chain and only
then cut to the crop, as published; everything after the assignment works on the crop alone.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from foldcore.constants import gap_code, mask_code, num_msa_codes

NUM_CLASSES = 23  # one-hot width: 22 codes and the masked token
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
    deleted = np.minimum(starts[:, None] + np.arange(block), num_rows - 1)
    return np.delete(rows, deleted.ravel())


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
    kind = rng.random(msa.shape)
    uniform = rng.integers(20, size=msa.shape, dtype=np.uint8)
    drawn = _draw_from_profile(profile, rng.random(msa.shape))
    edges = np.cumsum([REPLACE_UNIFORM, REPLACE_PROFILE, REPLACE_SAME])
    choices = [kind < edges[0], kind < edges[1], kind < edges[2]]
    replacement = np.select(choices, [uniform, drawn, msa], np.uint8(mask_code))
    return np.where(selected, replacement, msa), selected


def _draw_from_profile(profile: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Inverse of each column's cumulative distribution, at ``uniform`` [s, r]."""
    cumulative = np.cumsum(profile, axis=1)
    cumulative /= cumulative[:, -1:]
    codes = np.zeros(uniform.shape, np.uint8)
    for code in range(num_msa_codes - 1):  # 21 comparisons; the last edge, 1, is never reached
        codes += uniform >= cumulative[:, code]
    return codes


def assign_clusters(
    centres: UInt8[np.ndarray, "s r"], extra: UInt8[np.ndarray, "e r"]
) -> Int[np.ndarray, "e"]:
    """Centre that shares most letters with each extra row; the first of equals (Suppl. 1.2.7).

    Gaps and masked letters do not count. Codes are compared as five bit planes, 64 columns a word:
    exact, and much faster than a product of one-hot matrices.
    """
    centre_bits, extra_bits = _bit_planes(centres), _bit_planes(extra)  # [5, words, rows]
    counted = _pack(centres < gap_code)  # [words, s]
    best = np.full(len(extra), -1, np.int32)
    nearest = np.zeros(len(extra), np.int32)
    for s in range(len(centres)):
        differs = extra_bits[0] ^ centre_bits[0, :, s, None]
        for plane in range(1, 5):
            differs |= extra_bits[plane] ^ centre_bits[plane, :, s, None]
        equal = ~differs & counted[:, s, None]
        agreement = np.bitwise_count(equal).sum(0, dtype=np.int32)
        better = agreement > best
        best[better], nearest[better] = agreement[better], s
    return nearest


def _bit_planes(msa: np.ndarray) -> np.ndarray:
    return np.stack([_pack(msa >> bit & 1) for bit in range(5)])


def _pack(bits: np.ndarray) -> np.ndarray:
    """[rows, r] of 0 and 1 -> [words, rows] of 64 columns each, padded with 0."""
    rows, length = bits.shape
    packed = np.zeros((rows, -(-length // 64) * 8), np.uint8)
    packed[:, : -(-length // 8)] = np.packbits(bits.astype(bool), axis=1)
    return np.ascontiguousarray(packed.view(np.uint64).T)


def cluster_statistics(
    centres: UInt8[np.ndarray, "s r"],
    centre_deletions: Integer[np.ndarray, "s r"],
    extra: UInt8[np.ndarray, "e r"],
    extra_deletions: Integer[np.ndarray, "e r"],
    nearest: Int[np.ndarray, "e"],
) -> tuple[Float[np.ndarray, "s r 23"], Float[np.ndarray, "s r"]]:
    """Profile and mean deletion count of each cluster, its centre included."""
    rows, length = centres.shape
    cluster = np.concatenate([np.arange(rows), nearest])
    cell = cluster[:, None] * length + np.arange(length)
    code = cell * NUM_CLASSES + np.concatenate([centres, extra])
    counts = np.bincount(code.ravel(), minlength=rows * length * NUM_CLASSES)
    deletions = np.concatenate([centre_deletions, extra_deletions])
    sums = np.bincount(cell.ravel(), deletions.ravel(), minlength=rows * length)
    members = 1e-6 + np.bincount(cluster, minlength=rows)
    profile = counts.reshape(rows, length, NUM_CLASSES) / members[:, None, None]
    return profile, sums.reshape(rows, length) / members[:, None]


def deletion_value(deletions: np.ndarray) -> Float[np.ndarray, "..."]:
    """Deletion counts squeezed into 0..1."""
    return np.arctan(deletions / 3.0) * (2 / np.pi)


def msa_feat(
    msa: UInt8[np.ndarray, "s r"],
    deletions: Integer[np.ndarray, "s r"],
    profile: Float[np.ndarray, "s r 23"],
    deletion_mean: Float[np.ndarray, "s r"],
) -> Float[np.ndarray, "s r 49"]:
    """One-hot letter, has-deletion, deletion value, cluster profile, mean deletion value."""
    features = np.zeros((*msa.shape, 49), np.float32)
    features[..., :NUM_CLASSES] = np.eye(NUM_CLASSES, dtype=np.float32)[msa]
    features[..., 23] = np.minimum(deletions, 1)
    features[..., 24] = deletion_value(deletions)
    features[..., 25:48] = profile
    features[..., 48] = deletion_value(deletion_mean)
    return features


def extra_features(
    extra: UInt8[np.ndarray, "e r"], deletions: Integer[np.ndarray, "e r"]
) -> dict[str, np.ndarray]:
    """Features of the rows that are not cluster centres."""
    return {
        "extra_msa": extra,
        "extra_has_deletion": np.minimum(deletions, 1),
        "extra_deletion_value": deletion_value(deletions),
        "extra_msa_mask": np.ones(extra.shape),
        "extra_msa_row_mask": np.ones(len(extra)),
    }
