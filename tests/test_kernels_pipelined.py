"""The transition with products and copies ordered by hand: results, and what is too early."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import transition_pipelined
from foldcore.kernels.launch import Launch
from foldcore.kernels.transition_pipelined import Steps
from tests import gluon_interpreter, kernel_checks, test_kernels_rows
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from torchfold import _rows, _triton, ops

N, C, F = 32, 16, 64
STEPS = [
    Steps(16, 8, 4, 2),
    Steps(24, 8, 4, 3),
    Steps(32, 16, 4, 2),
]


def arrays(n: int = N) -> dict[str, Tensor]:
    found = test_kernels_rows.transition_arrays((n, C), F, seed=0)
    return {name: x.bfloat16() for name, x in found.items()}


def run(steps: Steps, residual: bool, save: bool, machine: type[Machine] = Machine) -> list[Tensor]:
    given = arrays(steps.rows * 2)
    del given["seed"]
    launch = transition_pipelined.forward(steps.rows * 2, C, F, residual, save, steps)
    return gluon_interpreter.run(launch, *given.values(), machine=machine)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_results(steps: Steps, residual: bool) -> None:
    given = {name: x.double() for name, x in arrays(steps.rows * 2).items() if name != "seed"}
    y = ops.transition(**given, residual=residual, implementation="reference")
    normal = ops.layer_norm(*list(given.values())[:3], implementation="reference")
    hidden = torch.relu(normal @ given["weights1"] + given["bias1"])
    found = run(steps, residual, save=True)
    assert kernel_checks.relative_error(found[0], y) < 5e-3
    assert kernel_checks.relative_error(found[1], hidden) < 5e-3
    assert torch.equal(run(steps, residual, save=False)[0], found[0])


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_are_found(steps: Steps, machine: type[Machine]) -> None:
    with pytest.raises(Hazard):
        run(steps, residual=True, save=False, machine=machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if launch.kernel is transition_pipelined.transition_pipelined_kernel:
            return tuple(gluon_interpreter.run(launch, *inputs))
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_rows, "call", call)
    monkeypatch.setattr(transition_pipelined, "ARCHITECTURE", 0)
    monkeypatch.setitem(transition_pipelined.SIZES, C, STEPS[0])
    return names


def test_it_runs_where_its_sizes_fit(launched: list[str]) -> None:
    test_kernels_rows.check_transition(arrays(), True, torch.bfloat16)
    assert set(launched) >= {"transition_pipelined_kernel", "transition_mask_kernel"}
    assert not set(launched) & {"transition_forward_kernel", "transition_second_kernel"}
    launched.clear()
    test_kernels_rows.check_transition(arrays(N + 1), True, torch.bfloat16)
    assert set(launched) >= {"transition_forward_kernel", "transition_second_kernel"}
    assert "transition_pipelined_kernel" not in launched
