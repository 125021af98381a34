"""Initial values: their spread by kind, and what they depend on."""

import math

import numpy as np
import pytest

from foldcore.initializers import KINDS, draw

SHAPE = (256, 8, 32)


def test_same_name_and_seed_give_the_same_values() -> None:
    np.testing.assert_array_equal(draw("a//weights", SHAPE, "linear", 3), draw_again())
    assert draw_again().dtype == np.float32


def draw_again() -> np.ndarray:
    return draw("a//weights", SHAPE, "linear", 3)


@pytest.mark.parametrize("change", [("b//weights", 3), ("a//weights", 4), ("a//weights", -3)])
def test_name_and_seed_matter(change: tuple[str, int]) -> None:
    name, seed = change
    correlation = np.corrcoef(draw_again().ravel(), draw(name, SHAPE, "linear", seed).ravel())
    assert abs(correlation[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("kind", "shape", "stddev", "limit"),
    [
        ("linear", (400, 300), math.sqrt(1 / 400), 2 * math.sqrt(1 / 400) / 0.87962566),
        ("relu", (400, 300), math.sqrt(2 / 400), 2 * math.sqrt(2 / 400) / 0.87962566),
        # the three-dimensional rule: fan-in 256 * 8, fan-out 256 * 32
        ("glorot", (256, 8, 32), 0.024205 / math.sqrt(3), 0.024205),
        ("glorot", (64, 8), math.sqrt(2 / 72), math.sqrt(6 / 72)),
        ("normal", (128, 400), math.sqrt(1 / 128), math.inf),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_spread(
    kind: str, shape: tuple[int, ...], stddev: float, limit: float, stacked: bool
) -> None:
    layers = 3 if stacked else 1
    full = (layers, *shape) if stacked else shape
    values = draw("x", full, kind, 0, stacked=stacked).reshape(layers, -1).astype(np.float64)
    assert values.std() == pytest.approx(stddev, rel=0.05)
    assert abs(values.mean()) < 5 * stddev / math.sqrt(values.size)
    assert abs(values).max() <= limit * 1.0001
    if limit < math.inf:
        assert abs(values).max() > 0.99 * limit
    if stacked:
        assert abs(np.corrcoef(values)[0, 1]) < 0.15  # layers are drawn independently


def test_constant_kinds() -> None:
    assert (draw("x", (4,), "zeros", 0) == 0).all()
    assert (draw("x", (4,), "ones", 0) == 1).all()
    weights = draw("x", (12,), "point_weights", 0).astype(np.float64)
    np.testing.assert_allclose(np.log1p(np.exp(weights)), 1, rtol=1e-6)  # softplus


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="x//w.*unknown kind.*'he'"):
        draw("x//w", (4, 4), "he", 0)
    assert "he" not in KINDS
