"""Runs every kernel once, forward and backward, beside its reference."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels.cases import CASES, Case
from jaxfold import ops
from jaxfold._triton import architecture


def run() -> None:
    """Raise WrongKernel for the first kernel whose results differ."""
    architecture()  # says what is missing where no kernel can run
    arrays = [case.draw() for case in CASES]
    for case, errors in zip(CASES, jax.device_get(jax.jit(_every_error)(arrays)), strict=True):
        case.check({name: float(error) for name, error in errors.items()})


def _every_error(arrays: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Relative errors of all cases, as one program."""
    return [_errors(case, inputs) for case, inputs in zip(CASES, arrays, strict=True)]


def _errors(case: Case, arrays: dict[str, Array]) -> dict[str, Array]:
    kernel = _results(case, "triton", jnp.bfloat16, arrays)
    plain = _results(case, "reference", jnp.float32, arrays)
    return {
        name: jnp.linalg.norm(kernel[name].astype(jnp.float32).ravel() - expected.ravel())
        / jnp.linalg.norm(expected.ravel())
        for name, expected in plain.items()
    }


def _results(
    case: Case, implementation: str, dtype: Any, arrays: dict[str, Array]
) -> Mapping[str, Array]:
    """Output and gradients for the same bfloat16 numbers, computed in ``dtype``."""
    leaves = {
        name: x.astype(jnp.bfloat16).astype(dtype)
        for name, x in arrays.items()
        if name not in case.masks
    }

    def loss(leaves: dict[str, Array]) -> tuple[Array, Array]:
        # in the case's order, which the arrays have lost on their way through jit
        inputs = [leaves.get(name, arrays[name]) for name in case.shapes]
        output = getattr(ops, case.op)(*inputs, **case.options, implementation=implementation)
        # not constant, for a constant gradient has none through a softmax
        weights = jnp.cos(jnp.arange(output.shape[-1], dtype=jnp.float32))
        return jnp.sum(output.astype(jnp.float32) * weights), output

    gradients, output = jax.grad(loss, has_aux=True)(leaves)
    return {"the output": output} | {f"the gradient of {k}": x for k, x in gradients.items()}
