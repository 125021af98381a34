"""Stacks of equal blocks: parameters with a leading axis of layers, run by one loop.

The axis is DeepMind's: slice l holds the parameters of the l-th block to run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Block = TypeVar("Block", bound=nn.Module)
Carry = TypeVar("Carry")
Recompute = Literal["none", "block"]


def stack(block: Block, num_blocks: int) -> Block:
    """Give every parameter of ``block`` a leading axis; the result holds all blocks at once."""
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            widened = nn.Parameter(parameter.new_zeros((num_blocks, *parameter.shape)))
            widened.kind, widened.stacked = parameter.kind, True  # type: ignore[attr-defined]
            setattr(module, name, widened)
    return block


def run(
    blocks: Block,
    carry: Carry,
    call: Callable[[Block, Carry, int], Carry],
    recompute: Recompute = "none",
    unroll: bool = False,
) -> Carry:
    """``call(block, carry, index)`` for each block in turn.

    ``recompute="block"`` keeps only the carries for the backward pass. The loop is always written
    out, with or without ``unroll``; each block is the same module with its own slices of the
    parameters, whose gradients PyTorch stacks again.
    """
    del unroll
    slices = {name: stacked.unbind() for name, stacked in blocks.named_parameters()}
    num_blocks = len(next(iter(slices.values())))

    def body(carry: Carry, index: int) -> Carry:
        parameters = {name: layers[index] for name, layers in slices.items()}
        block: Any = partial(_call, blocks, parameters)
        return call(block, carry, index)

    for index in range(num_blocks):
        if recompute == "block" and torch.is_grad_enabled():
            # dropout draws by counter, so there is no generator whose state would matter
            carry = checkpoint(body, carry, index, use_reentrant=False, preserve_rng_state=False)
        else:
            carry = body(carry, index)
    return carry


def _call(blocks: nn.Module, parameters: dict[str, torch.Tensor], *arguments: Any) -> Any:
    """The module of all blocks as one block with these parameters."""
    return functional_call(blocks, parameters, arguments)
