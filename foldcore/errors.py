"""The one exception that every reader of outside files raises."""

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
