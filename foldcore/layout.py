"""The flat parameter layout: where each named array lies in one float32 buffer.

Both tracks keep their state in flat buffers (parameters, moments, averaged weights), so that norm,
clipping and the optimizer are one pass over contiguous memory. Names are sorted; nothing is padded.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32


class LayoutError(ValueError):
    """Arrays that do not fit the layout; the message names the first wrong one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names in sorted order, with the shape and the offset of each in a flat buffer."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # where each array begins, in elements
    size: int  # elements in all

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        return iter(zip(self.names, self.shapes, self.offsets, strict=True))

    def unflatten(self, flat: Any) -> dict[str, Any]:
        """The named arrays as slices of a flat buffer of any array library."""
        return {
            name: flat[offset : offset + math.prod(shape)].reshape(shape)
            for name, shape, offset in self
        }

    def flatten(
        self, arrays: Mapping[str, np.ndarray], origin: str = "parameters"
    ) -> Float32[np.ndarray, " n"]:
        """One float32 buffer; a missing, unknown or misshapen array is a :class:`LayoutError`.

        ``origin`` says in its message where the arrays come from.
        """
        self.check({name: array.shape for name, array in arrays.items()}, origin)
        flat = np.empty(self.size, np.float32)
        for name, shape, offset in self:
            flat[offset : offset + math.prod(shape)] = np.ravel(arrays[name])
        return flat

    def check(self, shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
        """Raise :class:`LayoutError` unless exactly these names and shapes are given."""
        expected = dict(zip(self.names, self.shapes, strict=True))
        for name in sorted(shapes.keys() | expected.keys()):
            if name not in shapes:
                raise LayoutError(f"{origin}: array {name!r} is missing")
            if name not in expected:
                raise LayoutError(f"{origin}: array {name!r} is not part of this model")
            if tuple(shapes[name]) != expected[name]:
                raise LayoutError(
                    f"{origin}: array {name!r} has shape {tuple(shapes[name])}, "
                    f"but this model needs {expected[name]}"
                )


def make_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of the given named shapes."""
    names = tuple(sorted(shapes))
    ordered = tuple(tuple(int(d) for d in shapes[name]) for name in names)
    ends = list(itertools.accumulate(math.prod(shape) for shape in ordered))
    return Layout(names, ordered, (0, *ends[:-1]) if ends else (), ends[-1] if ends else 0)
