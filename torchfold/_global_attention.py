"""``ops.global_attention`` and what goes before it by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import global_attention as kernels
from foldcore.kernels import global_attention_backward, group_mean
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name

# Projection, and the mean of each group -----------------------------------------------------------


def project_with_mean(x: Tensor, mask: Tensor, weights: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """``x @ weights`` [b s r n] and the means of groups [b g c]."""
    projected, mean, _ = _project(x, mask, weights, axis)
    return projected, mean


@torch.library.custom_op("twinfold::project_with_mean", mutates_args=())
def _project(x: Tensor, mask: Tensor, weights: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last are the numbers of positions that count."""
    b, s, r, c = x.shape
    launch = group_mean.forward((b, s, r), c, axis, dtype_name(x), architecture(x.device))
    mean, count = call(launch, x, mask)
    return x @ weights, mean, count


@_project.register_fake
def _(x: Tensor, mask: Tensor, weights: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = x.shape[0], x.shape[3 - axis]
    projected = x.new_empty((*x.shape[:3], weights.shape[1]))
    return projected, x.new_empty((*groups, x.shape[3])), mask.new_empty(groups)


@torch.library.custom_op("twinfold::project_with_mean_backward", mutates_args=())
def _project_backward(
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    count: Tensor,
    grad: Tensor,
    mean_grad: Tensor,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by x and the weights."""
    b, s, r, c = x.shape
    kind = dtype_name(x), architecture(x.device)
    launch = group_mean.backward((b, s, r), c, weights.shape[1], axis, *kind)
    (x_grad,) = call(launch, grad, weights, mask, count, mean_grad)
    return x_grad, x.flatten(0, 2).T @ grad.flatten(0, 2)


@_project_backward.register_fake
def _(
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    count: Tensor,
    grad: Tensor,
    mean_grad: Tensor,
    axis: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _save_project(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *saved, ctx.axis = inputs
    ctx.save_for_backward(*saved, output[2])


def _project_gradients(ctx, grad, mean_grad, _):  # type: ignore[no-untyped-def]
    x_grad, weights_grad = _project_backward(*ctx.saved_tensors, grad, mean_grad, ctx.axis)
    return x_grad, None, weights_grad, None


_project.register_autograd(_project_gradients, setup_context=_save_project)


# Attention ----------------------------------------------------------------------------------------


def global_attention(
    query: Tensor, projected: Tensor, gate_bias: Tensor, mask: Tensor, axis: int, scale: float
) -> Tensor:
    """``ops.global_attention`` by kernels, forward and backward."""
    return _forward(query, projected, gate_bias, mask, axis, scale)[0]


def _problem(query: Tensor, projected: Tensor, axis: int, scale: float) -> kernels.Problem:
    kind = dtype_name(projected), architecture(projected.device)
    return kernels.Problem.of(query.shape, projected.shape, axis, scale, *kind)


@torch.library.custom_op("twinfold::global_attention", mutates_args=())
def _forward(
    query: Tensor, projected: Tensor, gate_bias: Tensor, mask: Tensor, axis: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    launch = kernels.forward(_problem(query, projected, axis, scale))
    output, gathered, logsumexp = call(launch, query, projected, gate_bias, mask)
    return output, gathered, logsumexp


@_forward.register_fake
def _(
    query: Tensor, projected: Tensor, gate_bias: Tensor, mask: Tensor, axis: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    output = projected.new_empty((*projected.shape[:3], *query.shape[2:]))
    gathered = query.new_empty(query.shape, dtype=torch.float32)
    return output, gathered, gathered.new_empty(query.shape[:3])


@torch.library.custom_op("twinfold::global_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    gathered: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, projections and gate bias."""
    launch = global_attention_backward.backward(_problem(query, projected, axis, scale))
    given = query, projected, gate_bias, mask, gathered, logsumexp, grad
    query_grad, projected_grad, sums = call(launch, *given)
    return query_grad, projected_grad, sum_columns(sums, gate_bias).view(gate_bias.shape)


@_backward.register_fake
def _(
    query: Tensor,
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    gathered: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, projected_grad, bias_grad = (
        x.new_empty(x.shape) for x in (query, projected, gate_bias)
    )
    return query_grad, projected_grad, bias_grad


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *saved, ctx.axis, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # of all but the output, which have none
    ctx.save_for_backward(*saved, *output[1:])


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    query, projected, bias = _backward(*ctx.saved_tensors, grad, ctx.axis, ctx.scale)
    return query, projected, bias, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
