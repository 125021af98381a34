"""What a track needs to know to launch a kernel: plain numbers, no arrays of any framework.

A kernel takes, in this order, pointers to its inputs, ``scalars``, pointers to its outputs, and
compile-time ``constants``. All arrays are contiguous and row-major; outputs are fresh buffers that
the kernel writes completely, or inputs that it overwrites. Sizes that addresses depend on belong
into the constants: only then do both tracks' compilers know what they are multiples of, and load 16
bytes at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Sizes of a launch by architecture: compute capability as an integer, 90 for H100 and H200.
INTERPRETER = 0  # "architecture" of tensors on the host
NEEDS_GPU = 'model.implementation="triton" needs an NVIDIA GPU; use "reference" here'
# Whether a launch may begin while the one before it ends (dependent.py); False to measure without.
OVERLAP = True
OVERLAPS_SINCE = 90  # the first architecture that knows how


@dataclass(frozen=True)
class Output:
    """An array that a kernel writes; ``dtype`` is its name, such as "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any  # what triton.jit returns
    grid: tuple[int, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Any]
    scalars: tuple[int | float, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    # index of an input -> that of the output that takes its place in memory
    in_place: Mapping[int, int] = field(default_factory=dict)


def options(launch: Launch, architecture: int) -> dict[str, Any]:
    """How Triton is to compile the kernel of a launch, beside its constants."""
    sizes = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return sizes | overlap(architecture)


def overlap(architecture: int) -> dict[str, bool]:
    """Triton's option for launches that may begin while the one before ends, where they can."""
    return {"launch_pdl": True} if OVERLAP and architecture >= OVERLAPS_SINCE else {}


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
