"""Stacks of equal blocks: parameters with a leading axis of layers, run by one loop.

The axis is DeepMind's: slice l holds the parameters of the l-th block to run. What modules derive
from parameters is derived for all layers at once, before the loop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Block = TypeVar("Block", bound=nn.Module)
Carry = TypeVar("Carry")
Recompute = Literal["none", "block"]


class Deriving(nn.Module):
    """A module that computes with arrays derived from parameters, such as several of them as one.

    It derives them on the spot, unless attributes of their names, None otherwise, hold them.
    """

    def derive(self) -> dict[str, Tensor]:
        """The arrays by name; with a leading axis of layers where parameters have one."""
        raise NotImplementedError


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
    stacked = dict(blocks.named_parameters()) | _derive(blocks)
    slices = {name: layers.unbind() for name, layers in stacked.items()}
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


def _derive(blocks: nn.Module) -> dict[str, Tensor]:
    """What modules derive, by its path."""
    return {
        f"{path}.{name}" if path else name: array
        for path, module in blocks.named_modules()
        if isinstance(module, Deriving)
        for name, array in module.derive().items()
    }


def _call(blocks: nn.Module, parameters: dict[str, Tensor], *arguments: Any) -> Any:
    """The module of all blocks as one block with these parameters."""
    return functional_call(blocks, parameters, arguments)
