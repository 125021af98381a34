"""Compiles kernels for an H100 on any machine, and looks for a race in what Triton made of them.

Triton 3.6 may keep a tile that a loop loads in one buffer only, although the next iteration's copy
into it starts before the matrix product that reads it has ended: seen where the tile was stored or
summed as well. Results were wrong by a tenth then, and only at some sizes.

Run as a program, for Triton compiles in no process in which its interpreter is chosen.
"""

import re
import sys
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foldcore.kernels import linear_update, transition, triangle, triangle_backward
from foldcore.kernels.launch import Launch, Output

FLOAT32 = ("mask_ptr", "factor_ptr")  # inputs; all others are bfloat16
KIND = "bfloat16", 90


def launches() -> Iterator[Launch]:
    """Kernels at the sizes of the model."""
    pairs, c = 256 * 256, 128
    yield triangle.project(1, pairs, c, c, *KIND)
    yield triangle.output(1, (256, 256), c, c, *KIND, has_factor=True, residual=True)
    yield triangle_backward.project_backward(1, pairs, c, c, *KIND)
    yield triangle_backward.output_backward(1, (256, 256), c, c, *KIND, has_factor=True)
    yield transition.forward(pairs, c, 4 * c, *KIND, residual=True)
    yield transition.backward(pairs, c, 4 * c, *KIND)
    shape = linear_update.Shape(1, 256, 256, shared=1)
    yield linear_update.forward(shape, c, c, *KIND, residual=True)
    yield linear_update.backward(shape, c, c, *KIND)


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
    names = list(launch.kernel.arg_names)
    pointers = [name for name in names if name not in launch.constants]
    types = {name: "*fp32" if name in FLOAT32 else "*bf16" for name in pointers}
    for name, output in zip(reversed(pointers), reversed(launch.outputs), strict=False):
        types[name] = "*fp32" if output.dtype == "float32" else "*bf16"
    source = ASTSource(
        launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]


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


if __name__ == "__main__":
    assert races(compiled(racing())), "the race is not seen"
    wrong = [(x.kernel.fn.__name__, found) for x in launches() if (found := races(compiled(x)))]
    sys.exit(f"races in {wrong}" if wrong else 0)
