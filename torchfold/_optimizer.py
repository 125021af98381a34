"""Clipping and the update by Triton kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcore.config import OptimizerConfig
from foldcore.kernels import optimizer as kernels
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call


def norm(x: Tensor) -> Tensor:
    """The norm of a vector in float32."""
    (sums,) = call(kernels.squares(x.numel(), architecture(x.device)), x)
    return torch.sqrt(sum_columns(sums, x))[0]


def update(
    gradient: Tensor,
    old: Sequence[Tensor],
    rounded: Tensor | None,
    coefficients: Sequence[Tensor],
    config: OptimizerConfig,
) -> tuple[list[Tensor], Tensor | None, tuple[Tensor, Tensor]]:
    """The new buffers in the places of the old; norms of the parameters and of Adam's direction.

    Between them the rounded parameters, where they were given.
    """
    kind = architecture(gradient.device)
    launch = kernels.update(gradient.numel(), config, kind, rounded is not None)
    written = gradient.new_empty(1, dtype=torch.bfloat16) if rounded is None else rounded
    vector = torch.stack([x.to(torch.float32) for x in coefficients])
    *new, narrow, sums = call(launch, gradient, *old, written, vector)
    norms = torch.sqrt(sum_columns(sums, gradient))
    return new, None if rounded is None else narrow, (norms[0], norms[1])
