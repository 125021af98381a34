"""What the tests of the kernels share: both implementations on one input, compared.

Kernels run on a GPU where there is one, otherwise in Triton's interpreter. The reference runs in
float64 on the values that the kernel gets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.triton_interpreter  # noqa: F401
from torchfold import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error of the norm: rounding in float32 sums of some hundreds.
FLOAT32_TOLERANCE = 5e-6
# In bfloat16 the plain implementation says what rounding costs, such as relu switching a unit on or
# off; kernels round less often. Still both are chance: the error of a weight's gradient is mostly
# that of its mean over the positions, a few dozen numbers, whose norms differ by some tenths. Below
# the floor, one rounding of the result.
BFLOAT16_RATIO, BFLOAT16_FLOOR = 1.5, 3e-3
# Gradients by parameters that are sums over all positions, where few channels weigh most, differ by
# more than tenths: in 207 draws of triangle multiplication, with the kernels' roundings in plain
# operations, one of 16 was off by up to 2.9 times as much as in the plain implementation, or 2.3
# times as much as there the 16 together; all 16 together by 0.4 to 1.2 times.
ONE_SUM_RATIO, SUMS_RATIO = 2.5, 1.3
TOGETHER = "sums together"

# as training sets it
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

# function(implementation, **arrays) -> result
Function = Callable[..., Tensor]


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are given to write holds what no result is: NaN, or bytes of 55."""
    allocate = _triton._allocate

    def poisoned(*arguments: Any) -> Tensor:
        x = allocate(*arguments)
        if x.is_floating_point():
            return x.fill_(float("nan"))
        x.view(torch.uint8).fill_(0x55)
        return x

    monkeypatch.setattr(_triton, "_allocate", poisoned)


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
    sums: Sequence[str] = (),
) -> None:
    """``arrays["seed"]`` is the gradient of the result; constant arrays stay in float32; gradients
    by ``sums`` are also judged together."""
    given = {
        name: x.to(DEVICE) if name in constant else x.to(DEVICE, dtype)
        for name, x in arrays.items()
    }
    found = results(function, "triton", given, constant)
    exact = {name: x.double() for name, x in given.items()}
    expected = results(function, "reference", exact, constant)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
    errors = relative_errors(found, expected, sums)
    bounds = dict.fromkeys(errors, FLOAT32_TOLERANCE)
    if dtype == torch.bfloat16:
        plain = results(function, "reference", given, constant)
        bounds = bfloat16_bounds(relative_errors(plain, expected, sums), sums)
    for name, error in errors.items():
        assert error < bounds[name], f"{name}: {error:.1e}, expected less than {bounds[name]:.1e}"


def bfloat16_bounds(plain: Mapping[str, float], sums: Sequence[str]) -> dict[str, float]:
    """What errors have to be less than, from those of the plain implementation."""
    bounds = {name: BFLOAT16_RATIO * error for name, error in plain.items()}
    if sums:
        bounds |= {name: ONE_SUM_RATIO * max(plain[name], plain[TOGETHER]) for name in sums}
        bounds[TOGETHER] = SUMS_RATIO * plain[TOGETHER]
    return {name: max(bound, BFLOAT16_FLOOR) for name, bound in bounds.items()}


def relative_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], sums: Sequence[str]
) -> dict[str, float]:
    """Of each array; TOGETHER the root mean square of those of ``sums``."""
    errors = {name: relative_error(found[name], want) for name, want in expected.items()}
    if sums:
        errors[TOGETHER] = math.sqrt(sum(errors[name] ** 2 for name in sums) / len(sums))
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))
