"""The transition in one pass for Hopper, its products and copies put in order by hand (Gluon).

Triton waits for each product before it goes on, and asks for weights only when the place of those
before them is free: on an H200 the tensor cores stood still for half the time. Here the first
product of the next hidden channels and the second of these are begun together, relu is taken of the
one while the other runs, and weights are on their way two steps ahead. Relu's result stays in
registers, as the operand that it is.

Where a gradient is wanted the hidden layer is written as well. Sizes that these kernels do not take
are left to ``transition`` and ``transition_layers``. Triton's interpreter cannot run Gluon;
``tests/gluon_interpreter.py`` does, and finds what a kernel reads too early or overwrites too soon.

Legend: n rows, c channels, f hidden channels.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foldcore.kernels.launch import Launch, Output


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch: rows of a program, hidden channels of a step, first and second weights of
    so many steps on chip at once, and whether the rows are an operand in registers."""

    rows: int
    columns: int
    num_warps: int
    first: int
    second: int
    registers: bool = False


# channels -> sizes, of an H200
SIZES = {64: Steps(128, 64, 4, 2, 2), 128: Steps(128, 64, 8, 2, 2), 256: Steps(128, 64, 8, 2, 3)}
ARCHITECTURE = 90  # the instructions are Hopper's only


@gluon.jit
def tile_at(ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr):
    """Pointers to [ROWS, COLUMNS], of rows that are STEP apart; a thread has 8 in a row."""
    WIDE: gl.constexpr = COLUMNS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    return ptr + (row * STEP + column)


@gluon.jit
def normalized_tile(x_ptr, scale_ptr, offset_ptr, BLOCK_N: gl.constexpr, C: gl.constexpr):
    """LayerNorm of rows, each of which one warp holds."""
    x = gl.load(tile_at(x_ptr, BLOCK_N, C, C)).to(gl.float32)
    column = gl.arange(0, C, layout=gl.SliceLayout(0, x.type.layout))
    x = x - (gl.sum(x, 1) / C)[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) / C + 1e-5)
    scale = gl.load(scale_ptr + column).to(gl.float32)[None, :]
    offset = gl.load(offset_ptr + column).to(gl.float32)[None, :]
    return (x * rstd[:, None] * scale + offset).to(gl.bfloat16)


@gluon.jit
def activated(h, bias, hidden_ptr, F: gl.constexpr, SAVE: gl.constexpr, OPERAND: gl.constexpr):
    """relu(h + bias) as the operand of a product; to be saved, it is written as well."""
    h = gl.maximum(h + bias.to(gl.float32)[None, :], 0.0).to(gl.bfloat16)
    if SAVE:
        at = tile_at(hidden_ptr, h.shape[0], h.shape[1], F)
        gl.store(at, gl.convert_layout(h, at.type.layout))
    return gl.convert_layout(h, OPERAND)


