"""What modules derive from parameters: once for a stack, and no gradient differs."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils._python_dispatch import TorchDispatchMode

import jaxfold.evoformer
import jaxfold.ops
import jaxfold.params
import jaxfold.stack
import jaxfold.template
import jaxfold.triangle
import torchfold.evoformer
import torchfold.ops
import torchfold.params
import torchfold.stack
import torchfold.template
import torchfold.triangle
from foldcore.kernels.launch import Launch
from tests import test_kernels_jax
from torchfold import _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself")

MSA, PAIR = (1, 4, 5, 16), (1, 5, 5, 8)
SIZES = {"msa_heads": 2, "msa_head_dim": 8, "pair_heads": 2, "pair_head_dim": 4}
SIZES |= {"outer_product_hidden": 4, "triangle_hidden": 8, "transition_factor": 2}
DROPOUT = {"msa_dropout": 0.0, "pair_dropout": 0.0}
# one for all blocks, of each kind of triangle multiplication
ONCE = {"triangle_fold_kernel": 2, "triangle_fold_backward_kernel": 2}
COPIES = ("stack", "cat", "concatenate", "clone", "copy_", "copy")


def extra_stack(track: Any, count: int, global_column: bool, unroll: bool = True) -> Any:
    options: dict[str, Any] = SIZES | DROPOUT | {"global_column_attention": global_column}
    block = track.evoformer.EvoformerBlock(16, 8, **options)
    return track.evoformer.ExtraMSAStack(block, count, unroll=unroll)


# Launches -----------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def in_torch(count: int, global_column: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Operations of so many blocks and their gradient; launches are noted, not made."""
    monkeypatch.setattr(torchfold.ops, "_chosen", "triton")
    noted: list[Any] = []
    monkeypatch.setattr(_triton, "_noted", noted)
    stacked = extra_stack(torchfold, count, global_column)
    inputs = tuple(torch.ones(shape, requires_grad=True) for shape in (MSA, PAIR))
    masks = [torch.ones(shape[:-1]) for shape in (MSA, PAIR)]
    leaves = [*inputs, *stacked.parameters()]
    with Operations() as operations:
        torch.autograd.grad(stacked(*inputs, *masks).sum(), leaves, allow_unused=True)
    return operations.count + Counter(launch.kernel.fn.__name__ for launch, _ in noted)


