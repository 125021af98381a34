"""The JAX track's side of the kernels: what it launches, saves and returns as gradients.

A kernel needs a GPU, so here a launch goes through PyTorch's wrapper into Triton's interpreter.
The kernels themselves are tested elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import tests.triton_interpreter  # noqa: F401
from foldcore import dropout as definition
from foldcore.config import ModelConfig
from foldcore.kernels.launch import INTERPRETER, Launch
from jaxfold import (
    _attention,
    _dropout,
    _global_attention,
    _linear_update,
    _outer_product,
    _projections,
    _rows,
    _template_attention,
    _triangle,
    ops,
    projections,
    triangle,
)
from jaxfold.primitives import DropoutKey, keep_mask
from jaxfold.step import TRUNK, Network
from tests import (
    test_kernels_global,
    test_kernels_outer_product,
    test_kernels_projections,
    test_kernels_rows,
    test_kernels_template,
    test_kernels_triangle,
    test_kernels_triangle_attention,
    test_kernels_update,
)
from tests.test_kernels_triangle import Case
from torchfold import _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself")

Arrays = dict[str, jax.Array]


def call(launch: Launch, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = _triton.call(launch, *(torch.from_numpy(np.array(x)) for x in arrays))
        return tuple(x.numpy() for x in outputs)

    shapes = tuple(jax.ShapeDtypeStruct(o.shape, np.dtype(o.dtype)) for o in launch.outputs)
    return jax.pure_callback(run, shapes, *inputs)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_calls(monkeypatch, call)


def replace_calls(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]) -> None:
    """Kernels of the JAX track are launched by ``call``."""
    kernels = _dropout, _global_attention, _linear_update, _outer_product, _projections, _rows
    for module in (*kernels, _attention, _template_attention, _triangle):
        monkeypatch.setattr(module, "call", call)
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda: INTERPRETER)


def check(function: Callable[..., jax.Array], given: dict[str, torch.Tensor]) -> None:
    """The kernels' result and gradients by all arrays but masks are the reference's."""
    arrays = {name: jnp.asarray(x.numpy()) for name, x in given.items()}
    grad = arrays.pop("seed")
    names = ("mask", "pair_mask", "factor")
    constant = {name: arrays.pop(name) for name in names if name in arrays}

    def results(implementation: str) -> Any:
        def run(arrays: Arrays) -> jax.Array:
            return function(implementation, **arrays, **constant)

        output, backward = jax.vjp(run, arrays)
        return {"output": output, **backward(grad)[0]}

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(results, static_argnums=0)("reference")
        kernels = jax.jit(results, static_argnums=0)("triton")
    for name, found in kernels.items():
        error = float(jnp.linalg.norm(found - expected[name]) / jnp.linalg.norm(expected[name]))
        assert error < 1e-4, f"{name}: {error:.1e} of its norm"


def test_layer_norm() -> None:
    def run(implementation: str, x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
        return ops.layer_norm(x, scale, offset, implementation=implementation)

    check(run, test_kernels_rows.norm_arrays((2, 5, 24), seed=0))


def test_layer_norm_with_what_goes_around_it() -> None:
    def run(implementation: str, x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
        normal, x = ops.layer_norm_residual(x, scale, offset, implementation=implementation)
        return jnp.sin(normal) + 2 * x

    check(run, test_kernels_rows.norm_arrays((2, 5, 24), seed=0))


def test_transition() -> None:
    def run(implementation: str, **arrays: jax.Array) -> jax.Array:
        return ops.transition(**arrays, residual=True, implementation=implementation)

    given = test_kernels_rows.transition_arrays((2, 5, 24), 40, seed=0)
    check(run, given)
    # in one pass where no gradient is wanted
    arrays = {name: jnp.asarray(x.numpy()) for name, x in given.items() if name != "seed"}
    with jax.default_matmul_precision("highest"):
        expected, found = (jax.jit(run, static_argnums=0)(x, **arrays) for x in ops.IMPLEMENTATIONS)
    assert jnp.linalg.norm(found - expected) < 1e-4 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_linear_update(shared: int, transposed: bool) -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        options: Any = {"transposed": transposed, "implementation": implementation}
        return ops.linear_update(**given, residual=True, **options)

    case = test_kernels_update.Case((2, 5, 7), 16, 24, shared, transposed=transposed)
    check(run, test_kernels_update.arrays(case))


@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication(outgoing: bool) -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        return ops.triangle_multiplication(
            given["pair"],
            given["pair_mask"],
            given.get("factor"),
            *(given[name] for name in ops.TriangleParameters._fields),
            outgoing=outgoing,
            residual=True,
            implementation=implementation,
        )

    check(run, test_kernels_triangle.arrays(Case(5, c=24, h=16, batch=2, dropout=outgoing)))


@pytest.mark.parametrize("kind", ["StartingNode", "EndingNode"])
def test_triangle_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [getattr(test_kernels_triangle_attention, name) for name in ("C", "HEADS", "WIDTH")]

    def run(implementation: str, pair: jax.Array, **given: jax.Array) -> jax.Array:
        monkeypatch.setattr(ops, "_chosen", implementation)
        module = getattr(triangle, f"TriangleAttention{kind}")(*sizes)
        inputs = (pair, given.pop("pair_mask"), given.pop("factor"))
        for path, x in given.items():
            owner, _, name = path.rpartition(".")
            setattr(getattr(module, owner) if owner else module, name, nnx.Param(x))
        return module(*inputs, residual=True)

    check(run, test_kernels_triangle_attention.arrays(2, 7, 2))


@pytest.mark.parametrize("axis", [1, 2])
def test_global_attention(axis: int) -> None:
    """With the projection before it, whose second result is the query."""

    def run(implementation: str, x: jax.Array, weights: jax.Array, **given: jax.Array) -> jax.Array:
        options: Any = {"axis": axis, "implementation": implementation}
        projected, mean = ops.project_with_mean(x, given["mask"], weights, **options)
        query = mean[..., None, :8] * given.pop("query")
        return ops.global_attention(query, projected, scale=0.7, **given, **options)

    case = test_kernels_global.Case((2, 9, 7), axis=axis, empty=1)
    given = test_kernels_global.attention_arrays(case)
    del given["projected"]
    mean = test_kernels_global.mean_arrays(case)
    check(run, {"x": mean["x"], "weights": mean["weights"], **given})


def test_template_attention() -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        return ops.template_attention(**given, scale=0.4, implementation=implementation)

    check(run, test_kernels_template.arrays(test_kernels_template.Case((2, 3, 5), templates=3)))


def test_outer_product_mean() -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        return ops.outer_product_mean(**given, implementation=implementation)

    for residual in (False, True):
        case = test_kernels_outer_product.Case(5, c=8, e=4, batch=2, residual=residual)
        check(run, test_kernels_outer_product.arrays(case))


def joined(results: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate([jnp.sin(x).mT.ravel() for x in results])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pair_bias(axis: int) -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        if not axis:
            return joined(projections.pair_bias(**given, implementation=implementation))
        options: dict[str, Any] = {"axis": axis, "implementation": implementation}
        return joined(projections.layer_norm_pair_bias(**given, **options))

    case = test_kernels_projections.Case((2, 5, 7, 24), 4, axis)
    check(run, test_kernels_projections.arrays(case))


def test_outer_product_sides() -> None:
    def run(implementation: str, **given: jax.Array) -> jax.Array:
        return joined(projections.outer_product_sides(**given, implementation=implementation))

    case = test_kernels_projections.Sides((2, 5, 7, 24), 6)
    check(run, test_kernels_projections.side_arrays(case))


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 9, 700), (1, 3)])
def test_dropout_masks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel and by plain operations, in a loop over blocks, they are the defined ones."""
    seed, rate, path, ids = 2**32 - 5, 0.25, "a/b", np.array([3, -2][: shape[0]], np.int32)

    def masks(step: jax.Array) -> jax.Array:
        def draw(_: None, block: jax.Array) -> tuple[None, jax.Array]:
            given = DropoutKey(seed, step, jnp.asarray(ids), jnp.int32(1), block, "a")
            return None, keep_mask(shape, rate, given, "b")

        return jax.lax.scan(draw, None, jnp.arange(3))[1]

    for implementation in ops.IMPLEMENTATIONS:
        monkeypatch.setattr(ops, "_chosen", implementation)
        found = jax.jit(masks)(jnp.int32(7))
        for block, mask in enumerate(found):
            numbers = {"seed": seed, "step": 7, "example_id": ids, "block": block, "recycling": 1}
            expected = definition.keep_mask(shape, rate, path=path, **numbers)
            np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_arrays_of_their_own(dtype: str) -> None:
    """A kernel given a part of the flat buffer would read at addresses that it is not made for."""
    network = Network(ModelConfig(dtype=dtype, evoformer_blocks=1))
    flat = jax.ShapeDtypeStruct((network.layout.size,), jnp.float32)
    found = set(makers(network.unflatten, flat).values())
    assert found <= {"optimization_barrier", "convert_element_type"}


@pytest.mark.parametrize("width", [384, 100])
def test_parts_of_the_rounded_parameters_begin_where_kernels_can_read(width: int) -> None:
    """Others are arrays of their own: of a trunk with 100 channels, say."""
    network = Network(ModelConfig(c_s=width, evoformer_blocks=1))
    size = network.layout.size
    flat, rounded = (jax.ShapeDtypeStruct((size,), x) for x in (jnp.float32, jnp.bfloat16))
    found = makers(network.unflatten, flat, rounded)
    begins = {name: 2 * offset for name, _, offset in network.layout}
    parts = {name for name, maker in found.items() if maker != "optimization_barrier"}
    assert parts and {begins[name] % 16 for name in parts} == {0}
    trunk = {name for name in begins if name.startswith(TRUNK)}
    assert (parts == trunk) == (width == 384)


def makers(function: Any, *shapes: Any) -> dict[str, str]:
    """What makes each of the named arrays that a function returns."""
    names = list(jax.eval_shape(function, *shapes))
    program = jax.make_jaxpr(function)(*shapes).jaxpr
    made = {out: e.primitive.name for e in program.eqns for out in e.outvars}
    return {name: made[out] for name, out in zip(sorted(names), program.outvars, strict=True)}