@gluon.jit
def copy_first(step, weights_ptr, places, F: gl.constexpr):
    """Begin to copy the first layer's weights [c, f] of a step, if there is such a step."""
    C: gl.constexpr = places.shape[1]
    BLOCK_F: gl.constexpr = places.shape[2]
    at = tile_at(weights_ptr + step * BLOCK_F, C, BLOCK_F, F)
    wanted = gl.to_tensor(step < F // BLOCK_F)
    place = places.index(step % places.shape[0])
    async_copy.async_copy_global_to_shared(place, at, mask=wanted)


@gluon.jit
def copy_second(step, weights_ptr, places, F: gl.constexpr):
    """The same for the second layer's [f, c]."""
    BLOCK_F: gl.constexpr = places.shape[1]
    C: gl.constexpr = places.shape[2]
    at = tile_at(weights_ptr + step * (BLOCK_F * C), BLOCK_F, C, C)
    wanted = gl.to_tensor(step < F // BLOCK_F)
    place = places.index(step % places.shape[0])
    async_copy.async_copy_global_to_shared(place, at, mask=wanted)


@gluon.jit
def begin_copies(weights1_ptr, weights2_ptr, first, second, F: gl.constexpr):
    """As many as there are places for, but one: first weights, both of the first step, others."""
    FIRST: gl.constexpr = first.shape[0]
    SECOND: gl.constexpr = second.shape[0]
    copy_first(0, weights1_ptr, first, F)
    async_copy.commit_group()
    for step in gl.static_range(1, FIRST):
        copy_first(step, weights1_ptr, first, F)
        if step == 1:
            copy_second(0, weights2_ptr, second, F)
        async_copy.commit_group()
    for step in gl.static_range(1, SECOND - 1):
        copy_second(step, weights2_ptr, second, F)
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
    C: gl.constexpr,
    F: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_F: gl.constexpr,
    FIRST: gl.constexpr,
    SECOND: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    SAVE: gl.constexpr = hidden_ptr is not None
    # groups of copies that are begun after those that a step needs
    LATER: gl.constexpr = min(2 * FIRST - 2, 2 * SECOND - 3)
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_F, 16])
    mma2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, mma2, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    start = gl.program_id(0).to(gl.int64) * BLOCK_N
    x_ptr += start * C
    if SAVE:
        hidden_ptr += start * F
    first = gl.allocate_shared_memory(gl.bfloat16, [FIRST, C, BLOCK_F], shared)
    second = gl.allocate_shared_memory(gl.bfloat16, [SECOND, BLOCK_F, C], shared)
    begin_copies(weights1_ptr, weights2_ptr, first, second, F)
    x = normalized_tile(x_ptr, scale_ptr, offset_ptr, BLOCK_N, C)
    x = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, C], shared, x)
    fence_async_shared()
    async_copy.wait_group(FIRST + SECOND - 3)
    fence_async_shared()
    if REGISTERS:
        x = x.load(gl.DotOperandLayout(0, mma1, 2))
    none = gl.zeros([BLOCK_N, BLOCK_F], gl.float32, mma1)
    column = gl.arange(0, BLOCK_F, layout=gl.SliceLayout(0, mma1))
    bias = gl.load(bias1_ptr + column)
    h = warpgroup_mma(x, first.index(0), none, use_acc=False, is_async=True)
    h = warpgroup_mma_wait(0, deps=[h])
    hidden = activated(h, bias, hidden_ptr, F, SAVE, OPERAND)
    y = gl.zeros([BLOCK_N, C], gl.float32, mma2)
    gl.thread_barrier()  # all have read the first weights
    copy_first(FIRST, weights1_ptr, first, F)
    async_copy.commit_group()
    for step in range(F // BLOCK_F - 1):
        async_copy.wait_group(LATER)  # by now all have read the second weights of before
        fence_async_shared()
        following = first.index((step + 1) % FIRST)
        h = warpgroup_mma(x, following, none, use_acc=False, is_async=True)
        y = warpgroup_mma(hidden, second.index(step % SECOND), y, is_async=True)
        copy_second(step + SECOND - 1, weights2_ptr, second, F)
        async_copy.commit_group()
        bias = gl.load(bias1_ptr + (step + 1) * BLOCK_F + column)
        h = warpgroup_mma_wait(1, deps=[h])
        gl.thread_barrier()  # all have read the first weights of the next step
        copy_first(step + 1 + FIRST, weights1_ptr, first, F)
        async_copy.commit_group()
        at = hidden_ptr + (step + 1) * BLOCK_F if SAVE else None
        next_hidden = activated(h, bias, at, F, SAVE, OPERAND)
        y, hidden = warpgroup_mma_wait(0, deps=[y, hidden])
        hidden = next_hidden
    async_copy.wait_group(0)
    fence_async_shared()
    last = second.index((F // BLOCK_F - 1) % SECOND)
    y = warpgroup_mma(hidden, last, y, is_async=True)
    residual = None
    if RESIDUAL:  # in place of the first weights, which are as large
        residual = first._reinterpret(gl.bfloat16, [BLOCK_N, C], shared)
        async_copy.async_copy_global_to_shared(residual, tile_at(x_ptr, BLOCK_N, C, C))
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
    layer [n, f]; for sizes that fit, in bfloat16."""
    steps = steps or SIZES[c]
    rows, hidden = Output((n, c), "bfloat16"), Output((n, f), "bfloat16")
    return Launch(
        kernel=transition_pipelined_kernel,
        grid=(n // steps.rows,),
        outputs=(rows, hidden) if save else (rows,),
        constants={"C": c, "F": f, "RESIDUAL": residual}
        | {"BLOCK_N": steps.rows, "BLOCK_F": steps.columns}
        | {"FIRST": steps.first, "SECOND": steps.second, "REGISTERS": steps.registers}
        | ({} if save else {"hidden_ptr": None}),
        num_warps=steps.num_warps,
    )
