"""Kernels other than attention on a GPU: both tracks, sizes of the model."""

import functools
import math
import os
import re
from typing import Any

import pytest
import torch

from tests import (
    kernel_checks,
    test_kernels_global,
    test_kernels_outer_product,
    test_kernels_projections,
    test_kernels_template,
    test_kernels_update,
)
from tests.test_kernels_jax import check as check_jax
from tests.test_kernels_jax import joined
from tests.test_kernels_rows import (
    check_transition,
    layer_norm,
    norm_arrays,
    poisoned,  # noqa: F401, a fixture
    transition,
    transition_arrays,
)
from tests.test_kernels_triangle import Case, arrays, check
from torchfold import projections

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is here as well

pytestmark = pytest.mark.gpu

BFLOAT16 = torch.bfloat16
DTYPES = (torch.float32, BFLOAT16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(65536, 128), (32768, 256), (70001, 64), (1029, 384), (257, 37), (129, 1000), (1, 128)],
    ids=str,
)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kernel_checks.check(layer_norm, norm_arrays(shape, seed=0), dtype)


@pytest.mark.parametrize(
    ("shape", "f", "dtype"),
    [
        ((256, 256, 128), 512, BFLOAT16),
        ((128, 256, 256), 1024, BFLOAT16),
        ((512, 256, 64), 256, BFLOAT16),
        ((70001, 64), 256, BFLOAT16),
        ((4, 129, 129, 64), 128, BFLOAT16),
        ((257, 96), 384, BFLOAT16),
        ((1, 128), 512, BFLOAT16),
        ((1029, 128), 512, torch.float32),
        ((1029, 256), 1024, torch.float32),
        ((257, 37), 50, torch.float32),
    ],
    ids=str,
)
def test_transition(shape: tuple[int, ...], f: int, dtype: torch.dtype) -> None:
    check_transition(transition_arrays(shape, f, seed=0), f != 128, dtype)


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        # without residual, which is five times the rest of the gradient and hides its errors
        {"residues": 256, "c": 128, "h": 128, "dropout": True},
        {"residues": 256, "c": 128, "h": 128, "dropout": True, "residual": True},
        {"residues": 384, "c": 128, "h": 128, "residual": True},
        {"residues": 256, "c": 64, "h": 64, "batch": 4, "dropout": True, "residual": True},
        {"residues": 257, "c": 128, "h": 128},
        {"residues": 129, "c": 128, "h": 64, "batch": 2, "dropout": True},
        {"residues": 37, "c": 40, "h": 72},
        {"residues": 7, "c": 16, "h": 16},
        {"residues": 1, "c": 128, "h": 128},
        {"residues": 129, "c": 128, "h": 128, "dtype": torch.float32, "dropout": True},
        {"residues": 64, "c": 64, "h": 64, "dtype": torch.float32, "residual": True},
    ],
    ids=str,
)
def test_triangle_multiplication(sizes: dict[str, int], outgoing: bool) -> None:
    check(Case(**{"dtype": BFLOAT16, **sizes}, outgoing=outgoing))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "c", "shared"),
    [
        ((1, 128, 256), 256, 256, 1),
        ((1, 256, 256), 128, 128, 2),
        ((2, 128, 257), 256, 256, 0),
        ((4, 129, 129), 64, 64, 2),
        ((1, 1024, 256), 64, 64, 1),
        ((1, 37, 7), 40, 72, 1),
        ((1, 1, 1), 256, 256, 1),
    ],
    ids=str,
)
def test_linear_update(
    rows: tuple[int, int, int], k: int, c: int, shared: int, dtype: torch.dtype
) -> None:
    test_kernels_update.check(test_kernels_update.Case(rows, k, c, shared, dtype=dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "c"),
    [((1, 128, 256), 256), ((1, 384, 256), 128), ((4, 256, 192), 64), ((2, 250, 256), 64)],
    ids=str,
)
def test_linear_update_of_rows_that_fill_their_tiles(
    rows: tuple[int, int, int], c: int, shared: int, residual: bool, transposed: bool
) -> None:
    """But for transposed rows in the last case, and of 256 channels."""
    case = test_kernels_update.Case(rows, c, c, shared, residual, BFLOAT16, transposed)
    test_kernels_update.check(case)


@pytest.mark.parametrize(
    "sizes",
    [
        {"residues": 256, "sequences": 128},
        {"residues": 257, "sequences": 1024},
        {"residues": 129, "sequences": 7, "batch": 2},
        {"residues": 37, "c": 24, "e": 20, "z": 72},
        {"residues": 1, "sequences": 1},
        {"residues": 256, "sequences": 128, "residual": True},
        {"residues": 136, "sequences": 100, "batch": 2, "residual": True},
        {"residues": 40, "sequences": 20, "c": 24, "e": 20, "z": 72},
        {"residues": 64, "sequences": 37, "dtype": torch.float32},
    ],
    ids=str,
)
def test_outer_product_mean(sizes: dict[str, int]) -> None:
    defaults = {"c": 32, "e": 32, "z": 128, "dtype": BFLOAT16}
    test_kernels_outer_product.check(test_kernels_outer_product.Case(**defaults | sizes))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "h", "dtype"),
    [
        ((1, 256, 256, 128), 8, BFLOAT16),
        ((4, 256, 256, 64), 4, BFLOAT16),
        ((2, 257, 129, 128), 4, BFLOAT16),
        ((1, 37, 129, 384), 8, BFLOAT16),
        ((1, 7, 37, 37), 5, BFLOAT16),
        ((1, 1, 1, 128), 8, BFLOAT16),
        ((1, 129, 64, 128), 8, torch.float32),
        ((2, 37, 7, 384), 4, torch.float32),
    ],
    ids=str,
)
def test_pair_bias(shape: tuple[int, int, int, int], h: int, dtype: torch.dtype, axis: int) -> None:
    test_kernels_projections.check(test_kernels_projections.Case(shape, h, axis, dtype))


