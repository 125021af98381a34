"""Layer normalisation and transition by kernels: outputs and every gradient."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels.launch import Launch
from tests import kernel_checks
from tests.kernel_checks import normal
from torchfold import _rows, _triton, ops


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_checks.poison(monkeypatch)


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


def check_transition(
    arrays: dict[str, Tensor], residual: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Other kernels run where a gradient is wanted than where none is."""
    kernel_checks.check(transition(residual), arrays, dtype)
    given = {name: x.to(kernel_checks.DEVICE, dtype) for name, x in arrays.items()}
    del given["seed"]
    with torch.no_grad():
        found = transition(residual)("triton", **given)
    layers = transition(residual)("triton", **{k: x.requires_grad_() for k, x in given.items()})
    error = kernel_checks.relative_error(found, layers.detach().double())
    bound = 5e-6 if dtype == torch.float32 else 5e-3  # two roundings of the result
    assert error < bound, f"without gradient: {error:.1e} of the norm"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "f"),
    [((1, 16), 64), ((7, 32), 64), ((2, 37, 24), 72), ((129, 16), 16), ((3, 5, 64), 37)],
    ids=str,
)
def test_transition(shape: tuple[int, ...], f: int, residual: bool) -> None:
    check_transition(transition_arrays(shape, f, seed=f), residual)


def test_transition_of_whole_tiles() -> None:
    check_transition(transition_arrays((128, 32), 64, seed=4), residual=True)


def test_transition_in_bfloat16() -> None:
    check_transition(transition_arrays((48, 32), 64, seed=3), True, torch.bfloat16)


def test_transition_saves_only_what_a_gradient_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        launched.append(launch.kernel.fn.__name__)
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_rows, "call", call)
    arrays = {k: x.to(kernel_checks.DEVICE) for k, x in transition_arrays((5, 16), 32, 0).items()}
    seed = arrays.pop("seed")
    transition(True)("triton", **arrays)
    arrays["x"].requires_grad_()
    with torch.no_grad():
        transition(True)("triton", **arrays)
    assert launched == ["transition_forward_kernel"] * 2
    y = transition(True)("triton", **arrays)
    assert launched[-1] == "transition_second_kernel"
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert sum(x.shape == (5, 32) for x in saved) == 1  # the hidden layer
    y.backward(seed)
    assert sum(x.shape == (5, 16) for x in saved) == 1  # of the rows, nothing but x
