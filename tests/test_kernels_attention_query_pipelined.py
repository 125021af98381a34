"""Gradients of queries and bias with products and copies ordered by hand, and what is too early."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import attention, attention_bias, attention_query_pipelined
from foldcore.kernels.attention_tiles import Problem, Tiles, choose
from foldcore.kernels.launch import Launch
from tests import gluon_interpreter, kernel_checks, test_kernels_attention
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from tests.test_kernels_attention import Case
from torchfold import _attention, _triton

KIND = {"width": 32, "dtype": torch.bfloat16, "scale": 32**-0.5}
# queries of a program, programs at once
CASES = [
    (Case(5, 192, heads=2, batch=2, **KIND), 64, 24),
    (Case(17, 192, heads=1, **KIND), 64, 1),
    (Case(3, 256, heads=1, axis=1, **KIND), 128, 4),
]
TILES = Tiles(64, 64, 1, 4, 1, held=True)


def given(case: Case) -> tuple[Problem, list[Tensor]]:
    """What the kernel gets: from the passes before it, by kernels in Triton."""
    projected, gate_bias, mask, bias, grad = test_kernels_attention.arrays(case, seed=0)
    assert bias is not None
    problem = Problem(tuple(projected.shape), case.axis, case.scale, "bfloat16", True, 0)
    launch = attention.forward(problem, choose("forward", problem))
    output, logsumexp = _triton.call(launch, projected, gate_bias, mask, bias)
    launch = attention_bias.output_grad(problem)
    gate_grad, delta, _, gathered = _triton.call(launch, projected, gate_bias, output, grad)
    return problem, [projected, mask, bias, logsumexp, delta, gathered, gate_grad]


@pytest.mark.parametrize(("case", "rows", "together"), CASES, ids=str)
def test_results_are_those_of_the_kernel_in_triton(case: Case, rows: int, together: int) -> None:
    problem, arrays = given(case)
    launch = attention_query_pipelined.query_bias_grad(problem, rows, together)
    found, parts = gluon_interpreter.run(launch, *arrays)
    rest = found[..., 1:, :, :], arrays[-1][..., 1:, :, :].clone()
    assert torch.equal(*(x.nan_to_num(7.0) for x in rest))  # it leaves what is not its own
    expected, expected_parts = _triton.call(attention_bias.query_bias_grad(problem, TILES), *arrays)
    assert kernel_checks.relative_error(found[..., 0, :, :], expected[..., 0, :, :]) < 5e-3
    # that kernel rounds the scale
    assert kernel_checks.relative_error(parts.sum(0), expected_parts.sum(0)) < 3e-3
    empty = case.groups - 1  # without any key
    assert not found[..., 0, :, :].select(3 - case.axis, empty).any()


@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_are_found(machine: type[Machine]) -> None:
    case, rows, together = CASES[0]
    problem, arrays = given(case)
    launch = attention_query_pipelined.query_bias_grad(problem, rows, together)
    with pytest.raises(Hazard):
        gluon_interpreter.run(launch, *arrays, machine=machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if launch.kernel is attention_query_pipelined.query_bias_grad_pipelined_kernel:
            return tuple(gluon_interpreter.run(launch, *inputs))
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_attention, "call", call)
    monkeypatch.setattr(Problem, "together", property(lambda problem: problem.has_bias))
    monkeypatch.setattr(attention_query_pipelined, "ARCHITECTURE", 0)
    monkeypatch.setattr(attention_query_pipelined, "LENGTH", 192)
    return names


def test_it_runs_where_its_sizes_fit(launched: list[str]) -> None:
    test_kernels_attention.check(Case(3, 192, heads=1, **KIND))
    assert "query_bias_grad_pipelined_kernel" in launched
    for other in (
        Case(2, 128, heads=1, **KIND),
        Case(2, 192, heads=1, biased=False, **KIND),
        Case(2, 192, heads=1, **{**KIND, "width": 16}),
        Case(2, 192, heads=1, **{**KIND, "dtype": torch.float32}),
    ):
        launched.clear()
        test_kernels_attention.check(other)
        assert ("query_bias_grad_kernel" in launched) == other.biased
        assert "query_bias_grad_pipelined_kernel" not in launched


@pytest.mark.parametrize(("rows", "fits"), [(8191, True), (8192, False)])
def test_places_within_an_example_have_32_bits(rows: int, fits: bool) -> None:
    shape = 2, rows, 256, 4, 8, 32
    problem = Problem(shape, 2, 0.2, "bfloat16", has_bias=True, architecture=90)
    assert attention_query_pipelined.fits(problem) == fits
