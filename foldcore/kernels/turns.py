"""Sizes of launches whose programs take tiles in turn.

Such a launch has a few programs for each multiprocessor. A program keeps its weights on chip; the
loads of the next tiles are on their way while it works on one.
"""

from dataclasses import dataclass, replace

from foldcore.kernels.launch import INTERPRETER
from foldcore.kernels.rows import MIN_BLOCK, block

MULTIPROCESSORS = 132  # of an H100 or H200
MEASURED, MEASURED_CHANNELS = 90, 128  # architecture and channels of the measured sizes


@dataclass(frozen=True)
class Turns:
    """Sizes of a launch whose programs take tiles in turn."""

    rows: int  # of a tile
    columns: int  # channels that a program computes
    num_warps: int
    programs: int  # on each multiprocessor
    ahead: int  # tiles that are on chip at once


_TESTED = Turns(16, 16, 4, 1, 2)
_FLOAT32 = Turns(32, 16, 8, 2, 2)  # exact products need many registers


def choose(measured: Turns, channels: int, dtype: str, architecture: int) -> Turns:
    """The sizes for tiles of so many channels.

    What has not been measured gets sizes that fit everywhere: 100 KB of shared memory are enough
    for 128 channels.
    """
    if architecture == INTERPRETER:
        return _TESTED
    if dtype != "bfloat16":
        return _FLOAT32
    if architecture != MEASURED:
        measured = replace(measured, columns=64, ahead=2)
    if (width := block(channels)) <= MEASURED_CHANNELS:
        return measured
    rows = max(MIN_BLOCK, measured.rows * MEASURED_CHANNELS // width)
    return replace(measured, rows=rows, columns=32, programs=1, ahead=2)


def groups(tiles: int, turns: Turns, parts: int, architecture: int) -> int:
    """Programs that share the tiles, where each tile takes ``parts`` programs."""
    if architecture == INTERPRETER:
        return min(tiles, max(1, 3 * turns.programs // parts))
    return share(tiles, parts, turns.programs)


def share(tiles: int, parts: int, programs: int) -> int:
    """Programs that share the tiles of each part, so many on each multiprocessor in all."""
    return min(tiles, max(1, MULTIPROCESSORS * programs // parts))
