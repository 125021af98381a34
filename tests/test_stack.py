"""Stacks of blocks: the loop, the blocks written out, and both with recomputation are the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from jaxfold.primitives import Linear
from jaxfold.stack import run, stack

BLOCKS = 3


def gradients(unroll: bool, recompute: Any) -> tuple[Array, Any]:
    """The result for two carries and the gradients by carries and parameters."""
    blocks = stack(Linear(4, 4), BLOCKS)
    graph, state = nnx.split(blocks)
    numbers = np.random.default_rng(0)
    state = jax.tree.map(lambda p: jnp.asarray(numbers.normal(size=p.shape), jnp.float32), state)
    carry = tuple(jnp.asarray(numbers.normal(size=(5, 4)), jnp.float32) for _ in range(2))

    def call(block: Linear, carry: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        x, y = carry
        return jnp.tanh(block(y)) * (index + 1), x

    def loss(state: Any, carry: Any) -> tuple[Array, Array]:
        x, y = run(nnx.merge(graph, state), carry, call, recompute, unroll)
        return jnp.sum(x * x + y), x

    (_, result), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, carry)
    return result, gradient


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("unroll", [False, True])
def test_blocks_written_out_are_those_of_the_loop(unroll: bool, recompute: str) -> None:
    found, expected = gradients(unroll, recompute), gradients(False, "none")
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in leaves:
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_blocks_written_out_are_traced_once() -> None:
    blocks, traced = stack(Linear(4, 4), BLOCKS), []

    def call(block: Linear, carry: Array, index: Array) -> Array:
        traced.append(index)
        return block(carry)

    text = str(jax.make_jaxpr(lambda x: run(blocks, x, call, unroll=True))(jnp.zeros((2, 4))))
    assert len(traced) == 1
    assert "scan[" not in text
