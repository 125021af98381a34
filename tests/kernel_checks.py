"""What the tests of the kernels share: both implementations on one input, compared.

Kernels run on a GPU where there is one, otherwise in Triton's interpreter. The reference runs in
float64 on the values that the kernel gets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error of the norm. float32: rounding in sums of some hundreds. bfloat16: inputs and what
# is kept on the way carry 8 bits, 0.2 % each, and rounding switches a few hidden units on or off.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}

# function(implementation, **arrays) -> result
Function = Callable[..., Tensor]


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Fresh random values of about the size ``scale``."""
    return torch.randn(shape, generator=generator) * scale


def results(
    function: Function, implementation: str, arrays: dict[str, Tensor], constant: tuple[str, ...]
) -> dict[str, Tensor]:
    """The result and the gradients by all arrays but the constant ones."""
    leaves = {name: x.clone().requires_grad_(name not in constant) for name, x in arrays.items()}
    seed = leaves.pop("seed").detach()
    result = function(implementation, **leaves)
    result.backward(seed)
    grads = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return {"result": result.detach(), **grads}


def check(
    function: Function,
    arrays: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    constant: tuple[str, ...] = (),
) -> None:
    """``arrays["seed"]`` is the gradient of the result; constant arrays stay in float32."""
    given = {
        name: x.to(DEVICE) if name in constant else x.to(DEVICE, dtype)
        for name, x in arrays.items()
    }
    found = results(function, "triton", given, constant)
    exact = {name: x.double() for name, x in given.items()}
    expected = results(function, "reference", exact, constant)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, name
        error = float(torch.linalg.norm(got.double() - want) / torch.linalg.norm(want))
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
