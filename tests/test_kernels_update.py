"""Projections as updates, by kernels: the output and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foldcore.kernels import linear_update
from tests import kernel_checks
from tests.kernel_checks import normal
from tests.test_kernels_rows import poisoned  # noqa: F401, a fixture
from torchfold import ops


@dataclass(frozen=True)
class Case:
    """Sizes of an update; ``shared`` is the axis along which dropout is the same, 0 for none."""

    rows: tuple[int, int, int]
    k: int
    c: int
    shared: int = 0
    residual: bool = True
    dtype: torch.dtype = torch.float32
    transposed: bool = False


def arrays(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.k + case.c)
    b, i, j = case.rows
    named = {
        "x": normal(generator, *case.rows, case.c),
        "y": normal(generator, *((b, j, i) if case.transposed else case.rows), case.k),
        "weights": normal(generator, case.k, case.c, scale=case.k**-0.5),
        "bias": normal(generator, case.c),
        "seed": normal(generator, *case.rows, case.c),
    }
    if case.shared:
        shape = [*case.rows, case.c]
        shape[case.shared] = 1
        named["factor"] = (torch.rand(shape, generator=generator) > 0.25) / 0.75
    return named


def check(case: Case) -> None:
    options = {"residual": case.residual, "transposed": case.transposed}

    def run(implementation: str, **given: Tensor) -> Tensor:
        return ops.linear_update(**given, **options, implementation=implementation)

    kernel_checks.check(run, arrays(case), case.dtype, constant=("factor",))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1), 16, 16),
        Case((2, 3, 37), 24, 40, shared=1),
        Case((2, 7, 5), 16, 72, shared=2, residual=False),
        Case((1, 1, 129), 37, 16, shared=2),
        Case((2, 9, 8), 64, 32, residual=False),
        Case((1, 1, 1), 16, 16, transposed=True),
        Case((2, 3, 37), 24, 40, shared=1, transposed=True),
        Case((2, 7, 5), 16, 72, shared=2, residual=False, transposed=True),
        Case((1, 37, 7), 37, 16, transposed=True),
        Case((2, 16, 24), 64, 32, shared=2, transposed=True),
    ],
    ids=str,
)
def test_any_size(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_bfloat16(shared: int, transposed: bool) -> None:
    check(Case((1, 12, 16), 32, 32, shared, dtype=torch.bfloat16, transposed=transposed))


def test_rows_of_the_wrong_table_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of square tables as well."""
    of = linear_update.Shape.of
    monkeypatch.setattr(linear_update.Shape, "of", lambda x, factor, _: of(x, factor))
    with pytest.raises(AssertionError, match="result: .*expected less than"):
        check(Case((1, 9, 9), 16, 16, shared=2, transposed=True))


def test_a_factor_of_another_shape_is_refused() -> None:
    given = arrays(Case((2, 3, 4), 16, 16))
    given.pop("seed")
    with pytest.raises(ValueError, match="factor of shape"):
        ops.linear_update(**given, factor=torch.ones(2, 1, 1, 16), implementation="triton")
