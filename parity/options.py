"""What one process of the suite is asked to do."""

from collections.abc import Sequence
from dataclasses import dataclass

from foldcore.config import Config, load

DTYPES = ("float64", "float32", "bfloat16")
LEVELS = {
    1: "operations and modules",
    2: "loss terms and the whole network",
    3: "one optimiser step",
    4: "a training run",
}
FULL_SIZE_LEVELS = frozenset({2, 3})  # with the size of a configuration
FEWEST_STEPS = 10  # of the training run: few numbers say little; a fault shows at once
IMPLEMENTATION = "model.implementation"  # the one key that counts at reduced size as well


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

    @property
    def implementation(self) -> str:
        """Of the operations, if an override names one."""
        named = [override.partition("=") for override in self.overrides]
        found = [value.strip(" '\"") for key, _, value in named if key.strip() == IMPLEMENTATION]
        return found[-1] if found else "reference"


def configuration(path: str, overrides: Sequence[str]) -> Config:
    """The network of a file, on the embedded proteins, one example a step, with exact products."""
    own = ["data.path=embedded", "data.workers=0", "data.accept_unknown=true", "train.batch_size=1"]
    own += ["model.matmul_precision=ieee", "train.cuda_graphs=false", "train.compile=none"]
    own += ["data.distillation_path=", "train.max_recycling_iters=3"]
    own += ["model.recompute=block", "model.unroll=false"]  # float64 has to fit, and to compile
    return load(path, [*own, *overrides])
