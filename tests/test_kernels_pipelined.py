"""The transition with products and copies ordered by hand: results, and what is too early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

from foldcore.kernels import transition_pipelined, transition_pipelined_backward
from foldcore.kernels.launch import Launch
from foldcore.kernels.transition_pipelined import Steps
from jaxfold import _rows as jax_rows
from tests import gluon_interpreter, kernel_checks, test_kernels_rows
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from torchfold import _rows, _triton, ops

N, C, F = 128, 32, 256
STEPS = [Steps(128, 64, 4, 2), Steps(192, 64, 4, 3)]
IN_ORDER = {"transition_pipelined_kernel", "transition_pipelined_backward_kernel"}
LAYERS = {"transition_forward_kernel", "transition_second_kernel"}
BY_TRITON = {"transition_mask_kernel", "transition_norm_backward_kernel"}


def arrays(n: int = N) -> dict[str, Tensor]:
    """Some hidden channels are exactly zero, or just above it."""
    found = test_kernels_rows.transition_arrays((n, C), F, seed=0)
    found["weights1"][:, ::5] = 0
    found["bias1"][::5] = torch.tensor([0.0, -0.0, 1e-30]).repeat(18)[:52]
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


def test_signs_tell_what_is_above_zero() -> None:
    _, hidden, signs = run(STEPS[0], True, save=True)
    words = signs.long().view(2 * N // 16, F // 64, 8, 4) & 0xFFFFFFFF
    half, group, side = torch.arange(2)[:, None, None], torch.arange(8)[:, None], torch.arange(2)
    bits = words[..., None, None, None] >> (8 * half + group + 16 * side) & 1
    # [rows / 16, steps, row, columns, half, group, side] -> rows by columns
    found = bits.permute(0, 4, 2, 1, 5, 3, 6).reshape(2 * N, F)
    assert torch.equal(found.bool(), hidden > 0)
    assert 0.2 < found.float().mean() < 0.8 and (hidden[:, ::5] == 0).any()


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_are_found(steps: Steps, machine: type[Machine]) -> None:
    with pytest.raises(Hazard):
        run(steps, residual=True, save=False, machine=machine)


# Backward -----------------------------------------------------------------------------------------


def take_few_channels(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """With so many places for the gradients of hidden channels."""
    monkeypatch.setitem(transition_pipelined.SIZES, C, STEPS[0])
    monkeypatch.setitem(transition_pipelined_backward.PLACES, C, places)


@pytest.fixture(params=[1, 2])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    take_few_channels(monkeypatch, request.param)


def run_backward(
    residual: bool, machine: type[Machine] = Machine
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """What the kernel gives, of which arrays and which hidden layer."""
    given = arrays(2 * N)
    _, hidden, signs = run(STEPS[0], residual, save=True)
    launch = transition_pipelined_backward.backward(2 * N, C, F, residual)
    names = "x", "scale", "offset", "weights1", "weights2"
    inputs = *(given[name] for name in names), signs, given["seed"]
    return gluon_interpreter.run(launch, *inputs, machine=machine), given, hidden


@pytest.mark.parametrize("residual", [False, True])
def test_backward_results(sizes: None, residual: bool) -> None:
    (dx, *rows, hidden_sums, sums), given, hidden = run_backward(residual)
    names = "x", "scale", "offset", "weights1", "weights2", "seed"
    x, scale, offset, weights1, weights2, dy = (given[name].double() for name in names)
    for array in (x, scale, offset):
        array.requires_grad_()
    normalized = ops.layer_norm(x, scale, offset, implementation="reference")
    dhidden = (dy @ weights2.T).where(hidden > 0, 0.0)
    normalized.backward(dhidden @ weights1.T)
    bias2, *norm = sums.sum(0).split(C)
    found = dx, *rows, hidden_sums.sum(0), bias2, *norm
    expected = x.grad + dy * residual, dhidden, normalized, dhidden.sum(0), dy.sum(0)
    for one, other in zip(found, (*expected, scale.grad, offset.grad), strict=True):
        assert kernel_checks.relative_error(one, other.detach()) < 5e-3


@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_backward_are_found(sizes: None, machine: type[Machine]) -> None:
    with pytest.raises(Hazard):
        run_backward(residual=True, machine=machine)


# Which kernels run --------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    take_few_channels(monkeypatch, places=2)
    names: list[str] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if names[-1] in IN_ORDER:
            return tuple(gluon_interpreter.run(launch, *inputs))
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_rows, "call", call)
    monkeypatch.setattr(transition_pipelined, "ARCHITECTURE", 0)
    return names


def test_they_run_where_their_sizes_fit(launched: list[str]) -> None:
    test_kernels_rows.check_transition(arrays(), True, torch.bfloat16)
    assert set(launched) >= IN_ORDER
    assert not set(launched) & (LAYERS | BY_TRITON)
    launched.clear()
    test_kernels_rows.check_transition(arrays(33), True, torch.bfloat16)
    assert set(launched) >= LAYERS | BY_TRITON
    assert not set(launched) & IN_ORDER


@pytest.mark.parametrize("n", [N, 1])  # tiles are full, or not
def test_torch_operators_are_declared_as_they_behave(launched: list[str], n: int) -> None:
    """Shapes that are not known while a program is compiled among them."""
    given = arrays(n)
    seed = given.pop("seed")
    leaves = [x.clone().requires_grad_() for x in given.values()]
    checks = "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(_rows._transition_saving, (*leaves, True), test_utils=checks)
    _, *saved = _rows._transition_saving(*given.values(), True)
    x, scale, offset, weights1, _, weights2, _ = given.values()
    arguments = x, seed, scale, offset, weights1, weights2, *saved, True
    torch.library.opcheck(_rows._transition_backward, arguments, test_utils=checks[0])


def test_jax_runs_them_with_the_same_results(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(launch: Launch, *inputs: jax.Array) -> list[jax.Array]:
        return [as_jax(x) for x in _rows.call(launch, *map(as_torch, inputs))]

    monkeypatch.setattr(jax_rows, "call", call)
    monkeypatch.setattr(jax_rows, "architecture", lambda: 0)
    given = arrays()
    seed = given.pop("seed")
    leaves = [x.clone().requires_grad_() for x in given.values()]
    expected = torch.autograd.grad(_rows.transition(*leaves, True), leaves, seed)
    _, backward = jax.vjp(lambda *x: jax_rows.transition(*x, True), *map(as_jax, given.values()))
    launched.clear()
    for one, other in zip(backward(as_jax(seed)), expected, strict=True):
        assert kernel_checks.relative_error(as_torch(one), other) < 5e-3
    assert launched[0] == "transition_pipelined_backward_kernel"


def as_torch(x: jax.Array) -> Tensor:
    if x.dtype == jnp.bfloat16:
        return torch.tensor(np.asarray(x, np.float32)).bfloat16()
    return torch.tensor(np.asarray(x))


def as_jax(x: Tensor) -> jax.Array:
    if x.dtype == torch.bfloat16:
        return jnp.asarray(x.detach().float().numpy(), jnp.bfloat16)
    return jnp.asarray(x.detach().numpy())
