"""The attention kernels against the reference in float64: outputs and every gradient.

Without a GPU they run in Triton's interpreter. Output buffers are poisoned before each launch, so
that an element left unwritten shows.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

from foldcore.kernels import attention, attention_bias, attention_long, attention_tiles, cases
from jaxfold import _attention, _rows
from jaxfold import ops as jax_ops
from tests import kernel_checks, triton_interpreter
from torchfold import _attention as _torch_attention
from torchfold import _self_test, ops

PARTS = ("query", "gate", "key", "value")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error of the norm. float32: rounding in sums of a few hundred. bfloat16: inputs, weights
# and the scores' gradients carry 8 bits, 0.2 % each.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Which attention: groups and length, and what goes with it."""

    groups: int
    length: int
    heads: int = 2
    width: int = 16
    batch: int = 1
    axis: int = 2
    biased: bool = True
    dtype: torch.dtype = torch.float32
    scale: float = 0.4


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_checks.poison(monkeypatch)


def arrays(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Projections, gate's bias, mask, bias, and what the output's gradient shall be."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, case.dtype)

    table = (case.groups, case.length) if case.axis == 2 else (case.length, case.groups)
    projected = normal(case.batch, *table, 4, case.heads, case.width)
    gate_bias = normal(case.heads, case.width)
    mask = (torch.rand(case.batch, *table, generator=generator) > 0.3).float()
    mask.select(3 - case.axis, case.groups - 1)[:] = 0  # a group without any key
    mask.select(case.axis, case.length // 2)[:] = 0  # a key that no group has
    bias = normal(case.batch, case.heads, case.length, case.length) * 2 if case.biased else None
    grad = normal(case.batch, *table, case.heads, case.width)
    return projected, gate_bias, mask.to(DEVICE), bias, grad


def run(case: Case, implementation: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The output and all gradients."""
    projected, gate_bias, mask, bias, grad = arrays(case, seed)
    projected, gate_bias = (x.to(dtype).requires_grad_() for x in (projected, gate_bias))
    bias = None if bias is None else bias.to(dtype).requires_grad_()
    options = {"axis": case.axis, "scale": case.scale, "implementation": implementation}
    output = ops.gated_attention(projected, gate_bias, mask, bias, **options)
    output.backward(grad.to(dtype))
    assert projected.grad is not None
    results = {"output": output.detach(), "gate bias": gate_bias.grad}
    results |= dict(zip(PARTS, projected.grad.unbind(3), strict=True))
    return results if bias is None else results | {"bias": bias.grad}


def check(case: Case) -> None:
    found = run(case, "triton", case.dtype)
    for name, expected in run(case, "reference", torch.float64).items():
        difference = torch.linalg.norm(found[name].double() - expected)
        # without a choice of keys some gradients are zero, and what is found is rounding
        signal = torch.clamp(torch.linalg.norm(expected), min=1e-2)
        error = float(difference / signal)
        assert error < TOLERANCE[case.dtype], f"{name}: {error:.1e}"


LENGTHS = (1, 7, 37, 129, 257, 384)


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length: int) -> None:
    check(Case(groups=3 if length < 100 else 2, length=length, heads=1))


@pytest.mark.parametrize(
    "case",
    [
        Case(groups=5, length=32, width=32, batch=2),
        Case(groups=3, length=20, width=8, heads=3),
        Case(groups=3, length=20, width=24),
        Case(groups=3, length=20, axis=1, batch=2),
        Case(groups=3, length=32, axis=1, biased=False),
        Case(groups=2, length=17, biased=False),
    ],
    ids=str,
)
def test_any_kind(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(groups=3, length=40, width=32, dtype=torch.bfloat16),
        Case(groups=2, length=64, width=8, axis=1, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_bfloat16(case: Case) -> None:
    check(case)


@pytest.mark.skipif(DEVICE == "cuda", reason="these are sizes of the interpreter")
@pytest.mark.parametrize(
    "case",
    [
        Case(groups=5, length=40, batch=2),
        Case(groups=3, length=64, width=8, axis=1),
        Case(groups=3, length=64, width=8, dtype=torch.bfloat16, scale=8**-0.5),
        Case(groups=3, length=140, heads=1, dtype=torch.bfloat16),
        Case(groups=3, length=40, biased=False),
    ],
    ids=str,
)
def test_bias_held_on_chip(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = attention_tiles.Tiles(32, 256, 2, 4, 1, held=True)
    monkeypatch.setattr(attention_tiles, "_INTERPRETED", sizes)
    launches = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda p: launches.append(forward(p)) or launches[-1])
    check(case)
    assert launches[0].constants["HELD"] == case.biased


@pytest.mark.skipif(DEVICE == "cuda", reason="these are sizes of the interpreter")
@pytest.mark.parametrize(
    "case",
    [
        Case(groups=3, length=40, batch=2),
        Case(groups=3, length=64, width=8, axis=1),
        Case(groups=2, length=70, width=32, dtype=torch.bfloat16, scale=32**-0.5),
        Case(groups=3, length=40, biased=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("held", [True, False])
def test_gradients_in_two_kernels(case: Case, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = attention_tiles.Tiles(32, 32, 2, 4, 1, held=held)
    monkeypatch.setattr(attention_tiles, "_INTERPRETED", sizes)
    monkeypatch.setattr(attention_tiles.Problem, "whole", False)
    launches = []
    launch = attention_long.key_value_grad
    noted = lambda p: launches.append(launch(p)) or launches[-1]  # noqa: E731
    monkeypatch.setattr(attention_long, "key_value_grad", noted)
    check(case)
    assert launches[0].constants["IDENTITY"] == (held and case.biased)


@pytest.mark.skipif(DEVICE == "cuda", reason="these are sizes of the interpreter")
@pytest.mark.parametrize("programs", [1, 100])
@pytest.mark.parametrize(
    "case",
    [
        Case(groups=5, length=64, batch=2),
        Case(groups=3, length=64, width=8, axis=1),
        Case(groups=3, length=64, width=32, dtype=torch.bfloat16, scale=32**-0.5),
        Case(groups=3, length=50),
    ],
    ids=str,
)
def test_gradients_of_queries_and_bias_together(
    case: Case, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = attention_tiles.Tiles(32, 16, 1, 4, 1, held=True)
    monkeypatch.setattr(attention_tiles, "_INTERPRETED", sizes)
    monkeypatch.setattr(attention_tiles.Problem, "together", True)
    monkeypatch.setattr(attention_bias, "TOGETHER", programs)
    launches = []
    launch = attention_bias.query_bias_grad
    noted = lambda p: launches.append(launch(p)) or launches[-1]  # noqa: E731
    monkeypatch.setattr(attention_bias, "query_bias_grad", noted)
    check(case)
    assert launches[0].grid[1] == 1 if programs == 1 else launches[0].grid[1] > 1


@pytest.mark.parametrize(
    ("changed", "together"),
    [
        ({}, True),
        ({"length": 192}, True),
        ({"length": 250}, False),
        ({"length": 384}, False),
        ({"dtype": "float32"}, False),
        ({"has_bias": False}, False),
        ({"scale": 0.3}, False),
        ({"width": 64}, False),
        ({"architecture": 80}, False),
    ],
    ids=str,
)
def test_they_are_together_where_that_was_measured(changed: dict, together: bool) -> None:
    given = {"length": 256, "width": 32, "scale": 32**-0.5, "dtype": "bfloat16", "has_bias": True}
    given |= {"architecture": 90} | changed
    shape = (1, 4, given.pop("length"), 4, 2, given.pop("width"))
    assert attention_tiles.Problem(shape, axis=2, **given).together == together


@pytest.mark.parametrize(
    ("width", "dtype", "held"),
    [
        (8, "bfloat16", True),
        (16, "bfloat16", True),
        (16, "float32", False),
        (12, "bfloat16", False),
    ],
)
def test_bias_is_held_where_no_precision_is_lost(width: int, dtype: str, held: bool) -> None:
    shape = (1, 4, 256, 4, 2, width)
    problem = attention_tiles.Problem(shape, 2, width**-0.5, dtype, True, architecture=90)
    assert attention.forward(problem).constants["HELD"] == held


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu_kernels.py runs both tracks")
@pytest.mark.parametrize(
    "case", [Case(2, 20), Case(2, 260, heads=1, axis=1, biased=False)], ids=str
)
def test_jax_wires_the_kernels_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_attention, _rows):
        monkeypatch.setattr(module, "call", triton_interpreter.jax_call)
        monkeypatch.setattr(module, "architecture", lambda: 0)
    given = (None if x is None else jnp.asarray(x) for x in arrays(case, seed=0))
    projected, gate_bias, mask, bias, grad = given
    options = {"axis": case.axis, "scale": case.scale, "implementation": "triton"}

    def loss(projected: jax.Array, gate_bias: jax.Array, bias: jax.Array | None) -> Any:
        output = jax_ops.gated_attention(projected, gate_bias, mask, bias, **options)
        return jnp.sum(output * grad), output

    gradients, output = jax.grad(loss, (0, 1, 2), has_aux=True)(projected, gate_bias, bias)
    found = {"output": output, "gate bias": gradients[1]}
    found |= {name: gradients[0][:, :, :, i] for i, name in enumerate(PARTS)}
    found |= {} if bias is None else {"bias": gradients[2]}
    expected = run(case, "triton", case.dtype)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_torch_operator_is_declared_as_it_behaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the poison changes what the checks compare
    given = arrays(Case(2, 18, heads=1), seed=0)
    projected, gate_bias, mask, bias = (
        x if x is given[2] else x.requires_grad_() for x in given[:4]
    )
    arguments = (projected, gate_bias, mask, bias, 2, 0.4)
    torch.library.opcheck(_torch_attention._forward, arguments)


def test_a_wrong_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = attention_tiles.Problem.constants
    shapes = {"projected": (1, 2, 20, 4, 1, 16), "gate_bias": (1, 16), "mask": (1, 2, 20)}
    case = cases.Case("gated_attention", shapes, {"scale": 0.2})
    monkeypatch.setattr(_self_test, "EVERY", (case,))
    ops.self_test()
    monkeypatch.setattr(
        attention_tiles.Problem, "constants", lambda self: constants(self) | {"SCALE": 0.25}
    )
    with pytest.raises(cases.WrongKernel, match="gated_attention are wrong on this device"):
        ops.self_test()


def test_what_kernels_cannot_do_is_refused() -> None:
    projected, gate_bias, mask = (
        torch.ones(shape, dtype=torch.float64)
        for shape in ((1, 2, 3, 4, 1, 16), (1, 16), (1, 2, 3))
    )
    with pytest.raises(ops.UnsupportedOp, match=r"gated_attention\(torch.float64\[1, 2, 3, 4"):
        ops.gated_attention(projected, gate_bias, mask, implementation="triton")
