"""Triangle multiplication with products and copies ordered by hand: results, what is too early."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foldcore.kernels import (
    triangle,
    triangle_fold,
    triangle_output_pipelined,
    triangle_pipelined,
    turns,
)
from foldcore.kernels.launch import Launch
from foldcore.kernels.triangle_pipelined import Steps
from tests import gluon_interpreter, kernel_checks, test_kernels_triangle
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from tests.test_kernels_triangle import Case
from torchfold import _triangle, _triton, ops

BATCH, RESIDUES, C = 2, 16, 16
PROJECT = [
    Steps(16, 8, 4, ahead=2, programs=2, groups=2),
    Steps(32, 8, 4, ahead=1, programs=1),
    Steps(64, 16, 8, ahead=3, programs=1),
]
OUTPUT = [
    Steps(16, 8, 4, ahead=1, programs=2),
    Steps(8, 16, 4, ahead=3, programs=1),
    Steps(16, 8, 8, ahead=2, programs=1),
]
MODULES = triangle_pipelined, triangle_output_pipelined
KERNELS = {
    "triangle_project_pipelined_kernel": triangle_pipelined,
    "triangle_output_pipelined_kernel": triangle_output_pipelined,
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with few processors, so that a program has several tiles."""
    monkeypatch.setattr(turns, "MULTIPROCESSORS", 3)


def arrays(residues: int = RESIDUES, **kind: object) -> dict[str, Tensor]:
    case = Case(residues, c=C, h=C, batch=BATCH, dropout=True, **kind)
    return {name: x.bfloat16() for name, x in test_kernels_triangle.arrays(case).items()}


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    """What both kernels take."""
    given = arrays()
    parameters = [given[name] for name in ops.TriangleParameters._fields]
    n = RESIDUES**2
    folded = _triangle.fold(parameters)
    (rstd,) = _triton.call(triangle_fold.rstd(BATCH, n, C, "bfloat16"), given["pair"])
    pair, mask = given["pair"], given["pair_mask"].float()
    factor = (given["factor"] > 0).float() / 0.75
    generator = torch.Generator().manual_seed(3)
    product = torch.randn((BATCH, C, n), generator=generator).bfloat16()
    return [pair, mask, *folded[:2]], [product, pair, factor, rstd, *folded]


