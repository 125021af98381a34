"""Where relu let its argument pass: a bit an element, from the forward to the backward kernel.

Both have the hidden channels of a step as a product's result, 64 columns wide, of which a thread
holds two neighbours in every eight, of rows that are 8 apart: 32 elements of 16 rows, a word. So
neither has to exchange anything, and the words are a sixteenth of the hidden layer that would be
read to be compared with zero. They are kept as [n / 16, f / 64, 8, 4] int32.

Legend: f hidden channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COLUMNS = 64  # of a step, whose bits of 16 rows are 32 words


@gluon.jit
def by_thread(x):
    """[rows, columns] as [rows / 16, 2, 8, columns / 8, 4, 2]: of a product's result, all that the
    second, the fourth and the last of these axes count lies in one thread."""
    return x.reshape([x.shape[0] // 16, 2, 8, x.shape[1] // 8, 4, 2])


@gluon.jit
def bits(x):
    """The bit of each element of a product's result x, in the word of its thread."""
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))[:, None]
    column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :]
    return 1 << (column // 8 + row // 8 % 2 * 8 + column % 2 * 16)


@gluon.jit
def signs(x):
    """The words of a product's result x: whether it is above zero."""
    return gl.sum(gl.sum(gl.sum(by_thread(gl.where(x > 0, bits(x), 0)), 5), 3), 1)


@gluon.jit
def words_at(ptr, words, F: gl.constexpr):
    """Pointers to words as they lie in threads; ptr is to a step's first."""
    layout: gl.constexpr = words.type.layout
    rest: gl.constexpr = gl.SliceLayout(2, layout)
    group = gl.arange(0, words.shape[0], layout=gl.SliceLayout(1, rest))[:, None, None]
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, rest))[None, :, None]
    column = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return ptr + (group * (F // 2) + row * 4 + column)


@gluon.jit
def masked(x, words):
    """A product's result x in bfloat16, and 0 where the words' bits are not set."""
    kept = by_thread(bits(x)) & words[:, None, :, None, :, None]
    x_kept = gl.where(kept != 0, by_thread(x), 0.0).to(gl.bfloat16)
    return gl.convert_layout(x_kept.reshape(x.shape), x.type.layout, assert_trivial=True)
