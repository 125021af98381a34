"""Stacks of equal blocks: parameters with a leading axis of layers, run by one loop.

The axis is DeepMind's: slice l holds the parameters of the l-th block to run.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")
Recompute = Literal["none", "block"]


def stack(block: Block, num_blocks: int) -> Block:
    """Give every parameter of ``block`` a leading axis; the result holds all blocks at once."""
    graphdef, state = nnx.split(block)

    def widen(variable: Any) -> Any:
        value = jnp.zeros((num_blocks, *variable.shape), variable.dtype)
        return variable.replace(value, stacked=True)

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    return nnx.merge(graphdef, jax.tree.map(widen, state, is_leaf=is_variable))


def run(
    blocks: Block,
    carry: Carry,
    call: Callable[[Block, Carry, Int[Array, ""]], Carry],
    recompute: Recompute = "none",
    unroll: bool = False,
) -> Carry:
    """``call(block, carry, index)`` for each block in turn.

    ``recompute="block"`` keeps only the carries for the backward pass. ``unroll`` writes the blocks
    out instead of looping: it compiles slower and may run faster.
    """
    graphdef, state = nnx.split(blocks)
    num_blocks = jax.tree.leaves(state)[0].shape[0]

    def body(carry: Carry, layer: tuple[Int[Array, ""], Any]) -> tuple[Carry, None]:
        index, parameters = layer
        return call(nnx.merge(graphdef, parameters), carry, index), None

    if recompute == "block":
        # in a loop nothing can be merged with its recomputation, so no barrier is needed
        body = jax.checkpoint(body, prevent_cse=unroll)
    layers = (jnp.arange(num_blocks), state)
    carry, _ = jax.lax.scan(body, carry, layers, unroll=num_blocks if unroll else 1)
    return carry
