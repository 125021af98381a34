"""Which kernels give the gradients of attention, in what order; each track brings its ``call``."""

from collections.abc import Callable
from typing import Any

from foldcore.kernels import attention_backward, attention_bias, attention_long
from foldcore.kernels.attention_tiles import Problem

Call = Callable[..., tuple[Any, ...]]


def gradients(
    call: Call,
    problem: Problem,
    projected: Any,
    gate_bias: Any,
    mask: Any,
    bias: Any,
    output: Any,
    logsumexp: Any,
    grad: Any,
) -> tuple[Any, Any, Any]:
    """Those of projected, parts of the gate bias's to sum, and parts of the bias's or None.

    Without a bias anything may stand in its place. ``call`` runs a launch on arrays.
    """
    scores = projected, mask, bias, logsumexp
    if problem.together:
        launch = attention_bias.output_grad(problem)
        gate_grad, delta, sums, gathered = call(launch, projected, gate_bias, output, grad)
        given = *scores, delta, gathered
        query_grad, parts = call(attention_bias.query_bias_grad(problem), *given, gate_grad)
        return *call(attention_long.key_value_grad(problem), *given, query_grad), sums, parts
    everything = projected, gate_bias, mask, bias, output, logsumexp, grad
    if problem.whole:
        launch = attention_backward.whole_grad(problem)
        projected_grad, delta, sums, gathered = call(launch, *everything)
        given = *scores, delta, gathered
    else:
        launch = attention_long.query_grad(problem)
        query_grad, delta, sums, gathered = call(launch, *everything)
        given = *scores, delta, gathered
        (projected_grad,) = call(attention_long.key_value_grad(problem), *given, query_grad)
    if not problem.has_bias:
        return projected_grad, sums, None
    return projected_grad, sums, *call(attention_backward.bias_grad(problem), *given)
