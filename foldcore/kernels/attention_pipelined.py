"""Attention's forward pass for Hopper, its products and copies put in order by hand (Gluon).

A program keeps one head and a tile of queries and walks over groups, so that its tile of the bias
is read once: as float32 in shared memory, each thread's part in one piece, it is what the products
of queries and keys are added to. All keys of a group are one tile, with one place on chip, as the
values have: the next group's come as soon as this one's have been read, keys while weights are
computed, values while results are written. Gates are computed beside the product with values. Two
or more programs share a processor.

A mask is added by a product: the masks of all of a program's groups stay on chip, each a column of
one tile, of which a column of ones takes its own. Keys lie in an order in which 8 neighbours are
one thread's (``key_at``): so the bias is read 16 bytes at a time.

Sizes that this kernel does not take are left to ``attention``, whose results these are up to
rounding. Triton's interpreter cannot run Gluon; ``tests/gluon_interpreter.py`` does.
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

from foldcore.kernels.attention_tiles import MASKED, Problem
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, tile_in
from foldcore.kernels.launch import Launch, cdiv
from foldcore.kernels.rows import LOG2_E

MOST_GROUPS = 16  # of a program: a tile of masks is 16 wide


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch: queries of a program (16 a warp), at most so many groups a program."""

    queries: int
    groups: int


# keys, and whether there is a bias -> sizes, of an H200
SIZES = {(256, True): Steps(64, 16), (128, False): Steps(128, 8)}
WIDTH = 32


# Layouts ------------------------------------------------------------------------------------------


@gluon.constexpr_function
def doubled(first: int, end: int) -> list[int]:
    """first, 2 first, 4 first and so on, below ``end``."""
    return [] if first >= end else [first, *doubled(2 * first, end)]


@gluon.constexpr_function
def by_threads(rows: int, columns: int) -> gl.SharedLinearLayout:
    """Shared memory for a float32 tile, in the order in which the threads of a product hold it:
    16 bytes of one, then of the next one."""
    thread = [[0, 1], [8, 0]]
    threads = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    rest = [[0, x] for x in doubled(8, columns)]
    return gl.SharedLinearLayout(thread + threads + rest + [[x, 0] for x in doubled(16, rows)])


@gluon.constexpr_function
def by_neighbours(rows: int, columns: int, warps: int) -> gl.DistributedLinearLayout:
    """[rows, columns], rows as a product has them, 8 neighbours in each 32 columns a thread's."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], *([0, x] for x in doubled(32, columns))]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    in_turn = [[x, 0] for x in doubled(16, 16 * warps)]
    registers += [[x, 0] for x in doubled(16 * warps, rows)]
    return gl.DistributedLinearLayout(registers, lanes, in_turn, [], [rows, columns])


@gluon.jit
def key_at(place):
    """Which key is where in shared memory: of each 32, those that are columns 2 c, 2 c + 1 of four
    times 8 columns, one thread's of a product, are neighbours."""
    return (place & -31) + ((place & 6) << 2) + ((place & 24) >> 2)


# What a program brings to the chip ----------------------------------------------------------------


@gluon.jit
def copy_rows(ptr, place, wanted, STEP: gl.constexpr, KEYS: gl.constexpr):
    """Begin to copy rows of a head, STEP apart, in the order of keys or their own."""
    WIDE: gl.constexpr = place.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, place.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, place.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    if KEYS:
        row = key_at(row)
    async_copy.async_copy_global_to_shared(place, ptr + (row * STEP + column), mask=wanted)


@gluon.jit
def copy_scored(ptr, start, wanted, q, k, CHANNELS: gl.constexpr, STEP: gl.constexpr):
    """Begin to copy a program's queries and the keys of a group, if there is one; ptr is to the
    head's first query."""
    copy_rows(ptr + start * STEP, q, wanted, STEP, False)
    copy_rows(ptr + 2 * CHANNELS, k, wanted, STEP, True)
    async_copy.commit_group()


@gluon.jit
def copy_values(ptr, wanted, v, CHANNELS: gl.constexpr, STEP: gl.constexpr):
    """The same for its values."""
    copy_rows(ptr + 3 * CHANNELS, v, wanted, STEP, True)
    async_copy.commit_group()


@gluon.jit
def await_copies(LEFT: gl.constexpr):
    """Until all but so many have come, for all threads; no fence, as in what Triton compiles."""
    async_copy.wait_group(LEFT)
    gl.thread_barrier()


