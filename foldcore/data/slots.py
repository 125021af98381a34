"""Examples in memory that processes share: one slot an example, written by whoever prepared it.

The memory has no name in any file system, so nothing is left behind however the processes end, and
the size of /dev/shm does not matter. Other processes get its file descriptor.
"""

import mmap
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from foldcore.features import FEATURES, Batch, shape

ALIGNMENT = 64  # bytes; a cache line
GIB = 2**30


class SlotsError(RuntimeError):
    """There is not enough memory for the examples that are prepared ahead."""


class Slots:
    """``slots[number]`` is one example as arrays in the shared memory, without a batch axis."""

    def __init__(self, descriptor: int, sizes: Mapping[str, int], count: int) -> None:
        self.descriptor, self.sizes, self.count = descriptor, dict(sizes), count
        self._places, self._stride = _places(sizes)
        self._start = _aligned(8 * count)
        self.nbytes = self._start + self._stride * count
        # grows the file where it is new; another process finds it grown
        os.truncate(descriptor, self.nbytes)
        self._memory = mmap.mmap(descriptor, self.nbytes)
        self._attempts = np.ndarray(count, np.int32, self._memory)
        self._unfinished = np.ndarray(count, np.int32, self._memory, 4 * count)
        self._views: dict[int, Batch] = {}

    @classmethod
    def create(cls, sizes: Mapping[str, int], count: int) -> "Slots":
        """New shared memory, all of it present; :class:`SlotsError` where there is too little."""
        needed, free = cls.size(sizes, count), available_memory()
        if needed > free:
            raise _too_large(needed, count, f"{free / GIB:.2f} GiB are free")
        descriptor = _anonymous_file()
        try:
            if sys.platform == "linux":  # now, not by a deadly signal at the first use
                os.posix_fallocate(descriptor, 0, needed)
            return cls(descriptor, sizes, count)
        except OSError as error:
            os.close(descriptor)
            raise _too_large(needed, count, str(error)) from None

    @staticmethod
    def size(sizes: Mapping[str, int], count: int) -> int:
        """Bytes of ``count`` slots."""
        return _aligned(8 * count) + _places(sizes)[1] * count

    def __getitem__(self, slot: int) -> Batch:
        if slot not in self._views:
            start = self._start + slot * self._stride
            self._views[slot] = {
                name: np.ndarray(
                    shape(name, self.sizes)[1:], FEATURES[name].dtype, self._memory, start + place
                )
                for name, place in self._places.items()
            }
        return self._views[slot]

    def room(self, slot: int) -> Batch:
        """A slot to prepare an example in: it holds an earlier one as it was made, or zeros."""
        example = self[slot]
        if self._unfinished[slot]:  # an attempt failed half-way, or its process ended
            for array in example.values():
                array.fill(0)
        self._unfinished[slot] = 1
        return example

    def finish(self, slot: int) -> None:
        """The example in a slot is whole."""
        self._unfinished[slot] = 0

    def begin(self, slot: int, attempt: int) -> None:
        """Note which attempt is under way, for the case that it ends its process."""
        self._attempts[slot] = attempt

    def begun(self, slot: int) -> int:
        """The last attempt that was begun."""
        return int(self._attempts[slot])

    def close(self) -> None:
        """Give up this process's hold; the memory goes with the last one."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def available_memory() -> float:
    """Bytes that can still be had, as far as the system tells; a container's limit counts."""
    found = [float("inf")]
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = dict(line.split(":") for line in memory.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # its file cache can be dropped: only what is far beyond the limit is certain to fail
        found.append(int(limit.read_text()))
    return min(found)


def _places(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each feature begins within a slot, and the bytes of a slot."""
    places, end = {}, 0
    for name, feature in FEATURES.items():
        places[name] = end
        elements = int(np.prod(shape(name, sizes)[1:], dtype=np.int64))
        end += _aligned(elements * np.dtype(feature.dtype).itemsize)
    return places, end


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _anonymous_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("twinfold-loader")
    with tempfile.TemporaryFile() as file:  # has no name either
        return os.dup(file.fileno())


def _too_large(needed: int, count: int, reason: str) -> SlotsError:
    return SlotsError(
        f"{count} examples prepared ahead need {needed / GIB:.2f} GiB of shared memory, and that "
        f"cannot be had ({reason}): lower data.prefetch or data.workers"
    )
