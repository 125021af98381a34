"""Norms with narrow projections by kernels: outputs and every gradient."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foldcore.kernels.launch import Launch
from tests import kernel_checks
from tests.kernel_checks import normal
from tests.test_kernels_rows import poisoned  # noqa: F401, a fixture
from torchfold import _projections, _triton, ops, projections

BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Pairs [b, i, j, c] and h heads; axis 0: nothing but the bias, for axis 2."""

    shape: tuple[int, int, int, int]
    h: int
    axis: int = 0
    dtype: torch.dtype = torch.float32


def arrays(case: Case) -> dict[str, Tensor]:
    """Random arrays; the gradient of all results, one after another."""
    generator, c = torch.Generator().manual_seed(case.h + sum(case.shape)), case.shape[-1]
    rows = case.shape[0] * case.shape[1] * case.shape[2]
    return {
        "pair": normal(generator, *case.shape) * 3 + 5,
        "scale": normal(generator, c),
        "offset": normal(generator, c),
        "weights": normal(generator, c, case.h, scale=c**-0.5),
        "seed": normal(generator, rows * (case.h + c * (2 if case.axis else 1))),
    }


def joined(results: tuple[Tensor, ...]) -> Tensor:
    """In one row: kernels get gradients that are not contiguous."""
    return torch.cat([torch.sin(x).mT.flatten() for x in results])


def pair_bias(axis: int) -> kernel_checks.Function:
    def run(implementation: str, **given: Tensor) -> Tensor:
        if not axis:
            return joined(projections.pair_bias(**given, implementation=implementation))
        options = {"axis": axis, "implementation": implementation}
        return joined(projections.layer_norm_pair_bias(**given, **options))

    return run


def check(case: Case) -> None:
    kernel_checks.check(pair_bias(case.axis), arrays(case), case.dtype)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "h"),
    [
        ((1, 1, 1, 16), 1),
        ((2, 7, 9, 37), 5),
        ((1, 37, 20, 24), 8),
        ((1, 3, 43, 129), 4),
        ((1, 5, 7, 384), 20),
        ((1, 32, 32, 32), 4),  # whole tiles
    ],
    ids=str,
)
def test_pair_bias(shape: tuple[int, int, int, int], h: int, axis: int) -> None:
    check(Case(shape, h, axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1, 128), (2, 17, 9, 40), (1, 32, 32, 32)], ids=str)
def test_pair_bias_in_bfloat16(shape: tuple[int, int, int, int], axis: int) -> None:
    check(Case(shape, 4, axis, BFLOAT16))


@dataclass(frozen=True)
class Sides:
    """An MSA [b, s, r, c] and e channels of either side."""

    shape: tuple[int, int, int, int]
    e: int
    dtype: torch.dtype = torch.float32


def side_arrays(case: Sides) -> dict[str, Tensor]:
    """Random arrays; some residues are masked, the first is not."""
    generator, c, e = torch.Generator().manual_seed(sum(case.shape)), case.shape[-1], case.e
    mask = (torch.rand(case.shape[:3], generator=generator) > 0.2).float()
    mask[0, 0, 0] = 1
    return {
        "msa": normal(generator, *case.shape) * 3 + 5,
        "mask": mask,
        "scale": normal(generator, c),
        "offset": normal(generator, c),
        "left_weights": normal(generator, c, e, scale=c**-0.5),
        "left_bias": normal(generator, e),
        "right_weights": normal(generator, c, e, scale=c**-0.5),
        "right_bias": normal(generator, e),
        "seed": normal(generator, mask.numel() * (2 * e + c)),
    }


def outer_product_sides(implementation: str, **given: Tensor) -> Tensor:
    return joined(projections.outer_product_sides(**given, implementation=implementation))


def check_sides(case: Sides) -> None:
    kernel_checks.check(outer_product_sides, side_arrays(case), case.dtype, ("mask",))


@pytest.mark.parametrize(
    "case",
    [
        Sides((1, 1, 1, 16), 3),
        Sides((2, 7, 9, 37), 5),
        Sides((1, 37, 7, 24), 8),
        Sides((1, 1, 129, 40), 32),
        Sides((1, 3, 7, 384), 4),
        Sides((1, 16, 16, 64), 32),
        Sides((2, 5, 13, 40), 8, BFLOAT16),
        Sides((1, 16, 16, 64), 32, BFLOAT16),
    ],
    ids=str,
)
def test_outer_product_sides(case: Sides) -> None:
    check_sides(case)


@pytest.mark.parametrize("unused", ["bias", "normal", "pair"])
def test_results_that_nothing_uses(unused: str) -> None:
    """Without gradients of their own, and with no array of zeros in place of large ones."""

    def run(implementation: str, **given: Tensor) -> Tensor:
        options = {"axis": 1, "implementation": implementation}
        found = projections.layer_norm_pair_bias(**given, **options)
        kept = zip(("normal", "bias", "pair"), found, strict=True)
        return joined(tuple(x for name, x in kept if name != unused))

    given = arrays(Case((1, 5, 7, 16), 4, 1))
    sizes = {"normal": 35 * 16, "bias": 35 * 4, "pair": 35 * 16}
    given["seed"] = given["seed"][: sum(sizes.values()) - sizes[unused]]
    kernel_checks.check(run, given)


def test_only_the_bias_is_written_where_only_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, ...]] = []

    def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        written.extend(output.shape for output in launch.outputs)
        return _triton.call(launch, *inputs)

    monkeypatch.setattr(_projections, "call", call)
    given = {k: x.to(kernel_checks.DEVICE) for k, x in arrays(Case((1, 5, 7, 16), 4)).items()}
    del given["seed"]
    bias, pair = projections.pair_bias(**given, implementation="triton")
    assert pair.data_ptr() == given["pair"].data_ptr()
    assert bias.is_contiguous()
    assert sum(torch.Size(shape).numel() for shape in written) == bias.numel() + 1


@pytest.mark.parametrize(("c", "h"), [(2048, 4), (257, 65)])
def test_more_than_a_program_holds_is_refused(c: int, h: int) -> None:
    pair, vector = torch.zeros(1, 2, 2, c), torch.zeros(c)
    with pytest.raises(ops.UnsupportedOp, match=r"pair_bias\(.*float32.*cannot hold so many"):
        projections.pair_bias(pair, vector, vector, torch.zeros(c, h), implementation="triton")
