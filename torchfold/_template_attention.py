"""``ops.template_attention`` by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import template_attention as kernels
from torchfold._triton import architecture, call, dtype_name


def template_attention(query: Tensor, projected: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``ops.template_attention`` by kernels, forward and backward."""
    return _forward(query, projected, mask, scale)[0]


def _problem(query: Tensor, projected: Tensor, scale: float) -> kernels.Problem:
    b, i, j, heads, width = query.shape
    kind = dtype_name(projected), architecture(projected.device)
    return kernels.Problem(b, projected.shape[1], i * j, heads, width, scale, *kind)


@torch.library.custom_op("twinfold::template_attention", mutates_args=())
def _forward(query: Tensor, projected: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    launch = kernels.forward(_problem(query, projected, scale))
    output, logsumexp = call(launch, query, projected, mask)
    return output.view(query.shape), logsumexp


@_forward.register_fake
def _(query: Tensor, projected: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    b, i, j, heads, _ = query.shape
    return query.new_empty(query.shape), mask.new_empty((b, i * j, heads))


@torch.library.custom_op("twinfold::template_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    projected: Tensor,
    mask: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and projections."""
    launch = kernels.backward(_problem(query, projected, scale))
    given = query, projected, mask, logsumexp, grad
    query_grad, projected_grad = call(launch, *given)
    return query_grad.view(query.shape), projected_grad.view(projected.shape)


@_backward.register_fake
def _(
    query: Tensor,
    projected: Tensor,
    mask: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), projected.new_empty(projected.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *saved, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # of the sums of exponentials, which have none
    ctx.save_for_backward(*saved, output[1])


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, projected = _backward(*ctx.saved_tensors, grad, ctx.scale)
    return query, projected, None, None


_forward.register_autograd(_gradients, setup_context=_save)
