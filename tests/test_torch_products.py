"""Products that keep all digits."""

import pytest
import torch

from torchfold._products import exact_product


def test_exact_product_and_its_gradients() -> None:
    left = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    right = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact_product, (left, right))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_exact_product_leaves_other_products_as_they_were(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        exact_product(torch.ones(1, 2, 2), torch.ones(1, 2, 2))
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError):
            exact_product(torch.ones(1, 2, 2), torch.ones(1, 3, 2))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_exact_product_rounds_no_factor() -> None:
    x = torch.full((1, 64, 64), 1 + 2**-20, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        rounded, exact = x @ x, exact_product(x, x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact.min() > 64 == rounded.max(), "the other product should have rounded"
