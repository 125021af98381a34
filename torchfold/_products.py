"""Products of matrices that PyTorch's own would take less well."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Several of one array -----------------------------------------------------------------------------


def products(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """``x @ weights + bias`` of each; the products themselves add their gradients by x."""
    weights, biases = zip(*layers, strict=True)
    return _Products.apply(x, *weights, *biases)  # type: ignore[no-untyped-call, no-any-return]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor):  # type: ignore[no-untyped-def]
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        ctx.save_for_backward(x, *weights)
        ctx.biased = [bias is not None for bias in biases]
        both = zip(weights, biases, strict=True)
        return tuple(F.linear(x, w.T, bias) for w, bias in both)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, *weights = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        x_grad = grads[0] @ weights[0].T
        for grad, w in zip(grads[1:], weights[1:], strict=True):
            x_grad.addmm_(grad, w.T)
        both = zip(grads, ctx.biased, strict=True)
        bias_grads = (grad.sum(0) if biased else None for grad, biased in both)
        return x_grad.view(x.shape), *(rows.T @ grad for grad in grads), *bias_grads


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
