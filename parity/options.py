"""What one process of the suite is asked to do."""

from dataclasses import dataclass

DTYPES = ("float64", "float32", "bfloat16")
LEVELS = {
    1: "operations and modules",
    2: "loss terms and the whole network",
    3: "one optimiser step",
    4: "a training run",
}


@dataclass(frozen=True)
class Options:
    """The precision is a setting of the process, so each has its own."""

    dtype: str
    report: str = ""  # the file to write
    device: str = "cpu"
    pattern: str = ""  # of the names of cases
    levels: tuple[int, ...] = tuple(LEVELS)
    steps: int = 100  # of the training run
    config: str = ""  # levels 2 and 3 at the size of this file, instead of reduced size
    quick: bool = False  # leave out what others nearly cover: see ladder.py
    overrides: tuple[str, ...] = ()  # of the configuration, as on the command line of a run
