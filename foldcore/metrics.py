"""How close a predicted structure is to the true one, on alpha carbons of known correspondence.

Positions are in angstrom; ``mask`` marks residues resolved in the true structure, which alone
count and whose number is the length of TM-score and GDT-TS. A metric without anything to compare
(fewer than two resolved residues; for lDDT none within 15 angstrom of each other) is nan. All
values but dRMSD lie in 0..1.

GDT-TS and TM-score ask for the best superposition. The search is that of the TM-score program:
superpose on every fragment of length L, L/2, L/4, ... 4, then repeatedly on all residues that came
to lie within a cutoff, until the set no longer changes. Starts overlap by half a fragment. It is a
heuristic: it may miss the optimum slightly and never exceeds it.
"""

import numpy as np
from jaxtyping import Bool, Float

LDDT_CUTOFF = 15.0  # angstrom, in the true structure
LDDT_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
GDT_THRESHOLDS = (1.0, 2.0, 4.0, 8.0)
_MAX_ROUNDS = 20  # as in the TM-score program
_SHORTEST_FRAGMENT = 4


def lddt_ca(
    predicted: Float[np.ndarray, "r 3"],
    true: Float[np.ndarray, "r 3"],
    mask: Float[np.ndarray, "r"],
) -> float:
    """Local distance difference test on alpha carbons, over all pairs of the chain."""
    predicted, true = _resolved(predicted, true, mask)
    true_distance, distance = _distances(true), _distances(predicted)
    counted = (true_distance < LDDT_CUTOFF) & ~np.eye(len(true), dtype=bool)
    if not counted.any():
        return float("nan")
    error = np.abs(true_distance - distance)[counted]
    return float(np.mean([error < threshold for threshold in LDDT_THRESHOLDS]))


def drmsd(
    predicted: Float[np.ndarray, "r 3"],
    true: Float[np.ndarray, "r 3"],
    mask: Float[np.ndarray, "r"],
) -> float:
    """Root mean square difference of all distances within the chain, in angstrom."""
    predicted, true = _resolved(predicted, true, mask)
    pairs = np.triu_indices(len(true), k=1)
    if not len(pairs[0]):
        return float("nan")
    return float(np.sqrt(np.mean((_distances(predicted) - _distances(true))[pairs] ** 2)))


def gdt_ts(
    predicted: Float[np.ndarray, "r 3"],
    true: Float[np.ndarray, "r 3"],
    mask: Float[np.ndarray, "r"],
) -> float:
    """Mean over 1, 2, 4, 8 angstrom of the largest share of residues that fit within it."""
    predicted, true = _resolved(predicted, true, mask)
    if len(true) < 2:
        return float("nan")
    shares = [
        max((d < threshold).mean(1).max() for d in _superpositions(predicted, true, threshold))
        for threshold in GDT_THRESHOLDS
    ]
    return float(np.mean(shares))


def tm_score(
    predicted: Float[np.ndarray, "r 3"],
    true: Float[np.ndarray, "r 3"],
    mask: Float[np.ndarray, "r"],
) -> float:
    """Template modelling score, normalised by the number of resolved residues."""
    predicted, true = _resolved(predicted, true, mask)
    length = len(true)
    if length < 2:
        return float("nan")
    d0 = max(1.24 * np.cbrt(length - 15) - 1.8, 0.5)
    cutoff = float(np.clip(d0, 4.5, 8.0))
    rounds = _superpositions(predicted, true, cutoff)
    return float(max((1 / (1 + (d / d0) ** 2)).mean(1).max() for d in rounds))


def superpose(
    mobile: Float[np.ndarray, "n r 3"],
    target: Float[np.ndarray, "n r 3"],
    weights: Float[np.ndarray, "n r"],
) -> Float[np.ndarray, "n r 3"]:
    """``mobile`` moved rigidly onto ``target``: least weighted square distance (Kabsch 1976)."""
    share = (weights / weights.sum(1, keepdims=True))[..., None]
    mobile = mobile - (share * mobile).sum(1, keepdims=True)
    centre = (share * target).sum(1, keepdims=True)
    covariance = np.swapaxes(share * mobile, 1, 2) @ (target - centre)
    u, _, vt = np.linalg.svd(covariance)
    # A reflection may fit better; the least important axis is turned back.
    u[:, :, 2] *= np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)[:, None]
    return mobile @ (u @ vt) + centre


def _superpositions(
    predicted: np.ndarray, true: np.ndarray, cutoff: float
) -> list[Float[np.ndarray, "n r"]]:
    """Distances of all residues in every superposition the search visits, an array a round."""
    chosen = _fragments(len(true))
    visited = []
    for _ in range(_MAX_ROUNDS):
        shape = (len(chosen), *true.shape)
        target = np.broadcast_to(true, shape)
        moved = superpose(np.broadcast_to(predicted, shape), target, chosen.astype(np.float64))
        distance = np.sqrt(((moved - target) ** 2).sum(-1))
        visited.append(distance)
        close = _within(distance, cutoff)
        changed = (close != chosen).any(1)
        if not changed.any():
            break
        chosen = np.unique(close[changed], axis=0)
    return visited


def _fragments(length: int) -> Bool[np.ndarray, "n r"]:
    """One mask for each starting fragment."""
    masks = []
    size = length
    while True:
        starts = range(0, length - size + 1, max(size // 2, 1))
        masks += [np.isin(np.arange(length), np.arange(s, s + size)) for s in starts]
        if size <= _SHORTEST_FRAGMENT:
            return np.array(masks)
        size = max(size // 2, _SHORTEST_FRAGMENT)


def _within(distance: np.ndarray, cutoff: float) -> Bool[np.ndarray, "n r"]:
    """Residues within the cutoff, widened where fewer than three are: a rotation needs three."""
    third = np.sort(distance, axis=1)[:, min(2, distance.shape[1] - 1), None]
    return distance <= np.maximum(cutoff, third)


def _resolved(
    predicted: np.ndarray, true: np.ndarray, mask: np.ndarray
) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, "k 3"]]:
    keep = mask > 0
    return predicted[keep].astype(np.float64), true[keep].astype(np.float64)


def _distances(positions: np.ndarray) -> Float[np.ndarray, "r r"]:
    return np.sqrt(((positions[:, None] - positions[None, :]) ** 2).sum(-1))
