"""Triangle multiplication by kernels: the output and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foldcore.kernels import triangle, triangle_fold
from tests import kernel_checks
from tests.kernel_checks import DEVICE, normal
from torchfold import _triangle, _triton, ops

CONSTANT = ("pair_mask", "factor")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_checks.poison(monkeypatch)


@dataclass(frozen=True)
class Case:
    """Sizes of a triangle multiplication, and which kind."""

    residues: int
    c: int = 16
    h: int = 16
    batch: int = 1
    outgoing: bool = True
    dropout: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32


def arrays(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.residues + case.h)
    b, n, c, h = case.batch, case.residues, case.c, case.h
    shapes = {"norm": (c,), "center": (h,), "output": (h, c), "gating": (c, c)}
    named: dict[str, Tensor] = {
        "pair": normal(generator, b, n, n, c) * 2 + 1,
        "pair_mask": (torch.rand(b, n, n, generator=generator) > 0.2).float(),
        "seed": normal(generator, b, n, n, c),
    }
    named["pair_mask"][:, n // 2, : n // 2] = 0
    named["pair_mask"][:, 0, 0] = 1
    if case.dropout:
        named["factor"] = (torch.rand(b, 1, n, c, generator=generator) > 0.25) / 0.75
    for name in ops.TriangleParameters._fields:
        part, _, kind = name.rpartition("_")
        if kind in ("scale", "offset"):
            named[name] = normal(generator, *shapes[part])
        elif kind == "bias":
            named[name] = normal(generator, shapes.get(part, (c, h))[-1])
        else:
            shape = shapes.get(name, (c, h))
            named[name] = normal(generator, *shape, scale=shape[0] ** -0.5)
    return named


def check(case: Case) -> None:
    def run(implementation: str, **given: Tensor) -> Tensor:
        return ops.triangle_multiplication(
            given["pair"],
            given["pair_mask"],
            given.get("factor"),
            *(given[name] for name in ops.TriangleParameters._fields),
            outgoing=case.outgoing,
            residual=case.residual,
            implementation=implementation,
        )

    kernel_checks.check(run, arrays(case), case.dtype, CONSTANT, ops.TriangleParameters._fields)


@pytest.mark.parametrize("residues", [1, 7, 37])
@pytest.mark.parametrize("outgoing", [True, False])
def test_any_size(residues: int, outgoing: bool) -> None:
    check(Case(residues, outgoing=outgoing, residual=not outgoing, dropout=outgoing))


@pytest.mark.parametrize(
    "case",
    [
        Case(9, c=32, h=16, batch=2, dropout=True, residual=True),
        Case(9, c=24, h=40, batch=2, outgoing=False, dropout=True),
        Case(6, c=8, h=4),
        # tiles without edges, several for each program
        Case(16, c=32, h=16, batch=2, outgoing=False, dropout=True),
    ],
    ids=str,
)
def test_any_kind(case: Case) -> None:
    check(case)


# one pass in float32 loses what the mean's square has more digits than the variance: 900 times
# some roundings of 6e-8, still less than one of bfloat16
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-3)])
def test_standard_deviations_far_from_zero(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(9, c=16, h=40)
    given = {name: x.to(DEVICE, dtype) for name, x in arrays(case).items()}
    parameters = [given[name] for name in ops.TriangleParameters._fields]
    pair = normal(torch.Generator().manual_seed(0), 81, case.c).to(DEVICE, dtype) + 30
    product = normal(torch.Generator().manual_seed(1), case.h, 81).to(DEVICE, dtype) - 30
    kind = _triton.dtype_name(pair), _triton.architecture(pair.device)
    folded = _triton.call(triangle_fold.forward(1, case.c, case.h, kind[0]), *parameters)
    (rstd,) = _triton.call(triangle_fold.rstd(1, 81, case.c, kind[0]), pair)
    launch = triangle.output(1, (9, 9), case.c, case.h, *kind, has_factor=False, residual=False)
    _, mean, center_rstd = _triton.call(launch, product, pair, rstd, rstd, *folded)
    torch.testing.assert_close(mean[0].double(), product.double().mean(0), rtol=2e-6, atol=0)
    for found, rows in ((rstd, pair.double()), (center_rstd, product.double().T)):
        exact = (rows.var(-1, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(found[0].double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_folded_as_each_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [arrays(Case(1, c=24, h=40))[name] for name in ops.TriangleParameters._fields]
    layers = [[normal(generator, *x.shape).to(DEVICE, dtype) for x in given] for _ in range(3)]

    def folded(parameters: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in parameters]
        found = _triangle.fold(leaves)
        return [*found, *torch.autograd.grad(found, leaves, seeds)]

    shapes = (24, 184), (184,), (40, 24), (24,)
    kinds = dtype, torch.float32, dtype, torch.float32
    seeds = [
        normal(generator, 3, *shape).to(DEVICE, kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    together = folded([torch.stack(x) for x in zip(*layers, strict=True)], seeds)
    for i, parameters in enumerate(layers):
        alone = folded(parameters, [x[i] for x in seeds])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=0, atol=0)


@pytest.mark.parametrize("outgoing", [True, False])
def test_bfloat16(outgoing: bool) -> None:
    check(Case(16, c=32, h=32, outgoing=outgoing, residual=True, dtype=torch.bfloat16))
