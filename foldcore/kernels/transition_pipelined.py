"""The transition in one pass for Hopper, its products and copies put in order by hand (Gluon).

Triton asks for weights only when the place of those before them is free: on an H200 the tensor
cores stood still for half the time. Here weights are on their way while products run, the second
product of some hidden channels runs while the first of the next begins, and relu's result stays in
registers, as the operand that it is. A program waits for its products in turn; where two share a
processor, one's fill the gaps of the other.

Where a gradient is wanted the hidden layer is written as well, and its signs (``transition_signs``)
for the backward kernel (``transition_pipelined_backward``). Sizes that they do not take are left to
``transition``, ``transition_layers`` and ``transition_backward``. Triton's interpreter cannot run
Gluon; ``tests/gluon_interpreter.py`` does, and finds what a kernel reads too early or overwrites
too soon.

Legend: n rows, c channels, f hidden channels.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, copy_tile, tile_at
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import EPS
from foldcore.kernels.transition_signs import signs, words_at


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch: rows of a program, hidden channels of a step, first weights of so many
    steps on chip at once (rows are as many as their hidden channels), second ones of two."""

    rows: int
    columns: int
    num_warps: int
    first: int


# channels -> sizes, of an H200
SIZES = {64: Steps(128, 64, 4, 2), 128: Steps(128, 64, 4, 2), 256: Steps(128, 64, 8, 2)}


@gluon.jit
def normalized_tile(x_ptr, scale_ptr, offset_ptr, BLOCK_N: gl.constexpr, C: gl.constexpr):
    """LayerNorm of rows, each of which one warp holds."""
    x = gl.load(tile_at(x_ptr, BLOCK_N, C, C)).to(gl.float32)
    column = gl.arange(0, C, layout=gl.SliceLayout(0, x.type.layout))
    x = x - (gl.sum(x, 1) / C)[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) / C + EPS)
    scale = gl.load(scale_ptr + column).to(gl.float32)[None, :]
    offset = gl.load(offset_ptr + column).to(gl.float32)[None, :]
    return (x * rstd[:, None] * scale + offset).to(gl.bfloat16)


@gluon.jit
def save(h, hidden_ptr, signs_ptr, F: gl.constexpr):
    """Write some of the hidden layer and its signs."""
    words = signs(h)
    gl.store(words_at(signs_ptr, words, F), words)
    at = tile_at(hidden_ptr, h.shape[0], h.shape[1], F)
    gl.store(at, gl.convert_layout(h, at.type.layout))


