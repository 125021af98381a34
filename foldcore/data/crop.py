"""Cutting an example to size: where the residue crop starts, and which templates are kept."""

import numpy as np
from jaxtyping import Int


def is_clamped(unclamped_fraction: float, rng: np.random.Generator, training: bool) -> bool:
    """Whether this example's backbone FAPE is clamped (Suppl. 1.11.5); always so in evaluation."""
    return not training or bool(rng.random() >= unclamped_fraction)


def crop_start(
    length: int, crop_size: int, clamped: bool, rng: np.random.Generator, training: bool
) -> int:
    """First residue of the crop (Suppl. 1.2.8); the centre of the chain in evaluation.

    An unclamped example is cut closer to the N-terminus: the range of starts is itself drawn.
    """
    slack = max(length - crop_size, 0)
    if not training:
        return slack // 2
    shortening = 0 if clamped else int(rng.integers(slack + 1))
    return int(rng.integers(slack - shortening + 1))


def choose_templates(
    num_candidates: int, maximum: int, rng: np.random.Generator, training: bool
) -> Int[np.ndarray, "t"]:
    """Which candidates, best first, become the templates (Suppl. 1.2.8).

    Training takes min(k, ``maximum``) of them at random with k uniform in 0..``num_candidates``, so
    the network also learns to do without; evaluation takes the best.
    """
    if not training:
        return np.arange(min(num_candidates, maximum))
    order = rng.permutation(num_candidates)
    return order[: min(int(rng.integers(num_candidates + 1)), maximum)]
