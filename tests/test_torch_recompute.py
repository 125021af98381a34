"""Blocks with kernels that are computed again for their backward pass (torchfold)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from torchfold import ops
from torchfold.evoformer import EvoformerBlock
from torchfold.stack import run, stack

MSA, PAIR = (1, 4, 5, 16), (1, 5, 5, 8)


def gradients(recompute: Any, global_column: bool) -> list[Tensor]:
    """By the MSA, the pairs and every parameter of a block."""
    block = EvoformerBlock(
        *(16, 8),
        msa_heads=2,
        msa_head_dim=8,
        pair_heads=2,
        pair_head_dim=4,
        outer_product_hidden=4,
        triangle_hidden=8,
        transition_factor=2,
        msa_dropout=0.0,
        pair_dropout=0.0,
        global_column_attention=global_column,
    )
    blocks, generator = stack(block, 1), torch.Generator().manual_seed(1)
    for parameter in blocks.parameters():
        parameter.data = normal(generator, *parameter.shape, scale=0.5)
    blocks.to(kernel_checks.DEVICE)
    carry = tuple(normal(generator, *shape).to(kernel_checks.DEVICE) for shape in (MSA, PAIR))
    masks = [torch.ones(shape[:-1], device=kernel_checks.DEVICE) for shape in (MSA, PAIR)]
    given = [*(x.requires_grad_() for x in carry), *blocks.parameters()]
    out = run(blocks, carry, lambda block, carry, _: block(*carry, *masks), recompute)
    return list(torch.autograd.grad(sum(x.square().sum() for x in out), given))


@pytest.mark.parametrize("global_column", [False, True])
def test_kernels_in_recomputed_blocks(global_column: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", "triton")
    kept, again = (gradients(recompute, global_column) for recompute in ("none", "block"))
    assert all(x.abs().max() > 0 for x in kept)
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
