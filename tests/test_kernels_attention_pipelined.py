"""Attention with products and copies ordered by hand: results, and what is too early."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import attention, attention_pipelined
from foldcore.kernels.attention_pipelined import Steps
from foldcore.kernels.attention_tiles import Problem, choose
from foldcore.kernels.launch import Launch
from tests import gluon_interpreter, kernel_checks, test_kernels_attention
from tests.gluon_interpreter import Hasty, Hazard, Machine
from tests.test_kernels_attention import Case
from torchfold import _attention, _triton

KIND = {"width": 32, "dtype": torch.bfloat16, "scale": 32**-0.5}
CASES = [
    (Case(5, 128, heads=2, batch=2, **KIND), Steps(64, 3)),
    (Case(3, 128, heads=1, biased=False, axis=1, **KIND), Steps(128, 2)),
    (Case(17, 64, heads=1, **KIND), Steps(64, 16)),
]


def problem(case: Case, projected: Tensor) -> Problem:
    return Problem(tuple(projected.shape), case.axis, case.scale, "bfloat16", case.biased, 0)


def run(case: Case, steps: Steps, machine: type[Machine] = Machine) -> tuple[Tensor, ...]:
    """The output and the logarithms, of kernel and of the one in Triton."""
    projected, gate_bias, mask, bias, _ = test_kernels_attention.arrays(case, seed=0)
    given = projected, gate_bias, mask, mask if bias is None else bias
    sizes = problem(case, projected)
    found = gluon_interpreter.run(
        attention_pipelined.forward(sizes, steps), *given, machine=machine
    )
    return *found, *_triton.call(attention.forward(sizes, choose("forward", sizes)), *given)


@pytest.mark.parametrize(("case", "steps"), CASES, ids=str)
def test_results_are_those_of_the_kernel_in_triton(case: Case, steps: Steps) -> None:
    output, logarithm, expected, expected_logarithm = run(case, steps)
    assert kernel_checks.relative_error(output, expected) < 3e-3
    empty = expected_logarithm < -1e20  # queries without any key
    assert 0 < empty.sum() < empty.numel()
    for some in (empty, ~empty):
        error = kernel_checks.relative_error(logarithm[some], expected_logarithm[some])
        assert error < 1e-5


@pytest.mark.parametrize(("case", "steps"), CASES[:2], ids=str)
def test_too_short_waits_are_found(case: Case, steps: Steps) -> None:
    with pytest.raises(Hazard):
        run(case, steps, Hasty)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if launch.kernel is attention_pipelined.attention_pipelined_kernel:
            return tuple(gluon_interpreter.run(launch, *inputs))
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_attention, "call", call)
    monkeypatch.setattr(attention_pipelined, "ARCHITECTURE", 0)
    monkeypatch.setattr(attention_pipelined, "SIZES", {(64, True): Steps(64, 2)})
    return names


def test_it_runs_where_its_sizes_fit(launched: list[str]) -> None:
    case = Case(3, 64, heads=1, **KIND)
    test_kernels_attention.check(case)
    assert launched[0] == "attention_pipelined_kernel"
    for other in (
        Case(3, 65, heads=1, **KIND),
        Case(3, 64, heads=1, biased=False, **KIND),
        Case(3, 64, heads=1, **{**KIND, "width": 16}),
        Case(3, 64, heads=1, **{**KIND, "dtype": torch.float32}),
    ):
        launched.clear()
        test_kernels_attention.check(other)
        assert launched[0] == "forward_kernel"


@pytest.mark.parametrize(("rows", "fits"), [(8191, True), (8192, False)])
def test_places_within_an_example_have_32_bits(rows: int, fits: bool) -> None:
    shape = 2, rows, 256, 4, 8, 32
    problem = Problem(shape, 2, 0.2, "bfloat16", has_bias=True, architecture=90)
    assert attention_pipelined.fits(problem) == fits
