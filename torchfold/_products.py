"""Products of coordinates, which keep all their digits.

``model.matmul_precision`` may let a GPU round the factors of float32 products to 11 bits, a
coordinate of 100 angstrom to a twentieth of an angstrom.
"""

import torch
from torch import Tensor


@torch.library.custom_op("twinfold::exact_product", mutates_args=())
def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """[n i k] times [n k j]."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return torch.bmm(left, right)
    finally:
        torch.set_float32_matmul_precision(before)


@exact_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((*left.shape[:2], right.shape[2]))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    left, right = ctx.saved_tensors
    return exact_product(grad, right.mT), exact_product(left.mT, grad)


exact_product.register_autograd(_gradients, setup_context=_save)
