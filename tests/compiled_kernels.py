"""Compiles kernels for an H100 on any machine, and looks for a race in what Triton made of them.

Triton 3.6 may keep a tile that a loop loads in one buffer only, although the next iteration's copy
into it starts before the matrix product that reads it has ended: seen where the tile was stored or
summed as well. Results were wrong by a tenth then, and only at some sizes.

Run as a program, for Triton compiles in no process in which its interpreter is chosen.
"""

import importlib
import itertools
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

import foldcore.kernels
from foldcore.config import OptimizerConfig
from foldcore.kernels import (
    attention,
    attention_backward,
    attention_bias,
    attention_long,
    dropout,
    global_attention,
    global_attention_backward,
    group_mean,
    layer_norm,
    linear_update,
    norm_project,
    norm_project_backward,
    optimizer,
    outer_product,
    outer_product_on_chip,
    outer_product_on_chip_backward,
    rows,
    template_attention,
    transition,
    transition_backward,
    transition_layers,
    transition_pipelined,
    transition_pipelined_backward,
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
    triangle_pipelined,
    triangle_product,
)
from foldcore.kernels.attention_tiles import Problem, choose
from foldcore.kernels.launch import Launch, Output, options
from foldcore.kernels.source import source_type

TARGET = GPUTarget("cuda", 90, 32)
KIND = "bfloat16", 90
TYPES = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "uint8": "*u8"}
# inputs of these names, or of these kernels, are float32
FLOAT32 = (
    *("mask_ptr", "factor_ptr", "count_ptr", "logsumexp_ptr", "delta_ptr", "gathered_ptr"),
    "parts_ptr",
    *("rstd_ptr", "center_mean_ptr", "center_rstd_ptr", "slope_ptr", "sums_ptr"),
    *("folded_bias_ptr", "output_folded_bias_ptr"),
    *("dfolded_bias_ptr", "doutput_folded_bias_ptr"),
    *("gradient_ptr", "params_ptr", "mu_ptr", "nu_ptr", "ema_ptr", "coefficients_ptr"),
)
ALL_FLOAT32 = (
    "optimizer_squares_kernel",
    *("column_sums_kernel", "two_column_sums_kernel"),
)


