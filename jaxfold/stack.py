"""Stacks of equal blocks: parameters with a leading axis of layers, run by one loop.

The axis is DeepMind's: slice l holds the parameters of the l-th block to run. What modules derive
from parameters is derived for all layers at once, before the loop.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")
Recompute = Literal["none", "block"]


class Deriving(nnx.Module):
    """A module that computes with arrays derived from parameters, such as several of them as one.

    It derives them on the spot, unless attributes of their names, None otherwise, hold them.
    """

    def derive(self) -> dict[str, Array]:
        """The arrays by name; with a leading axis of layers where parameters have one."""
        raise NotImplementedError


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
    out instead of looping: that compiles slower, and what is kept for the backward pass stays where
    it was computed, while a loop copies it to and from arrays that hold all blocks.
    """
    return _run(blocks, carry, lambda b, c, layer: call(b, c, layer[0]), None, recompute, unroll)


def _run(
    blocks: Block,
    carry: Carry,
    call: Callable[[Block, Carry, tuple[Int[Array, ""], Any]], Carry],
    own: Any = None,
    recompute: Recompute = "none",
    unroll: bool = False,
) -> Carry:
    """The same with arrays that have a slice for each block: the call gets (index, its slices)."""
    graphdef, state = nnx.split(_derive(blocks))
    num_blocks = _layers(blocks)

    def body(carry: Carry, layer: tuple[Int[Array, ""], Any, Any]) -> tuple[Carry, None]:
        *rest, parameters = layer
        return call(nnx.merge(graphdef, parameters), carry, tuple(rest)), None

    if recompute == "block":
        # in a loop nothing can be merged with its recomputation, so no barrier is needed
        body = jax.checkpoint(body, prevent_cse=unroll)
    layers = (jnp.arange(num_blocks), own, state)
    if not unroll:
        return jax.lax.scan(body, carry, layers)[0]

    def one(carry: Carry, layer: Any) -> Carry:
        return body(carry, jax.tree.map(lambda x: x[0], layer))[0]

    one = jax.jit(one)  # so that it is traced only once
    for layer in _split(layers, num_blocks):
        carry = one(carry, layer)
    return carry


def _derive(blocks: Any) -> Any:
    """The same with what its modules derive."""
    blocks = nnx.merge(*nnx.split(blocks))
    for _, module in list(nnx.iter_graph(blocks)):
        if isinstance(module, Deriving):
            for name, array in module.derive().items():
                setattr(module, name, nnx.Variable(array))
    return blocks


def _layers(blocks: nnx.Module) -> int:
    """How many blocks a stack has."""
    return int(jax.tree.leaves(nnx.split(blocks)[1])[0].shape[0])


def _split(layers: Any, num_blocks: int) -> Iterator[Any]:
    """Slices of all arrays, each a first axis of one; gradients are put together, not added up."""
    leaves, structure = jax.tree.flatten(layers)
    split = [jax.lax.split(leaf, [1] * num_blocks) for leaf in leaves]
    for slices in zip(*split, strict=True):
        yield jax.tree.unflatten(structure, slices)
