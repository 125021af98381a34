"""Attention to templates by kernels: the output and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from tests.test_kernels_rows import poisoned  # noqa: F401, a fixture
from torchfold import ops


@dataclass(frozen=True)
class Case:
    """Examples and pairs, templates, heads and width; of the first example none may be real."""

    pairs: tuple[int, int, int]
    templates: int = 4
    heads: int = 2
    width: int = 8
    empty: bool = False
    dtype: torch.dtype = torch.float32


def arrays(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.templates + case.width)
    b, i, j = case.pairs
    by_head = case.heads, case.width
    mask = (torch.rand(b, case.templates, generator=generator) > 0.4).float()
    mask[:, -2:] = 1
    if case.empty:
        mask[0] = 0
    return {
        "query": normal(generator, b, i, j, *by_head),
        "projected": normal(generator, b, case.templates, i, j, 2, *by_head),
        "mask": mask,
        "seed": normal(generator, b, i, j, *by_head),
    }


def check(case: Case) -> None:
    def run(implementation: str, **given: Tensor) -> Tensor:
        return ops.template_attention(**given, scale=0.4, implementation=implementation)

    # one template has all the weight, whatever the query is
    constant = ("mask",) if case.templates > 1 else ("mask", "query")
    kernel_checks.check(run, arrays(case), case.dtype, constant)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1)),
        Case((2, 3, 7), templates=1),
        Case((2, 3, 7), templates=5, empty=True),
        Case((1, 1, 37), heads=3, width=6),
        Case((1, 3, 43), templates=2, heads=1, width=1),
        Case((2, 8, 8), heads=4, width=16),
        Case((3, 4, 4), templates=3, heads=2, width=64, empty=True),
    ],
    ids=str,
)
def test_any_size(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("heads", "width"), [(4, 16), (8, 64)])
def test_bfloat16(heads: int, width: int) -> None:
    """Wide heads show whether the gradient is of the rounded result."""
    check(Case((2, 8, 8), 2, heads, width, empty=width == 16, dtype=torch.bfloat16))


def test_templates_that_are_none_are_all_alike() -> None:
    given = arrays(Case((1, 2, 3), empty=True))
    del given["seed"]
    given = {name: x.to(kernel_checks.DEVICE) for name, x in given.items()}
    found = ops.template_attention(**given, implementation="triton")
    torch.testing.assert_close(found, given["projected"][..., 1, :, :].mean(1))


@pytest.mark.parametrize(
    ("templates", "dtype", "why"),
    [(0, torch.float32, "there is no template"), (2, torch.float64, "the kernel computes in")],
)
def test_what_is_refused_is_named(templates: int, dtype: torch.dtype, why: str) -> None:
    given = {k: x[:, :templates] if k != "query" else x for k, x in arrays(Case((1, 2, 2))).items()}
    del given["seed"]
    with pytest.raises(ops.UnsupportedOp, match=rf"template_attention\(.*{why}"):
        ops.template_attention(
            **{k: x.to(dtype) for k, x in given.items()}, implementation="triton"
        )