@pytest.mark.parametrize(
    ("shape", "e", "dtype"),
    [
        ((1, 128, 256, 256), 32, BFLOAT16),
        ((1, 1024, 256, 64), 32, BFLOAT16),
        ((2, 129, 257, 256), 32, BFLOAT16),
        ((1, 7, 37, 384), 32, BFLOAT16),
        ((1, 37, 7, 37), 5, BFLOAT16),
        ((1, 1, 1, 256), 32, BFLOAT16),
        ((1, 37, 129, 256), 32, torch.float32),
        ((2, 9, 37, 64), 32, torch.float32),
    ],
    ids=str,
)
def test_outer_product_sides(shape: tuple[int, int, int, int], e: int, dtype: torch.dtype) -> None:
    test_kernels_projections.check_sides(test_kernels_projections.Sides(shape, e, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"table": (1, 1024, 256)},
        {"table": (1, 1000, 257), "empty": 3},
        {"table": (2, 129, 37), "axis": 2},
        {"table": (1, 512, 128), "axis": 2, "heads": 4, "width": 16},
        {"table": (1, 7, 64), "heads": 3, "width": 6, "c": 37},
        {"table": (2, 300, 5), "heads": 8, "width": 32, "c": 256},
        {"table": (2, 1, 3)},
    ],
    ids=str,
)
def test_global_attention(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    case = test_kernels_global.Case(**{"c": 64, "heads": 8, "width": 8, **sizes, "dtype": dtype})
    test_kernels_global.check_attention(case)
    test_kernels_global.check_mean(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"pairs": (1, 256, 256)},
        {"pairs": (2, 129, 129), "templates": 3, "empty": True},
        {"pairs": (1, 37, 7), "templates": 20, "heads": 3, "width": 6},
        {"pairs": (1, 64, 64), "templates": 2, "heads": 8, "width": 64},
        {"pairs": (1, 1, 1), "templates": 1},
    ],
    ids=str,
)
def test_template_attention(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    case = {"heads": 4, "width": 16, **sizes, "dtype": dtype}
    test_kernels_template.check(test_kernels_template.Case(**case))


def test_torch_operations_compile() -> None:
    given = {k: x.cuda() for k, x in transition_arrays((3, 50, 32), 64, seed=0).items()}
    seed = given.pop("seed")

    def loss(**leaves: torch.Tensor) -> torch.Tensor:
        vectors = leaves["scale"], leaves["offset"]
        y = layer_norm("triton", 2 * leaves["x"], *vectors)
        given = y[None], *vectors, leaves["weights1"]
        bias, pair = projections.pair_bias(*given, implementation="triton")
        inputs = {**leaves, "x": pair[0] * torch.mean(bias)}
        return torch.sum(seed * transition(residual=True)("triton", **inputs))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = {k: x.clone().requires_grad_() for k, x in given.items()}
        function(**leaves).backward()
        results.append({k: x.grad for k, x in leaves.items()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-4)


def jax_function(op: str, **options: Any):  # type: ignore[no-untyped-def]
    """A JAX operation of named arrays, which come in the order of their names."""
    from jaxfold import ops, projections

    def run(implementation: str, **given):  # type: ignore[no-untyped-def]
        if op in vars(projections):
            function = functools.partial(getattr(projections, op), **options)
            return joined(function(**given, implementation=implementation))
        function = functools.partial(getattr(ops, op), **options, implementation=implementation)
        if op != "triangle_multiplication":
            return function(**given)
        names = ("pair", "pair_mask", "factor", *ops.TriangleParameters._fields)
        return function(*(given[name] for name in names))

    return run


TRIANGLE = Case(64, c=128, h=128, dropout=True)


@pytest.mark.parametrize("outgoing", [True, False])
def test_jax_triangle_multiplication(outgoing: bool) -> None:
    function = jax_function("triangle_multiplication", outgoing=outgoing, residual=True)
    check_jax(function, arrays(TRIANGLE))


def test_jax_layer_norm_and_transition() -> None:
    check_jax(jax_function("layer_norm"), norm_arrays((2, 129, 128), seed=0))
    given = transition_arrays((2, 129, 128), 512, seed=0)
    check_jax(jax_function("transition", residual=True), given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_jax_linear_update(shared: int, transposed: bool) -> None:
    case = test_kernels_update.Case((2, 33, 64), 256, 256, shared, transposed=transposed)
    function = jax_function("linear_update", residual=True, transposed=transposed)
    check_jax(function, test_kernels_update.arrays(case))


def test_jax_outer_product_mean() -> None:
    case = test_kernels_outer_product.Case(64, sequences=33, c=32, e=32, z=128, residual=True)
    check_jax(jax_function("outer_product_mean"), test_kernels_outer_product.arrays(case))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_jax_pair_bias(axis: int) -> None:
    case = test_kernels_projections.Case((2, 33, 64, 128), 4, axis)
    named = jax_function("layer_norm_pair_bias", axis=axis) if axis else jax_function("pair_bias")
    check_jax(named, test_kernels_projections.arrays(case))


def test_jax_outer_product_sides() -> None:
    case = test_kernels_projections.Sides((2, 33, 64, 256), 32)
    check_jax(jax_function("outer_product_sides"), test_kernels_projections.side_arrays(case))


def test_jax_global_attention() -> None:
    case = test_kernels_global.Case((2, 129, 64), c=64, heads=8, width=8, empty=1)
    check_jax(
        jax_function("global_attention", axis=1, scale=0.35),
        test_kernels_global.attention_arrays(case),
    )


def test_jax_projection_with_mean() -> None:
    import jax.numpy as jnp

    project = jax_function("project_with_mean", axis=1)

    def run(implementation, **given):  # type: ignore[no-untyped-def]
        projected, mean = project(implementation, **given)
        return (mean * (1 + jnp.sum(projected, axis=(1, 3))[..., None])).ravel()

    case = test_kernels_global.Case((2, 129, 64), c=64, heads=8, width=8, empty=1)
    check_jax(run, test_kernels_global.mean_arrays(case))


def test_jax_template_attention() -> None:
    case = test_kernels_template.Case((2, 33, 64), heads=4, width=16, empty=True)
    check_jax(jax_function("template_attention"), test_kernels_template.arrays(case))


def test_jax_operations_add_no_copies() -> None:
    """Around the kernels there are only matrix products and slices of small gradients."""
    import jax.numpy as jnp

    function = jax_function("triangle_multiplication", outgoing=True, residual=True)
    given = {k: jnp.asarray(x.numpy()).astype(jnp.bfloat16) for k, x in arrays(TRIANGLE).items()}
    given |= {k: given[k].astype(jnp.float32) for k in ("pair_mask", "factor")}
    seed = given.pop("seed")
    check_moves(lambda x: function("triton", **x), given, seed, least=9)


@pytest.mark.parametrize("axis", [1, 2])
def test_jax_projections_add_no_copies(axis: int) -> None:
    import jax.numpy as jnp

    from jaxfold import projections

    def function(given):  # type: ignore[no-untyped-def]
        options = {"axis": axis, "implementation": "triton"}
        normal, bias, pair = projections.layer_norm_pair_bias(**given, **options)
        return normal @ weights, bias, pair + 1

    given = test_kernels_projections.arrays(test_kernels_projections.Case((1, 64, 64, 128), 4))
    given = {k: jnp.asarray(x.numpy()).astype(jnp.bfloat16) for k, x in given.items()}
    del given["seed"]
    weights = jnp.ones((128, 256), jnp.bfloat16)
    grads = (64, 64, 256), (4, 64, 64), (64, 64, 128)
    seed = tuple(jnp.ones((1, *shape), jnp.bfloat16) for shape in grads)
    check_moves(function, given, seed, least=3)


def test_jax_triangle_attention_adds_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around ending nodes, where kernels leave arrays transposed; that of the mask is small."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxfold import ops, triangle

    monkeypatch.setattr(ops, "_chosen", "triton")
    definition, state = nnx.split(triangle.TriangleAttentionEndingNode(128, 4, 32))
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), state)
    pair, mask = jnp.ones((1, 64, 64, 128), jnp.bfloat16), jnp.ones((1, 64, 64))
    factor = jnp.ones((1, 64, 1, 128))

    def function(given):  # type: ignore[no-untyped-def]
        state, pair = given
        return nnx.merge(definition, state)(pair, mask, factor, residual=True)

    check_moves(function, (state, pair), pair, least=9)


def check_moves(function, given, seed, least: int) -> None:  # type: ignore[no-untyped-def]
    """As many launches of kernels at least, and no large array written out in another order."""
    import jax

    def step(given, seed):  # type: ignore[no-untyped-def]
        output, backward = jax.vjp(function, given)
        return output, backward(seed)

    text = jax.jit(step).lower(given, seed).compile().as_text()
    launches = re.findall(r'custom_call_target="twinfold_triton".*op_name="([^"]*)"', text)
    assert len(launches) >= least, f"launches of kernels: {launches}"
    moved = [line for line in text.splitlines() if _size_of_move(line) >= 64 * 64 * 128]
    assert not moved, "arrays are written out in another place or order:\n" + "\n".join(moved)


def _size_of_move(line: str) -> int:
    """Elements that a line of XLA's program copies, transposes or joins."""
    found = re.search(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|concatenate)\(", line)
    return math.prod(map(int, found[1].split(","))) if found else 0
