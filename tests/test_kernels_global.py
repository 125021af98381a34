"""Global attention and the projection before it, by kernels: results and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from tests.test_kernels_rows import poisoned  # noqa: F401, a fixture
from torchfold import ops
from torchfold.primitives import Attention, GlobalAttention


@dataclass(frozen=True)
class Case:
    """Sizes of a table, its channels, heads and their width, and how many groups have no key."""

    table: tuple[int, int, int]
    c: int = 16
    heads: int = 2
    width: int = 8
    axis: int = 1
    empty: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def groups(self) -> int:
        return self.table[3 - self.axis]

    @property
    def n(self) -> int:
        return (2 + self.heads) * self.width

    def mask(self, generator: torch.Generator) -> Tensor:
        mask = (torch.rand(self.table, generator=generator) > 0.3).float()
        of_group = mask if self.axis == 2 else mask.transpose(1, 2)
        of_group[:, : self.empty] = 0
        return mask


def attention_arrays(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.n + case.groups)
    h, d = case.heads, case.width
    return {
        "query": normal(generator, case.table[0], case.groups, h, d),
        "projected": normal(generator, *case.table, case.n),
        "gate_bias": normal(generator, h, d),
        "mask": case.mask(generator),
        "seed": normal(generator, *case.table, h, d),
    }


def mean_arrays(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.c + case.groups)
    return {
        "x": normal(generator, *case.table, case.c) + 1,
        "mask": case.mask(generator),
        "weights": normal(generator, case.c, case.n, scale=case.c**-0.5),
        "seed": normal(generator, case.table[0] * case.groups * case.c),
    }


def check_attention(case: Case) -> None:
    def run(implementation: str, **given: Tensor) -> Tensor:
        options = {"axis": case.axis, "scale": 0.7, "implementation": implementation}
        given["query"] = given["query"].to(given["projected"].dtype)  # if constant, too
        return ops.global_attention(**given, **options)

    # one key has all the weight, whatever the query is
    constant = ("mask",) if case.table[case.axis] > 1 else ("mask", "query")
    kernel_checks.check(run, attention_arrays(case), case.dtype, constant)


def check_mean(case: Case) -> None:
    """Both results, each as large as the other in the gradients."""

    def run(implementation: str, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        projected, mean = ops.project_with_mean(
            x, mask, weights, axis=case.axis, implementation=implementation
        )
        share = torch.cos(torch.arange(case.n, device=x.device).to(x.dtype))
        sums = torch.sum(projected.to(ops.at_least_float32(x.dtype)) * share, dim=(-1, case.axis))
        return ((1 + sums[..., None]) * mean).flatten()

    kernel_checks.check(run, mean_arrays(case), case.dtype, constant=("mask",))


CASES = [
    Case((2, 1, 3)),
    Case((2, 7, 3), width=6, heads=3, c=9),
    Case((2, 37, 2), width=8, heads=8, c=24),
    Case((1, 3, 129), axis=2, width=5, heads=1, c=40),
    Case((1, 64, 4), width=8, heads=2, c=16),
    Case((2, 4, 32), axis=2, width=16, heads=2, c=32),
    Case((2, 20, 3), empty=1),
    Case((1, 2, 5), axis=2, empty=1, width=3, heads=5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_global_attention(case: Case) -> None:
    check_attention(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection_with_mean(case: Case) -> None:
    check_mean(case)


@pytest.mark.parametrize("axis", [1, 2])
def test_bfloat16(axis: int) -> None:
    case = Case((2, 40, 40), c=32, heads=4, axis=axis, dtype=torch.bfloat16)
    check_attention(case)
    check_mean(case)


def test_all_keys_of_a_group_without_any_are_alike() -> None:
    case = Case((1, 5, 2), empty=1)
    given = attention_arrays(case)
    del given["seed"]
    given = {name: x.to(kernel_checks.DEVICE) for name, x in given.items()}
    found = ops.global_attention(**given, axis=1, implementation="triton")
    value, gate = given["projected"][0, :, 0, 8:16], given["projected"][0, :, 0, 16:].view(5, 2, 8)
    opened = torch.sigmoid(gate + given["gate_bias"])
    torch.testing.assert_close(found[0, :, 0], value.mean(0) * opened)


def test_modules_are_compiled_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the kernels while a program is traced has their shapes and gradients."""
    monkeypatch.setattr(ops, "_chosen", "triton")
    generator = torch.Generator().manual_seed(0)
    column, pairs = GlobalAttention(16, 2, 8), Attention(12, 8, 12, 2, 4, gating=False)
    shapes = (1, 6, 5, 16), (1, 4, 4, 12), (1, 3, 4, 4, 8)
    leaves = [*column.parameters(), *pairs.parameters(), *(torch.empty(s) for s in shapes)]
    leaves = [normal(generator, *x.shape).to(kernel_checks.DEVICE) for x in leaves]
    for module in (column, pairs):
        for parameter in module.parameters():
            parameter.data = leaves.pop(0)
    msa, pair, embedded = (x.requires_grad_() for x in leaves)
    masks = [torch.ones(shape, device=kernel_checks.DEVICE) for shape in ((1, 6, 5), (1, 3))]

    def results() -> list[Tensor]:
        outputs = column(msa, masks[0], msa, axis=1), pairs.to_templates(pair, embedded, masks[1])
        return [x.square().sum() for x in outputs]

    found = []
    for function in (results, torch.compile(results, backend="aot_eager", fullgraph=True)):
        every = [*column.parameters(), *pairs.parameters(), msa, pair, embedded]
        found.append(torch.autograd.grad(sum(function()), every))  # type: ignore[arg-type]
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("wrong", ["query", "projected"])
def test_shapes_that_do_not_fit_are_named(wrong: str) -> None:
    given = attention_arrays(Case((1, 2, 3)))
    del given["seed"]
    given[wrong] = given[wrong][..., :-1].contiguous()
    with pytest.raises(ValueError, match=r"queries of shape \(1, 3, 2, .* projections \(1, 2, 3, "):
        ops.global_attention(**given, axis=1, implementation="triton")


def test_float64_is_refused_by_name() -> None:
    given = {name: x.double() for name, x in attention_arrays(Case((1, 2, 3))).items()}
    del given["seed"]
    with pytest.raises(ops.UnsupportedOp, match=r"global_attention\(.*the kernel computes in"):
        ops.global_attention(**given, axis=1, implementation="triton")
