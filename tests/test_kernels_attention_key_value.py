"""Gradients of keys and values with products and copies ordered by hand: results, and what is too
early."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import (
    attention,
    attention_bias,
    attention_key_value_pipelined,
    attention_long,
    attention_tiles,
)
from foldcore.kernels.attention_key_value_pipelined import Steps
from foldcore.kernels.attention_tiles import Problem, Tiles, choose
from foldcore.kernels.launch import Launch
from tests import gluon_interpreter, kernel_checks, test_kernels_attention
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from tests.test_kernels_attention import Case
from torchfold import _attention, _triton

KIND = {"width": 32, "dtype": torch.bfloat16, "scale": 32**-0.5}
CASES = [
    (Case(5, 128, heads=2, batch=2, **KIND), Steps(64, 32, 2, 4)),
    (Case(3, 128, heads=1, axis=1, **KIND), Steps(128, 64, 3, 8)),
    (Case(4, 64, heads=2, **KIND), Steps(64, 16, 1, 4)),
]


def inputs(case: Case, masked: float) -> tuple[Problem, list[Tensor]]:
    """What both kernels take; keys that are masked are so many times as large as the others."""
    projected, gate_bias, mask, bias, grad = test_kernels_attention.arrays(case, seed=0)
    assert bias is not None
    projected[..., 2, :, :] *= torch.where(mask > 0, 1.0, masked)[..., None, None].bfloat16()
    sizes = Problem(tuple(projected.shape), case.axis, case.scale, "bfloat16", True, 0)
    given = projected, gate_bias, mask, bias
    output, logarithm = _triton.call(attention.forward(sizes, choose("forward", sizes)), *given)
    outer = attention_bias.output_grad(sizes)
    before, delta, _, gathered = _triton.call(outer, projected, gate_bias, output, grad)
    before[..., 0, :, :] = grad  # stands for the gradient of queries
    return sizes, [projected, mask, bias, logarithm, delta, gathered, before]


def run(
    case: Case, steps: Steps, machine: type[Machine] = Machine, masked: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What the kernel makes of the gradients, what the one in Triton does, and what both take."""
    sizes, given = inputs(case, masked)
    launch = attention_key_value_pipelined.key_value_grad(sizes, steps)
    (found,) = gluon_interpreter.run(launch, *given, machine=machine)
    tiles = Tiles(32, 32, 1, 4, 1, held=True)
    others = [*given[:-1], given[-1].clone()]
    (expected,) = _triton.call(attention_long.key_value_grad(sizes, tiles), *others)
    return found, expected, given


@pytest.mark.parametrize(("case", "steps"), CASES, ids=str)
@pytest.mark.parametrize("masked", [1.0, 300.0])
def test_results_are_those_of_the_kernel_in_triton(case: Case, steps: Steps, masked: float) -> None:
    found, expected, (_, mask, *_, before) = run(case, steps, masked=masked)
    assert torch.equal(found[..., :2, :, :], before[..., :2, :, :])
    empty = (mask == 0).all(case.axis, keepdim=True).expand_as(mask)
    for part in (2, 3):
        ours, theirs = found[..., part, :, :], expected[..., part, :, :]
        assert kernel_checks.relative_error(ours, theirs) < 3e-3
        assert (ours[(mask == 0) & ~empty] == 0).all()
    assert (found[..., 2, :, :][empty] == 0).all()
    values = found[..., 3, :, :][empty]
    assert kernel_checks.relative_error(values, expected[..., 3, :, :][empty]) < 3e-3
    assert (values != 0).any()


@pytest.mark.parametrize(("case", "steps"), CASES[:2], ids=str)
@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_are_found(case: Case, steps: Steps, machine: type[Machine]) -> None:
    with pytest.raises(Hazard):
        run(case, steps, machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []
    ours = attention_key_value_pipelined.attention_key_value_pipelined_kernel

    def call(launch: Launch, *given: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if launch.kernel is ours:
            return tuple(gluon_interpreter.run(launch, *given))
        return _triton.call(launch, *given)

    monkeypatch.setattr(_attention, "call", call)
    monkeypatch.setattr(attention_key_value_pipelined, "ARCHITECTURE", 0)
    monkeypatch.setattr(attention_key_value_pipelined, "SIZES", {64: Steps(64, 32, 2, 4)})
    monkeypatch.setattr(attention_tiles, "_INTERPRETED", Tiles(32, 16, 1, 4, 1, held=True))
    monkeypatch.setattr(attention_tiles.Problem, "together", True)
    return names


def test_it_runs_where_its_sizes_fit(launched: list[str]) -> None:
    test_kernels_attention.check(Case(3, 64, heads=1, **KIND))
    assert launched[-1] == "attention_key_value_pipelined_kernel"
    assert "key_value_grad_kernel" not in launched
    for other in (
        Case(3, 48, heads=1, **KIND),
        Case(3, 64, heads=1, **{**KIND, "width": 16}),
        Case(3, 64, heads=1, **{**KIND, "scale": 0.3}),
        Case(3, 64, heads=1, **{**KIND, "dtype": torch.float32}),
    ):
        launched.clear()
        test_kernels_attention.check(other)
        assert launched[-1] == "key_value_grad_kernel"


@pytest.mark.parametrize(("rows", "fits"), [(8191, True), (8192, False)])
def test_places_within_an_example_have_32_bits(rows: int, fits: bool) -> None:
    shape = 2, rows, 256, 4, 8, 32
    problem = Problem(shape, 2, 32**-0.5, "bfloat16", has_bias=True, architecture=90)
    assert attention_key_value_pipelined.fits(problem) == fits