def in_jax(count: int, global_column: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The same of a program with all blocks written out."""
    monkeypatch.setattr(jaxfold.ops, "_chosen", "triton")
    test_kernels_jax.replace_calls(monkeypatch, named)
    graph, state = nnx.split(extra_stack(jaxfold, count, global_column))
    inputs = tuple(jnp.ones(shape) for shape in (MSA, PAIR))
    masks = [jnp.ones(shape[:-1]) for shape in (MSA, PAIR)]

    def loss(state: Any, inputs: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state)(*inputs, *masks))

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(state, inputs)
    return Counter(names(program.jaxpr))


def named(launch: Launch, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Something of the kernel's name."""

    def outputs(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        del inputs
        return tuple(jnp.zeros(o.shape, o.dtype) for o in launch.outputs)

    outputs.__name__ = launch.kernel.fn.__name__
    return jax.jit(outputs, inline=False)(*inputs)


def names(program: Any) -> Iterator[str]:
    """Of all operations, and of all functions at each of their calls."""
    for equation in program.eqns:
        yield equation.params.get("name", equation.primitive.name)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from names(inner.jaxpr)


def is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.ClosedJaxpr)


@pytest.mark.parametrize("global_column", [False, True])
@pytest.mark.parametrize("count_in", [in_torch, in_jax])
def test_a_stack_derives_once(
    count_in: Callable[..., Counter[str]], global_column: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, three = (count_in(count, global_column, monkeypatch) for count in (2, 3))
    assert {name: three[name] for name in ONCE} == ONCE
    more = three - two
    assert more["triangle_project_kernel"] == 2, "a block more has to be seen"
    assert not {name: more[name] for name in COPIES if more[name]}


def stack_of(track: Any, kind: str) -> Any:
    """Two blocks, with parameters that are drawn."""
    if kind == "templates":
        sizes = {"num_heads": 2, "c_hidden": 4, "triangle_hidden": 8, "transition_factor": 2}
        block = track.template.TemplatePairBlock(8, **sizes, dropout_rate=0.0)
        stacked = track.template.TemplatePairStack(block, 2)
    elif kind == "extra":
        stacked = extra_stack(track, 2, False, unroll=False)
    else:
        block = track.evoformer.EvoformerBlock(16, 8, **SIZES, **DROPOUT)
        stacked = track.evoformer.EvoformerStack(block, 2, 16, 4)
    shapes = {name: tuple(x.shape) for name, x in track.params.parameters(stacked).items()}
    numbers = np.random.default_rng(0)
    arrays = {name: numbers.normal(size=shape, scale=0.5) for name, shape in shapes.items()}
    track.params.load_parameters(stacked, {n: x.astype(np.float32) for n, x in arrays.items()})
    return stacked


@pytest.mark.parametrize("kind", ["templates", "extra", "evoformer"])
@pytest.mark.parametrize("track", [jaxfold, torchfold])
def test_a_mask_is_transposed_for_all_blocks(track: Any, kind: str) -> None:
    """As blocks do it themselves; the mask of pairs is not symmetrical, nor is that of the MSA."""
    stacked, numbers = stack_of(track, kind), np.random.default_rng(1)
    given = [numbers.normal(size=shape) for shape in (MSA, PAIR)]
    given += [numbers.random(shape[:-1]) > 0.4 for shape in (MSA, PAIR)]
    array: Any = jnp.asarray if track is jaxfold else torch.from_numpy
    inputs = [array(x.astype(np.float32)) for x in given]
    inputs = inputs[1::2] if kind == "templates" else inputs
    carry, masks = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]

    def call(block: Any, carry: Any, _: Any) -> Any:
        return block(carry, *masks) if kind == "templates" else block(*carry, *masks)

    with torch.no_grad():
        found = stacked(*inputs)
        start = carry[0] if kind == "templates" else tuple(carry)
        expected = track.stack.run(stacked.blocks, start, call)
    found = found[1] if kind == "evoformer" else found
    expected = expected if kind == "templates" else expected[1]
    assert float(abs(found - expected).max()) < 1e-4 * float(abs(expected).max())


# Gradients ----------------------------------------------------------------------------------------

KINDS = ("TriangleMultiplicationIncoming", "TriangleAttentionEndingNode")
ARGUMENTS = {KINDS[0]: (8, 16), KINDS[1]: (8, 2, 4)}


def drawn(track: Any, kind: str, dtype: str) -> tuple[Any, np.ndarray]:
    """Two layers of a module, and pairs."""
    module = track.stack.stack(getattr(track.triangle, kind)(*ARGUMENTS[kind]), 2)
    numbers = np.random.default_rng(0)
    shapes = {name: tuple(x.shape) for name, x in track.params.parameters(module).items()}
    arrays = {name: numbers.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    track.params.load_parameters(module, arrays)
    return module, numbers.normal(size=PAIR).astype(dtype)


def torch_gradients(kind: str, dtype: str, recompute: Any = "none") -> dict[str, np.ndarray]:
    """By all parameters; the second layer's result."""
    module, pair = drawn(torchfold, kind, dtype)
    mask = torch.ones(PAIR[:-1])

    def call(block: Any, x: torch.Tensor, _: int) -> torch.Tensor:
        return block(x, mask, None, True)

    out = torchfold.stack.run(module, torch.from_numpy(pair), call, recompute)
    parameters = torchfold.params.parameters(module)
    found = torch.autograd.grad(out.square().sum(), list(parameters.values()))
    named = dict(zip(parameters, found, strict=True))
    return {name: x.detach().numpy() for name, x in (named | {"result": out}).items()}


def jax_gradients(kind: str, dtype: str, recompute: Any = "none") -> dict[str, np.ndarray]:
    """The same in JAX."""
    module, pair = drawn(jaxfold, kind, dtype)
    mask = jnp.ones(PAIR[:-1])

    def loss(module: Any) -> tuple[jax.Array, jax.Array]:
        call: Any = lambda block, x, _: block(x, mask, None, True)  # noqa: E731
        out = jaxfold.stack.run(module, jnp.asarray(pair), call, recompute)
        return jnp.sum(jnp.square(out)), out

    gradient, out = nnx.grad(loss, has_aux=True)(module)
    leaves = jax.tree.flatten_with_path(gradient)[0]
    named = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return named | {"result": np.asarray(out)}


@pytest.mark.parametrize(
    ("track", "implementation", "dtype", "recompute"),
    [
        (torchfold, "reference", "float64", "block"),
        (torchfold, "triton", "float32", "none"),
        (torchfold, "triton", "float32", "block"),
        (jaxfold, "reference", "float32", "block"),
        (jaxfold, "triton", "float32", "none"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_blocks_that_derive_for_themselves(
    kind: str,
    track: Any,
    implementation: str,
    dtype: str,
    recompute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(track.ops, "_chosen", implementation)
    test_kernels_jax.replace_calls(monkeypatch, test_kernels_jax.call)
    gradients = jax_gradients if track is jaxfold else torch_gradients
    found = gradients(kind, dtype, recompute)
    nothing: Any = (lambda blocks: blocks) if track is jaxfold else (lambda blocks: {})
    monkeypatch.setattr(track.stack, "_derive", nothing)
    expected = gradients(kind, dtype)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert np.abs(want).max() > 0, name
        error = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
        assert error < 1e-5, f"{name}: {error:.1e} of its norm"
