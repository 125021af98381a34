"""Dropout masks of a stack drawn ahead: those that its blocks would draw themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from foldcore.kernels.launch import Launch
from jaxfold import _dropout, ops
from jaxfold._masks import run_with_dropout
from jaxfold.primitives import DropoutKey, Linear, dropout, dropout_factor
from jaxfold.stack import stack
from tests.test_kernels_jax import call, pytestmark

__all__ = ["pytestmark"]  # on a GPU there is no interpreter
BLOCKS, CHANNELS, RATE = 3, 4, 0.25
Run = tuple[Array, Array]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What a traced program launches."""
    found: list[Launch] = []

    def counted(launch: Launch, *inputs: Array) -> tuple[Array, ...]:
        found.append(launch)
        return call(launch, *inputs)

    monkeypatch.setattr(_dropout, "call", counted)
    return found


def key(step: Array, ids: tuple[int, ...]) -> DropoutKey:
    return DropoutKey(2**32 - 5, step, jnp.asarray(ids, jnp.int32), jnp.int32(2), scope="model")


def program(recompute: Any, unroll: bool, ids: tuple[int, ...]) -> Any:
    """Result and gradient by the parameters of blocks that drop out along an axis and apart."""
    blocks = stack(Linear(CHANNELS, CHANNELS), BLOCKS)
    graph, state = nnx.split(blocks)
    numbers = np.random.default_rng(0)
    state = jax.tree.map(lambda p: jnp.asarray(numbers.normal(size=p.shape), jnp.float32), state)
    start = jnp.asarray(numbers.normal(size=(len(ids), 5, 7, CHANNELS)), jnp.float32)

    def block(module: Linear, x: Array, given: DropoutKey | None) -> Array:
        factor = dropout_factor(x, RATE, given, "shared", shared_axis=1)
        assert factor is not None
        return x + dropout(jnp.sin(module(x)) * factor, 0.5, given, "apart")

    def loss(state: Any, step: Array) -> tuple[Array, Array]:
        given = key(step, ids).enter("blocks")
        x = run_with_dropout(nnx.merge(graph, state), start, block, given, recompute, unroll)
        return jnp.sum(x * x), x

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda step: both(state, jnp.int32(step))


@pytest.mark.parametrize(
    ("recompute", "unroll", "ids"),
    [("none", False, (3, -2)), ("none", True, (3,)), ("block", True, (3, -2))],
)
def test_blocks_meet_the_masks_that_they_would_draw(
    recompute: Any,
    unroll: bool,
    ids: tuple[int, ...],
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, list[Any]] = {}
    for implementation in ("triton", "reference"):
        monkeypatch.setattr(ops, "_chosen", implementation)
        run = program(recompute, unroll, ids)
        found[implementation] = [run(step) for step in (1, 2)]
    assert len(launches) == 1  # of all blocks and both masks
    for ours, theirs in zip(*(jax.tree.leaves(x) for x in found.values()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    (_, first), (_, second) = ((x[1], x[0][1]) for x in found["triton"])
    assert np.abs(first - second).max() > 0.1  # each step draws anew


def test_no_key_draws_no_masks(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", "triton")
    blocks = stack(Linear(CHANNELS, CHANNELS), BLOCKS)
    x = jnp.ones((2, CHANNELS))
    same = run_with_dropout(blocks, x, lambda block, x, given: block(x) + x, None)
    np.testing.assert_array_equal(same, x)  # parameters are zeros
    assert not launches
