"""Bins of distances begin at the same numbers in both tracks, compiled or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxfold.embedders
import jaxfold.heads
import jaxfold.losses
import torchfold.embedders
import torchfold.heads
import torchfold.losses
from jaxfold.embedders import RECYCLING_BINS
from jaxfold.heads import ALIGNED_ERROR_LIMITS, DISTOGRAM_LIMITS
from jaxfold.template import TEMPLATE_BINS


def around(edges: np.ndarray) -> np.ndarray:
    """On each edge, and next to it on either side."""
    edges = edges.astype(np.float32)
    near = [np.nextafter(edges, np.float32(side)) for side in (0, 100)]
    return np.sort(np.concatenate([edges, *near]))


@pytest.mark.parametrize("bins", [RECYCLING_BINS, TEMPLATE_BINS])
def test_one_hot_distances(bins: tuple[float, float, int]) -> None:
    edges = np.linspace(*bins)
    x = np.append(np.float32(0), around(edges))
    points = np.stack([x, 0 * x, 0 * x], axis=-1)
    squared = np.square(x[:, None] - x)[..., None]
    limits = np.square(edges.astype(np.float32))
    expected = (squared > limits) & (squared < np.append(limits[1:], np.float32(1e8)))
    assert not expected[0, x == edges[0]].any()  # an edge belongs to neither side

    ours = jax.jit(lambda p: jaxfold.embedders.distance_bins(p, *bins, jnp.float32))(points)
    theirs = torchfold.embedders.distance_bins(torch.from_numpy(points), *bins, torch.float32)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(theirs, expected)


def test_labels_of_the_distogram() -> None:
    edges = np.linspace(*DISTOGRAM_LIMITS, 63)
    squared = np.square(around(edges))[None, None]
    expected = (squared[..., None] > np.square(edges.astype(np.float32))).sum(axis=-1)
    ours = jax.jit(lambda s: jaxfold.losses._squared_bin(s, DISTOGRAM_LIMITS, 64))(squared)
    theirs = torchfold.losses._squared_bin(torch.from_numpy(squared), DISTOGRAM_LIMITS, 64)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(theirs, expected)


def test_centres_of_the_aligned_error() -> None:
    step = 0.5  # angstrom
    expected = np.append(np.linspace(*ALIGNED_ERROR_LIMITS, 63), 31.0 + step) + step / 2
    logits = np.zeros((1, 2, 2, 64), np.float32)
    ours = jax.jit(jaxfold.heads._aligned_error_centres)(logits)
    theirs = torchfold.heads._aligned_error_centres(torch.from_numpy(logits))
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(theirs, expected)
