"""Runs every kernel once, forward and backward, beside its reference."""

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels.cases import CASES, MASKS, UPDATE, Case, MaskCase, UpdateCase
from jaxfold import ops, optimizer, projections
from jaxfold._triton import architecture
from jaxfold.primitives import DropoutKey, _keep_mask

MODULES = {"ops": ops, "projections": projections}
AnyCase = Case | UpdateCase | MaskCase
EVERY: tuple[AnyCase, ...] = (*CASES, UPDATE, MASKS)
# the results matter here, not the time: no search for the fastest matrix products
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def run() -> None:
    """Raise WrongKernel for the first kernel whose results differ."""
    architecture()  # says what is missing where no kernel can run
    # side by side, for the time goes into compiling them
    with ThreadPoolExecutor(len(EVERY)) as pool:
        found = list(pool.map(_compute_errors, EVERY))
    for case, errors in zip(EVERY, found, strict=True):
        case.check({name: float(error) for name, error in errors.items()})


def _compute_errors(case: AnyCase) -> dict[str, Any]:
    """Relative errors of all arrays of a case, as one program."""
    program = jax.jit(functools.partial(_errors, case), compiler_options=COMPILER_OPTIONS)
    return jax.device_get(program(case.draw()))


def _errors(case: AnyCase, arrays: dict[str, Array]) -> dict[str, Array]:
    kernel, plain = _run(case, "triton", arrays), _run(case, "reference", arrays)
    return {
        name: jnp.linalg.norm(_flat(kernel[name]) - _flat(expected))
        / jnp.linalg.norm(_flat(expected))
        for name, expected in plain.items()
    }


def _flat(x: Array) -> Array:
    return x.astype(jnp.float32).ravel()


@functools.singledispatch
def _run(case: Any, implementation: str, arrays: dict[str, Array]) -> Mapping[str, Array]:
    """Outputs and gradients for the same bfloat16 numbers, as kernels get them or in float32."""
    dtype = jnp.bfloat16 if implementation == "triton" else jnp.float32
    leaves = {
        name: x.astype(jnp.bfloat16).astype(dtype)
        for name, x in arrays.items()
        if name not in case.masks
    }

    def run(leaves: dict[str, Array]) -> Array | tuple[Array, ...]:
        # in the case's order, which the arrays have lost on their way through jit
        inputs = [leaves.get(name, arrays[name]) for name in case.shapes]
        op = getattr(MODULES[case.module], case.op)
        return op(*inputs, **case.options, implementation=implementation)

    def loss(leaves: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs = _named("output", run(leaves))
        return _loss(outputs), outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(leaves)
    alone = _named("output without gradient", run(leaves))
    return alone | outputs | {f"the gradient of {k}": x for k, x in gradients.items()}


def _named(what: str, output: Array | tuple[Array, ...]) -> dict[str, Array]:
    """One result, or several by number."""
    if not isinstance(output, tuple):
        return {f"the {what}": output}
    return {f"the {what}, number {i}": x for i, x in enumerate(output)}


def _loss(outputs: Mapping[str, Array]) -> Array:
    """Not constant in any of them, for a constant gradient has none through a softmax."""
    weights = (jnp.cos(jnp.arange(x.shape[-1], dtype=jnp.float32)) for x in outputs.values())
    found = zip(outputs.values(), weights, strict=True)
    return sum((jnp.sum(x.astype(jnp.float32) * w) for x, w in found), jnp.float32(0))


@_run.register
def _(case: UpdateCase, implementation: str, arrays: dict[str, Array]) -> Mapping[str, Array]:
    """The new buffers and all norms."""
    gradient, overwritten = arrays["gradient"], jnp.zeros(case.size, jnp.bfloat16)
    buffers = {name: arrays[name] for name in ("params", "mu", "nu", "ema")}
    step, finite = jnp.int32(case.step), jnp.bool_(True)
    with _using(implementation):
        factor, norm = optimizer.clip_factor(gradient, case.max_norm)
        old = optimizer.Buffers(**buffers, rounded=overwritten)
        new, norms = optimizer.update(gradient, factor, old, step, finite, case.config)
    # beside its own: numbers near the middle between two may become either; XLA would leave out
    # that they are rounded
    assert new.rounded is not None
    rounded = jax.lax.optimization_barrier(new.rounded).astype(jnp.float32)
    exact = rounded / jax.lax.reduce_precision(new.params, exponent_bits=8, mantissa_bits=7)
    return {"the gradient's norm": norm, **new._asdict(), "rounded": exact, **norms}


@_run.register
def _(case: MaskCase, implementation: str, arrays: dict[str, Array]) -> Mapping[str, Array]:
    """Every mask."""
    ids, found = arrays["example_id"], {}
    for path, block, shape, rate in case.masks:
        scope, _, name = path.rpartition("/")
        key = DropoutKey(case.seed, jnp.int32(case.step), ids, case.recycling, block, scope)
        kept = _keep_mask((len(case.examples), *shape), rate, key, name, implementation)
        found[f"the mask of {path}, block {block}"] = kept
    return found


@contextmanager
def _using(implementation: str) -> Iterator[None]:
    """Operations that take no ``implementation``."""
    before = ops._chosen
    ops.use(implementation)
    try:
        yield
    finally:
        ops.use(before)
