"""Outer product mean by kernels: the output and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests import kernel_checks
from tests.kernel_checks import normal
from torchfold import evoformer, ops, params


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_checks.poison(monkeypatch)


@dataclass(frozen=True)
class Case:
    """Sizes of an outer product mean."""

    residues: int
    sequences: int = 5
    c: int = 8
    e: int = 8
    z: int = 16
    batch: int = 1
    dtype: torch.dtype = torch.float32
    residual: bool = False
    counted: bool = False  # the count is given, and not that of the mask


def arrays(case: Case) -> dict[str, Tensor]:
    """Random arrays; some residues are masked in some sequences, a pair in all of them."""
    generator = torch.Generator().manual_seed(case.residues + case.z)
    b, s, r, c, e, z = case.batch, case.sequences, case.residues, case.c, case.e, case.z
    mask = (torch.rand(b, s, r, generator=generator) > 0.2).float()
    mask[:, : s // 2, r - 1] = 0
    mask[:, s // 2 :, r // 2] = 0
    mask[:, 0, 0] = 1
    given = {"pair": normal(generator, b, r, r, z)} if case.residual else {}
    if case.counted:
        given["count"] = torch.randint(1, 9, (b, r, r), generator=generator).float()
    return given | {
        "left": normal(generator, b, s, r, c) * mask[..., None],
        "right": normal(generator, b, s, r, e) * mask[..., None],
        "mask": mask,
        "weights": normal(generator, c, e, z, scale=(c * e) ** -0.5),
        "bias": normal(generator, z),
        "seed": normal(generator, b, r, r, z),
    }


def outer_product_mean(implementation: str, **given: Tensor) -> Tensor:
    return ops.outer_product_mean(**given, implementation=implementation)


def check(case: Case) -> None:
    kernel_checks.check(outer_product_mean, arrays(case), case.dtype, ("mask", "count"))


@pytest.mark.parametrize(
    "case",
    [
        Case(1),
        Case(7, sequences=1),
        Case(7, sequences=3, residual=True),
        Case(7, sequences=3, counted=True),
        Case(37, c=4, e=4),
        Case(37, c=3, e=6, z=24, residual=True, batch=2),
        Case(129, sequences=2, c=2, e=4),
        Case(9, c=5, e=3, z=24, batch=2),
        Case(10, sequences=17, c=16, e=2, z=40, batch=2),
        Case(8, sequences=16, c=16, e=16, dtype=torch.bfloat16),
        Case(8, sequences=16, c=16, e=16, dtype=torch.bfloat16, residual=True),
        Case(8, sequences=17, c=16, e=16, dtype=torch.bfloat16),
        Case(20, sequences=9, c=8, e=32, z=20, dtype=torch.bfloat16, residual=True),
    ],
    ids=str,
)
def test_outer_product_mean(case: Case) -> None:
    check(case)


def test_a_stack_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask's counts are those that each block would take from the mask."""
    sizes = {
        **{"msa_heads": 1, "msa_head_dim": 2, "pair_heads": 1, "pair_head_dim": 2},
        **{"outer_product_hidden": 2, "triangle_hidden": 3, "transition_factor": 1},
        **{"msa_dropout": 0.0, "pair_dropout": 0.0},
    }
    stack = evoformer.EvoformerStack(evoformer.EvoformerBlock(4, 3, **sizes), 3, 4, 5)
    params.initialize(stack, seed=0)
    mask = (torch.arange(35).view(1, 5, 7) % 3 > 0).float()
    generator = torch.Generator().manual_seed(0)
    msa, pair = normal(generator, 1, 5, 7, 4), normal(generator, 1, 7, 7, 3)
    found = stack(msa, pair, mask, torch.ones(1, 7, 7))
    counts: list[Tensor] = []
    count = evoformer.sequence_count
    monkeypatch.setattr(evoformer, "sequence_count", lambda x: counts.append(count(x)))
    for one, other in zip(found, stack(msa, pair, mask, torch.ones(1, 7, 7)), strict=True):
        torch.testing.assert_close(one, other)
    assert len(counts) == 1
    assert counts[0][0, 1, 2] == (mask[0, :, 1] * mask[0, :, 2]).sum()
