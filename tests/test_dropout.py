"""The dropout masks: known answers of the generator, and the track against the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foldcore import dropout as definition
from jaxfold import primitives
from jaxfold.primitives import DropoutKey, dropout, keep_mask
from tests.toy_model import compiled

IDS = np.array([3, -2, 2**31 - 1], np.int32)


def expected(shape: tuple[int, ...], rate: float, **changes: Any) -> np.ndarray:
    values: dict[str, Any] = dict(path="a/b/x", seed=5, step=7, example_id=IDS)
    return definition.keep_mask(shape, rate, **values | changes)


def key() -> DropoutKey:
    return DropoutKey(jnp.uint32(5), jnp.uint32(7), jnp.asarray(IDS)).enter("a").enter("b")


@pytest.mark.parametrize("vector", definition.TEST_VECTORS)
def test_known_answers(vector: Any) -> None:
    words, counter, result = vector
    assert tuple(int(w) for w in definition.threefry(words, counter)) == result
    assert tuple(int(w) for w in primitives._threefry(words, counter)) == result


def test_path_hash_is_stable() -> None:
    assert definition.path_hash("123456789") == 0xCBF43926  # the check value of CRC-32


@pytest.mark.parametrize(
    ("rate", "shape"), [(0.15, (3, 1, 5, 4)), (0.25, (3, 7)), (0.9, (3, 64, 1, 3))]
)
def test_masks_equal_the_definition(rate: float, shape: tuple[int, ...]) -> None:
    mask = compiled(lambda k: keep_mask(shape, rate, k.at_pass(2).enter("", 9), "x"))
    got = mask(DropoutKey(jnp.uint32(5), jnp.uint32(7), jnp.asarray(IDS), scope="a/b"))
    want = expected(shape, rate, path="a/b//x", block=9, recycling=2)
    np.testing.assert_array_equal(got, want)


def test_every_coordinate_changes_the_mask() -> None:
    base = expected((3, 500), 0.5)
    for change in (
        {"path": "a/b/y"},
        {"seed": 6},
        {"step": 8},
        {"block": 1},
        {"recycling": 1},
        {"example_id": IDS + np.int32(-7)},
    ):
        agreement = (expected((3, 500), 0.5, **change) == base).mean(axis=1)
        assert (abs(agreement - 0.5) < 0.12).all(), (change, agreement)
    assert 0.4 < (base[0] == base[1]).mean() < 0.6  # examples differ


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_share_kept(rate: float) -> None:
    mask = expected((3, 100_000), rate)
    sigma = (rate * (1 - rate) / 100_000) ** 0.5
    assert (abs(mask.mean(axis=1) - (1 - rate)) < 5 * sigma).all()


def test_update_is_scaled_and_shares_its_mask() -> None:
    update = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 5, 4)), jnp.float32)
    got = np.asarray(dropout(update, 0.25, key(), "x", shared_axis=1))
    keep = np.broadcast_to(expected((3, 1, 5, 4), 0.25), update.shape)
    np.testing.assert_allclose(got, np.where(keep, np.asarray(update) / 0.75, 0), rtol=1e-6)
    assert 0 < keep.mean() < 1


def test_numbers_of_the_key_may_be_traced() -> None:
    @compiled
    def run(blocks: jax.Array) -> jax.Array:
        return jax.lax.map(lambda b: keep_mask((3, 8), 0.5, key().enter("s", b), "x"), blocks)

    got = run(jnp.arange(3))
    for block in range(3):
        want = expected((3, 8), 0.5, path="a/b/s/x", block=block)
        np.testing.assert_array_equal(got[block], want)


def test_repeated_examples_share_their_mask() -> None:
    mask = keep_mask((6, 20), 0.5, key().repeat(2), "x")
    np.testing.assert_array_equal(mask, expected((3, 20), 0.5).repeat(2, axis=0))


def test_no_key_or_no_rate_changes_nothing() -> None:
    update = jnp.ones((3, 2))
    assert dropout(update, 0.5, None, "x") is update
    assert dropout(update, 0.0, key(), "x") is update


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        dropout(jnp.ones((3, 2)), rate, key(), "x")


def test_dtype_is_kept() -> None:
    for dtype in (jnp.bfloat16, jnp.float32):
        assert dropout(jnp.ones((3, 2), dtype), 0.5, key(), "x").dtype == dtype


def test_bfloat16_is_scaled_by_the_exact_factor() -> None:
    update = jnp.ones((1, 400), jnp.bfloat16)
    kept = dropout(update, 0.15, DropoutKey(1, 2, jnp.array([3])), "m")
    exact = jnp.bfloat16(1 / 0.85)
    assert exact != jnp.bfloat16(1) / jnp.bfloat16(0.85)  # a rounded divisor would show
    assert set(np.asarray(kept, np.float32).ravel()) == {0.0, float(exact)}
