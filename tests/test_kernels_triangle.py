"""Triangle multiplication by kernels: the output and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from torchfold import _triton, ops

CONSTANT = ("pair_mask", "factor")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = _triton._allocate
    monkeypatch.setattr(_triton, "_allocate", lambda *args: allocate(*args).fill_(float("nan")))


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

    kernel_checks.check(run, arrays(case), case.dtype, CONSTANT)


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


@pytest.mark.parametrize("outgoing", [True, False])
def test_bfloat16(outgoing: bool) -> None:
    check(Case(16, c=32, h=32, outgoing=outgoing, residual=True, dtype=torch.bfloat16))
