"""Products of matrices that PyTorch's own would take less well."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Several of one array -----------------------------------------------------------------------------


@torch.library.custom_op("twinfold::products", mutates_args=())
def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """``x @ w`` of each, plus its bias where there are any; their gradients by x are added by the
    products themselves."""
    if not biases:
        return [x @ w for w in weights]
    both = zip(weights, biases, strict=True)
    return [F.linear(x, w.T, bias) for w, bias in both]


@products.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[1])) for w in weights]


@torch.library.custom_op("twinfold::products_backward", mutates_args=())
def _products_backward(x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The gradient by x."""
    flat = [grad.flatten(0, -2) for grad in grads]
    x_grad = flat[0] @ weights[0].T
    for grad, w in zip(flat[1:], weights[1:], strict=True):
        x_grad.addmm_(grad, w.T)
    return x_grad.view(x.shape)


@_products_backward.register_fake
def _(x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape)


def _save_products(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weights, ctx.biases = inputs[0], inputs[1], len(inputs[2])
    ctx.save_for_backward(x, *weights)


def _products_gradients(ctx, grads):  # type: ignore[no-untyped-def]
    x, *weights = ctx.saved_tensors
    rows, flat = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
    x_grad = _products_backward(x, weights, grads)
    bias_grads = [grad.sum(0) for grad in flat[: ctx.biases]]
    return x_grad, [rows.T @ grad for grad in flat], bias_grads


products.register_autograd(_products_gradients, setup_context=_save_products)


# Of coordinates -----------------------------------------------------------------------------------

# ``model.matmul_precision`` may let a GPU round the factors of float32 products to 11 bits, a
# coordinate of 100 angstrom to a twentieth of an angstrom: these keep all their digits.


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
