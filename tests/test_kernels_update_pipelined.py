"""Projections as updates, ordered by hand: results, what is too early, where they run."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import linear_update_pipelined, turns
from foldcore.kernels.launch import Launch
from foldcore.kernels.linear_update_pipelined import Steps
from tests import gluon_interpreter, kernel_checks, test_kernels_update
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from tests.test_kernels_update import Case
from torchfold import _linear_update, _triton, ops

KERNEL = "linear_update_pipelined_kernel"
C = 16
# tiles of one i, or rectangles; a program has several, of the first not all as many, and the
# channels are in parts there
STEPS = [
    Steps(16, 8, 4, ahead=1, programs=8),
    Steps(32, 16, 4, ahead=2, programs=1, side=8),
    Steps(16, 16, 4, ahead=3, programs=1, side=4),
]
# so that a table taken for its transpose, or an axis for the other, is seen
TABLE = 2, 24, 32
FORMS = [
    (0, False, False),
    (0, True, True),
    (1, True, False),
    (2, True, False),
    (1, False, True),
    (2, True, True),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with few processors."""
    monkeypatch.setattr(turns, "MULTIPROCESSORS", 5)


def run(
    steps: Steps, form: tuple[int, bool, bool], machine: type[Machine] = Machine
) -> tuple[Tensor, Tensor]:
    """What the kernel makes of an update, and what it is."""
    shared, residual, transposed = form
    case = Case(TABLE, C, C, shared, transposed=transposed)
    given = {name: x.bfloat16() for name, x in test_kernels_update.arrays(case).items()}
    del given["seed"]
    launch = linear_update_pipelined.forward(TABLE, C, shared, transposed, residual, steps)
    names = ("y", "weights", "bias", "x", "factor" if shared else "bias")
    (found,) = gluon_interpreter.run(launch, *(given[name] for name in names), machine=machine)
    options = {"residual": residual, "transposed": transposed, "implementation": "reference"}
    exact = ops.linear_update(**{name: x.double() for name, x in given.items()}, **options)
    return found, exact.view(found.shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_results(steps: Steps, form: tuple[int, bool, bool]) -> None:
    found, exact = run(steps, form)
    assert kernel_checks.relative_error(found, exact) < 2**-8
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("machine", [Hasty, Impatient])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_too_short_waits_are_found(steps: Steps, machine: type[Machine]) -> None:
    with pytest.raises(Hazard):
        run(steps, (1, True, False), machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []

    def call(launch: Launch, *given: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if names[-1] == KERNEL:
            return tuple(gluon_interpreter.run(launch, *given))
        return _triton.call(launch, *given)

    monkeypatch.setattr(_linear_update, "call", call)
    monkeypatch.setattr(linear_update_pipelined, "ARCHITECTURE", 0)
    for transposed, steps in enumerate(STEPS[:2]):
        monkeypatch.setitem(linear_update_pipelined.SIZES, (C, bool(transposed)), steps)
    return names


BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_it_runs_where_its_sizes_fit(launched: list[str], shared: int, transposed: bool) -> None:
    case = Case((2, 8, 16), C, C, shared, transposed=transposed, **BFLOAT16)
    test_kernels_update.check(case)
    assert set(launched) >= {KERNEL, "linear_update_backward_kernel"}
    assert "linear_update_forward_kernel" not in launched


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 8, 24), C, C, **BFLOAT16),
        Case((2, 12, 16), C, C, transposed=True, **BFLOAT16),
        Case((2, 8, 18), C, C, transposed=True, **BFLOAT16),
        Case((1, 8, 16), C, 32, **BFLOAT16),
        Case((1, 8, 16), 32, C, **BFLOAT16),
        Case((1, 8, 16), 32, 32, **BFLOAT16),
        Case((1, 8, 16), C, C),
    ],
    ids=str,
)
def test_other_sizes_are_left_to_the_other(launched: list[str], case: Case) -> None:
    test_kernels_update.check(case)
    assert KERNEL not in launched and "linear_update_forward_kernel" in launched