@gluon.jit
def copy_first(step, weights_ptr, places, F: gl.constexpr):
    """Begin to copy the first layer's weights [c, f] of a step, if there is such a step."""
    BLOCK_F: gl.constexpr = places.shape[2]
    place = places.index(step % places.shape[0])
    copy_tile(weights_ptr + step * BLOCK_F, place, step < F // BLOCK_F, F)


@gluon.jit
def copy_second(step, weights_ptr, places, F: gl.constexpr):
    """The same for the second layer's [f, c]."""
    BLOCK_F: gl.constexpr = places.shape[1]
    C: gl.constexpr = places.shape[2]
    place = places.index(step % places.shape[0])
    copy_tile(weights_ptr + step * (BLOCK_F * C), place, step < F // BLOCK_F, C)


@gluon.jit
def begin_copies(weights1_ptr, weights2_ptr, first, second, F: gl.constexpr):
    """First weights of as many steps as there are places for; after the first's its second ones."""
    FIRST: gl.constexpr = first.shape[0]
    copy_first(0, weights1_ptr, first, F)
    async_copy.commit_group()
    copy_second(0, weights2_ptr, second, F)
    async_copy.commit_group()
    for step in gl.static_range(1, FIRST):
        copy_first(step, weights1_ptr, first, F)
        async_copy.commit_group()


@gluon.jit
def finish(y, x, bias_ptr, y_ptr):
    """Write y + bias + x, x in shared memory or None; 16 bytes at a time."""
    C: gl.constexpr = y.shape[1]
    column = gl.arange(0, C, layout=gl.SliceLayout(0, y.type.layout))
    y += gl.load(bias_ptr + column).to(gl.float32)[None, :]
    if x is not None:
        y += x.load(y.type.layout).to(gl.float32)
    at = tile_at(y_ptr, y.shape[0], C, C)
    gl.store(at, gl.convert_layout(y.to(gl.bfloat16), at.type.layout))


@gluon.jit
def transition_pipelined_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights1_ptr,  # [c, f]
    bias1_ptr,  # [f]
    weights2_ptr,  # [f, c]
    bias2_ptr,  # [c]
    y_ptr,  # [n, c]
    hidden_ptr,  # [n, f], or None
    signs_ptr,  # [n / 16, f / 64, 8, 4], or None
    C: gl.constexpr,
    F: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_F: gl.constexpr,
    FIRST: gl.constexpr,
):
    await_previous()
    SAVE: gl.constexpr = hidden_ptr is not None
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_F, 16])
    mma2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, mma2, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    start = gl.program_id(0).to(gl.int64) * BLOCK_N
    x_ptr += start * C
    if SAVE:
        hidden_ptr += start * F
        signs_ptr += start * (F // 32)
    first = gl.allocate_shared_memory(gl.bfloat16, [FIRST, C, BLOCK_F], shared)
    second = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_F, C], shared)
    begin_copies(weights1_ptr, weights2_ptr, first, second, F)
    x = normalized_tile(x_ptr, scale_ptr, offset_ptr, BLOCK_N, C)
    x = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, C], shared, x)
    fence_async_shared()
    none = gl.zeros([BLOCK_N, BLOCK_F], gl.float32, mma1)
    column = gl.arange(0, BLOCK_F, layout=gl.SliceLayout(0, mma1))
    y = warpgroup_mma_init(gl.zeros([BLOCK_N, C], gl.float32, mma2))
    hidden = gl.zeros([BLOCK_N, BLOCK_F], gl.bfloat16, OPERAND)
    for step in range(F // BLOCK_F):
        async_copy.wait_group(FIRST)  # after this step's first weights come its second ones
        fence_async_shared()
        h = warpgroup_mma(x, first.index(step % FIRST), none, use_acc=False, is_async=True)
        bias = gl.load(bias1_ptr + step * BLOCK_F + column)
        hidden = warpgroup_mma_wait(1, deps=[hidden])
        gl.thread_barrier()  # all have read the second weights of the step before
        copy_second(step + 1, weights2_ptr, second, F)
        async_copy.commit_group()
        h = warpgroup_mma_wait(0, deps=[h])
        h = gl.maximum(h + bias.to(gl.float32)[None, :], 0.0).to(gl.bfloat16)
        hidden = gl.convert_layout(h, OPERAND)
        async_copy.wait_group(2)
        gl.thread_barrier()  # all have read the first weights of this step
        fence_async_shared()
        y = warpgroup_mma(hidden, second.index(step % 2), y, is_async=True)
        copy_first(step + FIRST, weights1_ptr, first, F)
        async_copy.commit_group()
        if SAVE:
            save(h, hidden_ptr + step * BLOCK_F, signs_ptr + step * 32, F)
    async_copy.wait_group(0)
    residual = None
    if RESIDUAL:  # in place of the first weights, which are as large
        residual = first._reinterpret(gl.bfloat16, [BLOCK_N, C], shared)
        copy_tile(x_ptr, residual, True, C)
        async_copy.commit_group()
    y = warpgroup_mma_wait(0, deps=[y])
    async_copy.wait_group(0)
    finish(y, residual, bias2_ptr, y_ptr + start * C)


def fits(n: int, c: int, f: int, dtype: str, architecture: int) -> bool:
    """Whether the kernel takes these sizes: whole tiles, several steps, on the one architecture."""
    if dtype != "bfloat16" or architecture != ARCHITECTURE or c not in SIZES:
        return False
    steps = SIZES[c]
    return n % steps.rows == 0 and f % steps.columns == 0 and f // steps.columns > steps.first


def forward(
    n: int, c: int, f: int, residual: bool, save: bool, steps: Steps | None = None
) -> Launch:
    """(x, scale, offset, weights1, bias1, weights2, bias2) -> y [n, c], and to be saved the hidden
    layer [n, f] and its signs [n f / 32]; for sizes that fit, in bfloat16."""
    steps = steps or SIZES[c]
    rows = Output((n, c), "bfloat16")
    saved = Output((n, f), "bfloat16"), Output((n * f // 32,), "int32")
    return Launch(
        kernel=transition_pipelined_kernel,
        grid=(n // steps.rows,),
        outputs=(rows, *saved) if save else (rows,),
        constants={"C": c, "F": f, "RESIDUAL": residual}
        | {"BLOCK_N": steps.rows, "BLOCK_F": steps.columns, "FIRST": steps.first}
        | ({} if save else {"hidden_ptr": None, "signs_ptr": None}),
        num_warps=steps.num_warps,
    )
