"""What the tests of the kernels share: both implementations on one input, compared.

Kernels run on a GPU where there is one, otherwise in Triton's interpreter. The reference runs in
float64 on the values that the kernel gets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error of the norm: rounding in float32 sums of some hundreds.
FLOAT32_TOLERANCE = 5e-6
# In bfloat16 the plain implementation says what rounding costs, such as relu switching a unit on or
# off; kernels round less often. Still both are chance: the error of a weight's gradient is mostly
# that of its mean over the positions, a few dozen numbers, whose norms differ by some tenths. Below
# the floor, one rounding of the result.
BFLOAT16_RATIO, BFLOAT16_FLOOR = 1.5, 3e-3

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
    plain = results(function, "reference", given, constant) if dtype == torch.bfloat16 else {}
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        error, bound = relative_error(found[name], want), FLOAT32_TOLERANCE
        if plain:
            bound = max(BFLOAT16_RATIO * relative_error(plain[name], want), BFLOAT16_FLOOR)
        assert error < bound, f"{name}: {error:.1e}, expected less than {bound:.1e}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))
