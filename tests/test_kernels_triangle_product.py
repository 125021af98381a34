"""Products of many square matrices, ordered by hand: results, what is too early, where they run."""

import pytest
import torch
from torch import Tensor

from foldcore.kernels import triangle_product
from foldcore.kernels.launch import Launch
from tests import gluon_interpreter, test_kernels_triangle
from tests.gluon_interpreter import Hasty, Hazard, Impatient, Machine
from tests.test_kernels_triangle import Case
from torchfold import _triangle, _triton

M, N = 3, 32
BLOCKS = {"BLOCK_I": 16, "BLOCK_J": 32, "BLOCK_K": 8, "AHEAD": 3, "COLUMNS": 8}
FORMS = [(False, True), (True, False), (False, False)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with few processors, so that programs have one tile more than others."""
    monkeypatch.setattr(triangle_product, "MULTIPROCESSORS", 4)


def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn((M, N, N), generator=generator).bfloat16() for _ in range(2))


@pytest.mark.parametrize("ahead", [2, 4])
@pytest.mark.parametrize("turned", FORMS)
def test_products(turned: tuple[bool, bool], ahead: int) -> None:
    a, b = matrices()
    launch = triangle_product.product(M, N, turned, BLOCKS | {"AHEAD": ahead})
    (found,) = gluon_interpreter.run(launch, a, b)
    exact = (a.mT if turned[0] else a).double() @ (b.mT if turned[1] else b).double()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("machine", [Hasty, Impatient])
def test_too_short_waits_are_found(machine: type[Machine]) -> None:
    launch = triangle_product.product(M, N, (False, True), BLOCKS)
    with pytest.raises(Hazard):
        gluon_interpreter.run(launch, *matrices(), machine=machine)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run, products of 16 residues as on an H100."""
    names: list[str] = []

    def call(launch: Launch, *given: Tensor) -> tuple[Tensor, ...]:
        names.append(launch.kernel.fn.__name__)
        if names[-1] == "triangle_product_kernel":
            return tuple(gluon_interpreter.run(launch, *given))
        return _triton.call(launch, *given)

    monkeypatch.setattr(_triangle, "call", call)
    monkeypatch.setattr(triangle_product, "ARCHITECTURE", 0)
    monkeypatch.setattr(triangle_product, "BLOCKS", BLOCKS | {"BLOCK_J": 16})
    return names


@pytest.mark.parametrize("outgoing", [True, False])
def test_forward_and_gradients(launched: list[str], outgoing: bool) -> None:
    case = Case(16, c=16, h=16, outgoing=outgoing, residual=True, dtype=torch.bfloat16)
    test_kernels_triangle.check(case)
    assert launched.count("triangle_product_kernel") == 3


def test_other_sizes_are_left_to_the_library(launched: list[str]) -> None:
    test_kernels_triangle.check(Case(24, c=16, h=16, dtype=torch.bfloat16))
    assert "triangle_product_kernel" not in launched