@gluon.jit
def load_masks(mask_ptr, count, ahead, STEP: gl.constexpr, LENGTH: gl.constexpr):
    """The masks of a program's groups, one a column."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [gl.num_warps(), 1], [1, 0])
    key = key_at(gl.arange(0, LENGTH, layout=gl.SliceLayout(1, layout))[:, None])
    group = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    inside = (group < count) & (key >= 0)
    return gl.load(mask_ptr + (key * STEP + group * ahead), mask=inside, other=1.0)


@gluon.jit
def hold_masks(masks):
    """What they add to the logits of each key, in shared memory."""
    summand = gl.where(masks > 0, 0.0, MASKED).to(gl.bfloat16)
    shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    return gl.allocate_shared_memory(gl.bfloat16, masks.shape, shared, summand)


@gluon.jit
def load_bias(bias_ptr, ROWS: gl.constexpr, LENGTH: gl.constexpr):
    """A program's tile of the bias, neighbours of a thread in the order of keys on chip."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, LENGTH, 16])
    wide: gl.constexpr = by_neighbours(ROWS, LENGTH, gl.num_warps())
    bias = gl.load(tile_in(bias_ptr, ROWS, LENGTH, LENGTH, wide))
    bias = gl.permute(bias.reshape([ROWS, LENGTH // 32, 4, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(bias.reshape([ROWS, LENGTH]), mma, assert_trivial=True)


@gluon.jit
def hold_bias(bias, SCALE: gl.constexpr):
    """The bias in units of products, in shared memory."""
    shared: gl.constexpr = by_threads(bias.shape[0], bias.shape[1])
    bias = bias.to(gl.float32) * (1 / SCALE)
    return gl.allocate_shared_memory(gl.float32, bias.shape, shared, bias)


# Attention of a tile of queries within a group ----------------------------------------------------


@gluon.jit
def begin_scores(q, k, masks, choice, start, HAS_BIAS: gl.constexpr):
    """Begin what makes a group's logits, in units of products; of a masked key only its mask is
    left."""
    mask = masks.permute((1, 0))
    scores = warpgroup_mma(choice, mask, start, use_acc=HAS_BIAS, is_async=True)
    return warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)


@gluon.jit
def soften(scores, unit):
    """Each row's maximum in units of log 2, weights relative to it, their sum."""
    highest = gl.max(scores, 1) * unit
    weights = gl.exp2(scores * unit - highest[:, None])
    return highest, weights, gl.sum(weights, 1)


@gluon.jit
def log2(x):
    """By one instruction."""
    assembly: gl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(assembly, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def store_statistics(ptr, highest, total):
    """The logarithms of the sums of weights, in units of log 2."""
    # of a query without any key in natural units, as elsewhere
    highest = gl.where(highest > MASKED * 0.001, highest, MASKED * LOG2_E)
    row = gl.arange(0, total.shape[0], layout=total.type.layout)
    gl.store(ptr + row, highest + log2(total))


@gluon.jit
def factors(total, gate, gate_bias_ptr):
    """By what gathered values are multiplied: gate / total."""
    channel = gl.arange(0, gate.shape[1], layout=gl.SliceLayout(0, gate.type.layout))
    gate_bias = gl.load(gate_bias_ptr + channel).to(gl.float32)[None, :] * -LOG2_E
    closed = gl.exp2(gate.to(gl.float32) * -LOG2_E + gate_bias)
    total = gl.convert_layout(total, gl.SliceLayout(1, gate.type.layout))[:, None]
    root = gl.rsqrt(closed * total + total)  # 1 / y as a square, as in ``rows.sigmoid``
    return root * root


@gluon.jit
def store_output(ptr, output, STEP: gl.constexpr):
    """Written 16 bytes at a time, exchanged within a warp."""
    wide: gl.constexpr = by_neighbours(output.shape[0], output.shape[1], gl.num_warps())
    output = gl.convert_layout(output.to(gl.bfloat16), wide)
    gl.store(tile_in(ptr, output.shape[0], output.shape[1], STEP, wide), output)


@gluon.jit
def chosen(i, layout: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, 16], ones in column i."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    return gl.where((column == i) & (row >= 0), 1.0, 0.0).to(gl.bfloat16)


@gluon.jit
def attention_pipelined_kernel(
    projected_ptr,  # [b s r 4 h d]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    output_ptr,  # [b s r h d]
    logsumexp_ptr,  # [b g h q], in units of log 2
    SCALE: gl.constexpr,
    GROUPS: gl.constexpr,
    LENGTH: gl.constexpr,
    GROUP_STEP: gl.constexpr,  # positions from one group to the next
    STEP: gl.constexpr,  # positions from one member of a group to the next
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    BATCH: gl.constexpr,
):
    await_previous()
    CHANNELS: gl.constexpr = HEADS * WIDTH
    STRIDE: gl.constexpr = STEP * 4 * CHANNELS
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, LENGTH, 16])
    valued: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, valued, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    # in turn: programs that run together read neighbouring groups
    TILES: gl.constexpr = LENGTH // ROWS
    start = gl.program_id(0) % TILES * ROWS
    head = gl.program_id(0) // TILES % HEADS
    chunks = gl.num_programs(0) // (TILES * HEADS * BATCH)  # a program takes every so manieth group
    first = gl.program_id(0) // (TILES * HEADS) % chunks
    batch = gl.program_id(0) // (TILES * HEADS) // chunks
    count = (GROUPS - first + chunks - 1) // chunks
    ahead = chunks * GROUP_STEP  # positions to a program's next group
    position = (batch * (GROUPS * LENGTH) + first * GROUP_STEP).to(gl.int64)
    ptr = projected_ptr + position * (4 * CHANNELS) + head * WIDTH
    output_ptr += (position + start * STEP) * CHANNELS + head * WIDTH
    bias_ptr += (batch * HEADS + head).to(gl.int64) * (LENGTH * LENGTH) + start * LENGTH
    gate_bias_ptr += head * WIDTH
    logsumexp_ptr += ((batch * GROUPS + first).to(gl.int64) * HEADS + head) * LENGTH + start

    q = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], shared)
    k = gl.allocate_shared_memory(gl.bfloat16, [LENGTH, WIDTH], shared)
    v = gl.allocate_shared_memory(gl.bfloat16, [LENGTH, WIDTH], shared)
    wanted = gl.to_tensor(count > 0)
    copy_scored(ptr, start, wanted, q, k, CHANNELS, STRIDE)
    copy_values(ptr, wanted, v, CHANNELS, STRIDE)
    masks = load_masks(mask_ptr + position, count, ahead, STEP, LENGTH)
    bias = load_bias(bias_ptr, ROWS, LENGTH) if HAS_BIAS else None
    masks = hold_masks(masks)
    bias = hold_bias(bias, SCALE) if HAS_BIAS else None
    unit: gl.constexpr = LOG2_E * SCALE  # of logits as products leave them
    none = gl.zeros([ROWS, LENGTH], gl.float32, scored)
    nothing = gl.zeros([ROWS, WIDTH], gl.float32, valued)
    fence_async_shared()
    gl.thread_barrier()
    for i in range(count):
        begin = bias.load(scored) if HAS_BIAS else none  # type: ignore[union-attr]
        choice = chosen(i, gl.DotOperandLayout(0, scored, 2), ROWS)
        await_copies(1)  # keys
        scores = begin_scores(q, k, masks, choice, begin, HAS_BIAS)
        gate_ptr = ptr + i * ahead * (4 * CHANNELS) + (start * STRIDE + CHANNELS)
        gate = gl.load(tile_in(gate_ptr, ROWS, WIDTH, STRIDE, valued))
        next_ptr = ptr + (i + 1) * ahead * (4 * CHANNELS)
        wanted = gl.to_tensor(i + 1 < count)
        scores = warpgroup_mma_wait(0, deps=[scores])
        gl.thread_barrier()  # all have read the keys
        copy_scored(next_ptr, start, wanted, q, k, CHANNELS, STRIDE)
        highest, weights, total = soften(scores, unit)
        weights = gl.convert_layout(weights.to(gl.bfloat16), operand)
        await_copies(1)  # values
        gathered = warpgroup_mma(weights, v, nothing, use_acc=False, is_async=True)
        store_statistics(logsumexp_ptr + i * chunks * (HEADS * LENGTH), highest, total)
        factor = factors(total, gate, gate_bias_ptr)
        gathered, factor = warpgroup_mma_wait(0, deps=[gathered, factor])
        gl.thread_barrier()  # all have read the values
        copy_values(next_ptr, wanted, v, CHANNELS, STRIDE)
        store_output(output_ptr + i * ahead * CHANNELS, gathered * factor, STEP * CHANNELS)
    async_copy.wait_group(0)


# Launch geometry ----------------------------------------------------------------------------------


def fits(problem: Problem) -> bool:
    """Whether the kernel takes these sizes: measured ones, on the one architecture."""
    kind = problem.dtype, problem.architecture, problem.width
    known = kind == ("bfloat16", ARCHITECTURE, WIDTH) and size_class(problem) in SIZES
    return known and problem.short


def size_class(problem: Problem) -> tuple[int, bool]:
    """What the sizes of a launch depend on."""
    return problem.length, problem.has_bias


def forward(problem: Problem, steps: Steps | None = None) -> Launch:
    """(projected, gate bias, mask, bias) -> (output, logsumexp), for sizes that fit."""
    steps = steps or SIZES[size_class(problem)]
    assert steps.groups <= MOST_GROUPS
    tiles, chunks = problem.length // steps.queries, cdiv(problem.groups, steps.groups)
    constants = problem.constants()
    del constants["BLOCK_D"]
    return Launch(
        kernel=attention_pipelined_kernel,
        grid=(problem.heads * tiles * chunks * problem.batch,),
        outputs=(problem.gathered, problem.statistics),
        constants=constants | {"ROWS": steps.queries, "BATCH": problem.batch},
        num_warps=steps.queries // 16,
    )