def launches() -> Iterator[Launch]:
    """Every kernel at the sizes of the model: each of the launch sizes chosen for an H100."""
    for problem in problems():
        yield from attentions(problem)
    for n, c in ((65536, 128), (32768, 256), (4 * 65536, 64)):
        yield layer_norm.forward(n, c, *KIND)
        yield layer_norm.backward(n, c, *KIND, residual=True)
        yield from transitions(n, c, 4 * c)
        for residues, side in itertools.product((256, 250), (0, linear_update.SIDE)):
            shape = linear_update.Shape(1, n // 256, residues, shared=1, side=side)
            yield linear_update.forward(shape, c, c, *KIND, residual=True)
            yield linear_update.backward(shape, c, c, *KIND)
    for b, c, residues in ((1, 128, 256), (4, 64, 256), (1, 128, 250)):
        pairs = residues * residues
        yield triangle_fold.forward(48, c, c, KIND[0])
        yield triangle_fold.rstd(b, pairs, c, KIND[0])
        yield triangle.project(b, pairs, c, c, *KIND)
        yield triangle.output(b, (residues, residues), c, c, *KIND, has_factor=True, residual=True)
        if triangle_pipelined.fits(b, pairs, c, c, *KIND):
            yield triangle_pipelined.project(b, pairs, c, c)
        for turned in ((False, True), (True, False), (False, False)):
            if triangle_product.fits(b * c, residues, *KIND):
                yield triangle_product.product(b * c, residues, turned)
        yield triangle_output_backward.output(b, (residues, residues), c, c, *KIND, has_factor=True)
        yield triangle_output_backward.center(b, pairs, c, c, *KIND, slopes=1)
        yield triangle_backward.project(b, pairs, c, c, *KIND)
        yield triangle_backward.norm(b * pairs, c, *KIND, residual=True)
        yield triangle_fold.backward(48, c, c, KIND[0])
    yield from global_attentions((1, 1024, 256), 64, 8, 8)
    yield from global_attentions((1, 1000, 250), 64, 8, 8)
    for residues in (256, 250):
        templates = template_attention.Problem(1, 4, residues * residues, 4, 16, 0.25, *KIND)
        yield template_attention.forward(templates)
        yield template_attention.backward(templates)
    outer = outer_product.Shape(256, 256, 32, 32, 128)
    yield outer_product.project(outer, *KIND, residual=True)
    for kernel in (outer_product.gradient, outer_product.weights):
        yield kernel(outer, *KIND)
    for residues in (256, 248):
        yield from outer_products_on_chip(
            outer_product_on_chip.Shape(1, 128, *[residues] * 2, 32, 32, 128)
        )
    yield from projections()
    yield from transitions(4 * 65536, 64, 128)
    yield from transitions(62500, 128, 512)
    yield from transitions(1000, 384, 1536)
    yield rows.column_sums(256, 512, *KIND)
    yield rows.two_column_sums((33, 512), (264, 384), KIND[0])
    yield optimizer.squares(93_000_000, KIND[1])
    for rounded in (False, True):
        yield optimizer.update(93_000_000, OptimizerConfig(), KIND[1], rounded)
    yield dropout.draw(programs=100, examples=1, total=100 * dropout.BLOCK)


def outer_products_on_chip(shape: outer_product_on_chip.Shape) -> Iterator[Launch]:
    """The kernels of an outer product mean of few sequences."""
    yield outer_product_on_chip.turned(shape.b * shape.s, shape.i, shape.c, KIND[0])
    yield outer_product_on_chip.project(shape, *KIND, residual=True)
    backward = outer_product_on_chip_backward
    yield backward.divide(shape.i * shape.j, shape.z, KIND[0])
    for left in (True, False):
        launch = backward.side_gradient(shape, KIND[1], left)
        yield launch
        yield backward.side_sum(launch.outputs[0].shape, KIND[0])
    yield backward.weights_gradient(shape, KIND[1])


def projections() -> Iterator[Launch]:
    """Norms with narrow projections: of rows and columns of pairs, of templates, of both MSAs."""
    for shape, h, axis in (
        ((1, 256, 256, 128), 8, 2),
        ((1, 256, 256, 128), 4, 1),
        ((4, 250, 250, 64), 4, 1),
    ):
        pairs, normal = norm_project.Pairs.of(shape, h, axis), h == 4
        yield norm_project.pair_bias(pairs, *KIND, normal)
        yield norm_project_backward.pair_bias(pairs, *KIND, normal, residual=True)
    for n, c in ((32768, 256), (262144, 64)):
        yield norm_project.outer_product_sides(n, c, 32, *KIND)
        yield norm_project_backward.outer_product_sides(n, c, 32, *KIND, residual=True)


def global_attentions(
    table: tuple[int, int, int], c: int, heads: int, width: int
) -> Iterator[Launch]:
    """The kernels of attention with one query a column, and of what goes before it."""
    n = (2 + heads) * width
    yield group_mean.forward(table, c, 1, *KIND)
    yield group_mean.backward(table, c, n, 1, *KIND)
    problem = global_attention.Problem(table, heads, width, 1, 0.35, *KIND)
    yield global_attention.forward(problem)
    yield global_attention_backward.backward(problem)


def transitions(n: int, c: int, f: int) -> Iterator[Launch]:
    """The kernels of a transition, with and without gradient."""
    yield transition.forward(n, c, f, *KIND, residual=True)
    if transition_pipelined.fits(n, c, f, *KIND):
        yield transition_pipelined.forward(n, c, f, residual=True, save=True)
        yield transition_pipelined_backward.backward(n, c, f, residual=True)
    yield transition_layers.hidden(n, c, f, *KIND)
    yield transition_layers.second(n, c, f, *KIND, residual=True)
    yield transition_backward.mask(n, c, f, *KIND)
    yield transition_backward.norm(n, c, *KIND, residual=True)


def problems() -> Iterator[Problem]:
    """Rows and columns of the MSA, templates, rows of the extra MSA, pairs of other crops."""
    for rows_, columns, heads, width, axis in (
        (128, 256, 8, 32, 2),
        (128, 256, 8, 32, 1),
        (256, 256, 4, 16, 2),
        (1024, 256, 8, 8, 2),
        (384, 384, 4, 32, 2),
        (250, 250, 4, 32, 2),
        (250, 250, 8, 8, 2),
    ):
        shape = (1, rows_, columns, 4, heads, width)
        yield Problem(shape, axis, 0.2, KIND[0], has_bias=axis == 2, architecture=KIND[1])


def attentions(problem: Problem) -> Iterator[Launch]:
    """The kernels that an attention launches."""
    yield attention.forward(problem)
    if problem.together:
        yield attention_bias.output_grad(problem)
        yield attention_bias.query_bias_grad(problem)
        yield attention_bias.query_bias_grad(problem, choose("query_bias_grad", problem))
        yield attention_long.key_value_grad(problem)
        yield attention_long.key_value_grad(problem, choose("key_value_grad", problem))
        return
    if problem.whole:
        yield attention_backward.whole_grad(problem)
    else:
        yield attention_long.query_grad(problem)
        yield attention_long.key_value_grad(problem)
    if problem.has_bias:
        yield attention_backward.bias_grad(problem)


@triton.jit
def racing_kernel(x_ptr, weights_ptr, y_ptr, C: tl.constexpr):
    """Stores the tiles that it multiplies: what Triton makes a race of."""
    row, column = tl.arange(0, 128)[:, None], tl.arange(0, 64)[None, :]
    inner = tl.arange(0, 64)[:, None]
    total = tl.zeros([128, 64], tl.float32)
    for c in range(0, C, 64):
        x = tl.load(x_ptr + row * C + c + column)
        tl.store(y_ptr + row * C + c + column, x)
        total += tl.dot(x, tl.load(weights_ptr + (c + inner) * 64 + column))
    tl.store(y_ptr + row * 64 + column, total.to(tl.bfloat16))


def racing() -> Launch:
    """A launch of it."""
    output = Output((128, 512), "bfloat16")
    return Launch(racing_kernel, (1,), (output,), {"C": 512}, num_warps=4, num_stages=2)


def compiled(launch: Launch) -> str:
    """What Triton makes of it, as text, in its last form that knows of buffers and products."""
    return lowered(source(launch), options(launch, TARGET.arch), ("ttir", "ttgir"))


def source(launch: Launch) -> ASTSource:
    """The kernel of a launch as Triton's compiler takes it."""
    names = list(launch.kernel.arg_names)
    pointers = [name for name in names if name not in launch.constants]
    kernel = launch.kernel.fn.__name__
    types = {name: input_type(kernel, name) for name in pointers}
    for name, output in zip(reversed(pointers), reversed(launch.outputs), strict=False):
        types[name] = TYPES[output.dtype]
    return source_type(launch.kernel)(
        launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )


def input_type(kernel: str, pointer: str) -> str:
    """As Triton writes it."""
    if kernel == "dropout_masks_kernel" or pointer == "signs_ptr":
        return "*i32"
    return "*fp32" if kernel in ALL_FLOAT32 or pointer in FLOAT32 else "*bf16"


def lowered(source: ASTSource, given: dict[str, Any], steps: Sequence[str]) -> str:
    """The first steps of ``triton.compile``, as the machine code tells no more."""
    backend, context, metadata = make_backend(TARGET), ir.context(), {}
    options = backend.parse_options(given)
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(TARGET, options, functions, backend.get_module_map(), context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    for name in steps:
        if name in stages:  # Gluon begins with the second
            module = stages[name](module, metadata)
    return str(module)


def races(text: str) -> list[str]:
    """Buffers that a loop overwrites while an unfinished product reads them."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    depths = dict(re.findall(r"(%\S+) = ttg\.local_alloc : .*?memdesc<(\d+)x", text))
    views = dict(re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%[\w#]+)", text))
    found = set()
    for start, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        rest = lines[start + 1 :]
        body = rest[: next(i for i, x in enumerate(rest) if re.match(f" {{{indent}}}}}", x))]
        found |= _overwritten(body, views, depths)
    return sorted(found)


def _overwritten(body: list[str], views: dict[str, str], depths: dict[str, str]) -> set[str]:
    def buffer(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    found: set[str] = set()
    unfinished: list[tuple[int, list[str]]] = []  # iteration and operands of products
    for iteration in range(3):
        for line in body:
            if dot := re.search(r"warp_group_dot (%[\w#]+), (%[\w#]+),", line):
                unfinished.append((iteration, [buffer(name) for name in dot.groups()]))
            elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
                unfinished = unfinished[max(0, len(unfinished) - int(wait[1])) :]
            elif copy := re.search(r"async_copy_global_to_local \S+, (%[\w#]+)", line):
                name = buffer(copy[1])
                for begun, operands in unfinished:
                    if name in operands and int(depths.get(name, 1)) - 1 <= iteration - begun:
                        found.add(f"{name} of depth {depths.get(name)}")
    return found


def kernels() -> set[str]:
    """The names of all kernels."""
    found = set()
    for module in pkgutil.iter_modules(foldcore.kernels.__path__):
        members = vars(importlib.import_module(f"foldcore.kernels.{module.name}"))
        jitted = {name for name, x in members.items() if isinstance(x, triton.JITFunction)}
        found |= {name for name in jitted if name.endswith("_kernel")}
    return found


def main() -> str | None:
    """What is wrong, if anything."""
    if not races(compiled(racing())):
        return "the race is not seen"
    seen, wrong = set(), []
    for launch in launches():
        seen.add(launch.kernel.fn.__name__)
        if found := races(compiled(launch)):
            wrong.append((launch.kernel.fn.__name__, dict(launch.constants), found))
    if missing := kernels() - seen:
        return f"not looked at: {sorted(missing)}"
    return f"races in {wrong}" if wrong else None


if __name__ == "__main__":
    sys.exit(main())
