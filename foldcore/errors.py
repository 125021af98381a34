"""The one exception that every reader of outside files raises; what a failed system call means."""

import errno
import os
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used: which file, which line (1-based, if known), and why."""

    def __init__(self, path: str | Path, line: int | None, reason: str) -> None:
        super().__init__(str(path), line, reason)  # the arguments pickle back in worker processes
        self.path = str(path)
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.reason}"


def file_trouble(error: OSError, place: str | Path) -> str | None:
    """What a user has to mend, in one line, while ``place`` is written.

    None where neither a file is named nor a disk is full: then it is a mistake of the program.
    """
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.filename is None and not is_full:
        return None
    name = place if error.filename is None else error.filename
    where = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    more = "; the same command continues once there is room" if is_full else ""
    return f"{where}: {os.strerror(error.errno) if error.errno else error}{more}"
