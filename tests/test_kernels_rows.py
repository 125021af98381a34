"""Layer normalisation and transition by kernels: outputs and every gradient."""

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from torchfold import _triton, ops


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = _triton._allocate
    monkeypatch.setattr(_triton, "_allocate", lambda *args: allocate(*args).fill_(float("nan")))


def layer_norm(implementation: str, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return ops.layer_norm(x, scale, offset, implementation=implementation)


def norm_arrays(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    generator, c = torch.Generator().manual_seed(seed), shape[-1]
    return {
        "x": normal(generator, *shape) * 3 + 5,
        "scale": normal(generator, c),
        "offset": normal(generator, c),
        "seed": normal(generator, *shape),
    }


@pytest.mark.parametrize(
    "shape",
    [(1, 16), (7, 37), (37, 129), (2, 3, 64), (5, 256), (3, 384), (129, 8), (257, 5)],
    ids=str,
)
def test_layer_norm(shape: tuple[int, ...]) -> None:
    kernel_checks.check(layer_norm, norm_arrays(shape, seed=len(shape)))


def test_layer_norm_in_bfloat16() -> None:
    kernel_checks.check(layer_norm, norm_arrays((33, 128), seed=1), torch.bfloat16)


def with_residual(implementation: str, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    normal, x = ops.layer_norm_residual(x, scale, offset, implementation=implementation)
    return torch.sin(normal) + 2 * x


@pytest.mark.parametrize("shape", [(7, 37), (2, 3, 64), (129, 8)], ids=str)
def test_layer_norm_with_what_goes_around_it(shape: tuple[int, ...]) -> None:
    kernel_checks.check(with_residual, norm_arrays(shape, seed=5))


def transition(residual: bool) -> kernel_checks.Function:
    def run(implementation: str, **arrays: Tensor) -> Tensor:
        return ops.transition(**arrays, residual=residual, implementation=implementation)

    return run


def transition_arrays(shape: tuple[int, ...], f: int, seed: int) -> dict[str, Tensor]:
    generator, c = torch.Generator().manual_seed(seed), shape[-1]
    return {
        "x": normal(generator, *shape) * 2 + 1,
        "scale": normal(generator, c),
        "offset": normal(generator, c),
        "weights1": normal(generator, c, f, scale=c**-0.5),
        "bias1": normal(generator, f),
        "weights2": normal(generator, f, c, scale=f**-0.5),
        "bias2": normal(generator, c),
        "seed": normal(generator, *shape),
    }


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "f"),
    [((1, 16), 64), ((7, 32), 64), ((2, 37, 24), 72), ((129, 16), 16), ((3, 5, 64), 37)],
    ids=str,
)
def test_transition(shape: tuple[int, ...], f: int, residual: bool) -> None:
    kernel_checks.check(transition(residual), transition_arrays(shape, f, seed=f))


def test_transition_in_bfloat16() -> None:
    arrays = transition_arrays((48, 32), 64, seed=3)
    kernel_checks.check(transition(residual=True), arrays, torch.bfloat16)
