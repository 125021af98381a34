"""All dropout masks of a stack of blocks from one launch, where a kernel draws them.

Drawn block by block, each mask takes five launches: its table, its bits, and what becomes of them.
Which masks a block asks for depends on the shapes alone, so a rehearsal notes them. Their bits are
those of ``foldcore/dropout.py`` in any case.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxfold import ops
from jaxfold.primitives import DropoutKey
from jaxfold.stack import Block, Recompute, _layers, _run

Carry = TypeVar("Carry")
Factors = dict[str, Float32[Array, "l b ..."]]  # by path, of all blocks


class Request(NamedTuple):
    """One mask of each block; ``shape`` is that of one example."""

    path: str
    shape: tuple[int, ...]
    rate: float


class Drawn:
    """What a block multiplies its updates by."""

    def __init__(self, factors: Mapping[str, Array]) -> None:
        self._factors = factors

    def factor(self, path: str, shape: tuple[int, ...], rate: float) -> Array:
        """1 / (1 - rate) where an element is kept, else 0."""
        del shape, rate
        return self._factors[path]


class Rehearsal:
    """Stands where ``Drawn`` does and notes what is asked for; everything is kept."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}

    def factor(self, path: str, shape: tuple[int, ...], rate: float) -> Array:
        """A mask that keeps everything."""
        self.requests[Request(path, shape[1:], rate)] = None
        return jnp.ones(shape, jnp.float32)


def run_with_dropout(
    blocks: Block,
    carry: Carry,
    call: Callable[[Block, Carry, DropoutKey | None], Carry],
    dropout: DropoutKey | None,
    recompute: Recompute = "none",
    unroll: bool = False,
) -> Carry:
    """``stack.run`` for a call that gets the key of its block: ``dropout`` is that of the stack."""

    def keyed(block: Block, carry: Carry, layer: tuple[Array, Factors]) -> Carry:
        return call(block, carry, key_of(dropout, layer))

    def rehearse(key: DropoutKey) -> Any:
        return _run(blocks, carry, lambda block, carry, _: call(block, carry, key))

    factors = draw_ahead(dropout, _layers(blocks), rehearse)
    return _run(blocks, carry, keyed, factors, recompute, unroll)


def draw_ahead(
    dropout: DropoutKey | None, blocks: int, rehearse: Callable[[DropoutKey], Any]
) -> Factors:
    """The factors of all blocks; none where blocks draw their masks themselves.

    ``rehearse`` is traced with a key, and asks for the masks of one block.
    """
    if dropout is None or ops._chosen != "triton":
        return {}
    rehearsal = Rehearsal()
    jax.eval_shape(lambda: rehearse(dataclasses.replace(dropout, _masks=rehearsal)))
    return _draw(dropout, blocks, list(rehearsal.requests))


def key_of(dropout: DropoutKey | None, layer: tuple[Array, Factors]) -> DropoutKey | None:
    """The key of one block: its position, and its slices of what was drawn ahead."""
    if dropout is None:
        return None
    index, factors = layer
    return dataclasses.replace(dropout, block=index, _masks=Drawn(factors) if factors else None)


def _draw(dropout: DropoutKey, blocks: int, requests: list[Request]) -> Factors:
    from jaxfold import _dropout

    masks = [(r.path, math.prod(r.shape), r.rate) for r in requests]
    examples = len(dropout.example_id)
    found = {}
    for request, kept in zip(requests, _dropout.keep_masks(masks, blocks, dropout), strict=True):
        factor = kept.astype(jnp.float32) / (1 - request.rate)
        found[request.path] = factor.reshape(blocks, examples, *request.shape)
    # arrays of their own, else XLA computes each block's part by itself
    return jax.lax.optimization_barrier(found)