def check(found: list[Tensor], launch: Launch, *given: Tensor) -> None:
    """As by the kernels that these stand in for, but for the order of sums."""
    for x, y in zip(found, _triton.call(launch, *given), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert kernel_checks.relative_error(x, y.double()) < (1e-6 if x.dim() == 2 else 1e-3)


@pytest.mark.parametrize("steps", PROJECT, ids=str)
def test_projections(steps: Steps) -> None:
    (pair, mask, *folded), (*_, rstd, _, _, _, _) = inputs()
    launch = triangle_pipelined.project(BATCH, RESIDUES**2, C, C, steps)
    left, right, own_rstd = gluon_interpreter.run(launch, pair, mask, *folded)
    launch = triangle.project(BATCH, RESIDUES**2, C, C, "bfloat16", 0)
    check([left, right], launch, pair, mask, rstd, *folded)
    assert not left.view(BATCH, C, -1).mT[mask.view(BATCH, -1) == 0].any()
    torch.testing.assert_close(own_rstd, rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("steps", OUTPUT, ids=str)
def test_outputs(steps: Steps, kind: tuple[bool, bool]) -> None:
    _, given = inputs()
    shape = RESIDUES, RESIDUES
    launch = triangle_output_pipelined.output(BATCH, shape, C, C, *kind, steps)
    found = gluon_interpreter.run(launch, *given)
    check(found, triangle.output(BATCH, shape, C, C, "bfloat16", 0, *kind), *given)


def test_factors_of_any_kind() -> None:
    """Those of a row that differ are rounded; those of a row, or of a chunk, may all be 0."""
    _, given = inputs()
    factor = given[2] * torch.linspace(-2, 2, given[2].numel()).view_as(given[2])
    factor[0, 0, 3] = 0
    factor[:, 0, 4:8, : OUTPUT[0].columns] = 0
    given[2], shape = factor, (RESIDUES, RESIDUES)
    launch = triangle_output_pipelined.output(BATCH, shape, C, C, True, False, OUTPUT[0])
    found = gluon_interpreter.run(launch, *given)[0]
    launch = triangle.output(BATCH, shape, C, C, "bfloat16", 0, True, False)
    expected = _triton.call(launch, *given)[0]
    assert kernel_checks.relative_error(found, expected.double()) < 5e-3
    assert not found.view(BATCH, RESIDUES, RESIDUES, C)[0, :, 3].any()


def test_masks_that_are_not_binary() -> None:
    """What the gate's reciprocal makes of them."""
    (pair, mask, *folded), (*_, rstd, _, _, _, _) = inputs()
    mask *= torch.linspace(1e-3, 3.0, mask.numel()).view_as(mask)
    launch = triangle_pipelined.project(BATCH, RESIDUES**2, C, C, PROJECT[0])
    found = gluon_interpreter.run(launch, pair, mask, *folded)
    launch = triangle.project(BATCH, RESIDUES**2, C, C, "bfloat16", 0)
    check(found[:2], launch, pair, mask, rstd, *folded)


@pytest.mark.parametrize("machine", [Hasty, Impatient])
@pytest.mark.parametrize("which", range(3))
def test_too_short_waits_are_found(which: int, machine: type[Machine]) -> None:
    project, output = inputs()
    launch = triangle_pipelined.project(BATCH, RESIDUES**2, C, C, PROJECT[which])
    with pytest.raises(Hazard):
        gluon_interpreter.run(launch, *project, machine=machine)
    shape = RESIDUES, RESIDUES
    launch = triangle_output_pipelined.output(BATCH, shape, C, C, True, True, OUTPUT[which])
    with pytest.raises(Hazard):
        gluon_interpreter.run(launch, *output, machine=machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run as on an H100, the others in Triton's interpreter."""
    names: list[str] = []

    def call(launch: Launch, *given: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if names[-1] in KERNELS:
            return tuple(gluon_interpreter.run(launch, *given))
        return _triton.call(launch, *given)

    monkeypatch.setattr(_triangle, "call", call)
    for module, steps in zip(MODULES, (PROJECT[0], OUTPUT[0]), strict=True):
        monkeypatch.setattr(module, "ARCHITECTURE", 0)
        monkeypatch.setitem(module.SIZES, C, steps)
    return names


@pytest.mark.parametrize("outgoing", [True, False])
def test_they_run_where_their_sizes_fit(launched: list[str], outgoing: bool) -> None:
    case = Case(16, c=C, h=C, outgoing=outgoing, dropout=True, residual=True, dtype=torch.bfloat16)
    test_kernels_triangle.check(case)
    assert set(KERNELS) <= set(launched)
    assert not {"triangle_project_kernel", "triangle_rstd_kernel"} & set(launched)
    assert "triangle_output_kernel" not in launched


@pytest.mark.parametrize(("residues", "h"), [(9, C), (16, 32)])
def test_other_sizes_are_left_to_the_others(launched: list[str], residues: int, h: int) -> None:
    test_kernels_triangle.check(Case(residues, c=C, h=h, residual=True, dtype=torch.bfloat16))
    assert not set(KERNELS) & set(launched)


def test_tiles_are_whole(launched: list[str]) -> None:
    """Tiles of the projections are of positions, those of the output of one i."""
    launched.clear()
    triangle_pipelined.SIZES[C] = replace(PROJECT[0], rows=32)
    test_kernels_triangle.check(Case(20, c=C, h=C, dtype=torch.bfloat16))
    assert not set(KERNELS) & set(launched)
