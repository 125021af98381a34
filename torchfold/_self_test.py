"""Runs every kernel once, forward and backward, beside its reference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from foldcore.kernels.cases import CASES, Case
from torchfold import ops
from torchfold._triton import architecture


def run(device: torch.device) -> None:
    """Raise WrongKernel for the first kernel whose results differ."""
    architecture(device)  # says what is missing where no kernel can run
    for case in CASES:
        kernel = _results(case, "triton", torch.bfloat16, device)
        plain = _results(case, "reference", torch.float32, device)
        case.check({name: _difference(kernel[name], plain[name]) for name in plain})


def _results(
    case: Case, implementation: str, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Tensor]:
    """Output and gradients for the same bfloat16 numbers, computed in ``dtype``."""
    arrays = {name: torch.from_numpy(x).to(device) for name, x in case.draw().items()}
    leaves = [name for name in arrays if name not in case.masks]
    for name in leaves:
        arrays[name] = arrays[name].bfloat16().to(dtype).requires_grad_()
    with torch.enable_grad():
        output = getattr(ops, case.op)(
            *arrays.values(), **case.options, implementation=implementation
        )
        # not constant, for a constant gradient has none through a softmax
        loss = torch.sum(output.float() * torch.cos(torch.arange(output.shape[-1], device=device)))
        gradients = torch.autograd.grad(loss, [arrays[name] for name in leaves])
    return {"the output": output.detach()} | {
        f"the gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.norm(found.float() - expected)
    return float(difference / torch.linalg.norm(expected))
