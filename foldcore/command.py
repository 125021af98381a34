"""The command line of the training programs: ``CONFIG [section.key=value ...]``."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from foldcore.checkpoint import CheckpointError
from foldcore.config import Config, ConfigError, dumps, load
from foldcore.data.ledger import LedgerError
from foldcore.data.loader import LoaderError
from foldcore.data.pool import WorkerError
from foldcore.data.share import ShareError
from foldcore.data.slots import SlotsError
from foldcore.deepmind import ParameterFileError
from foldcore.errors import DataError, file_trouble
from foldcore.kernels.cases import WrongKernel
from foldcore.layout import LayoutError
from foldcore.runlog import NonFiniteError

# what a user can mend: shown as one line, without a traceback
USER_ERRORS = (
    ConfigError,
    DataError,
    LoaderError,
    WorkerError,
    SlotsError,
    ShareError,
    LedgerError,
    CheckpointError,
    LayoutError,
    ParameterFileError,
    NonFiniteError,
    WrongKernel,
)
# as PyTorch names its error on a GPU and says it on a CPU, and XLA begins its message
OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "RESOURCE_EXHAUSTED")
SAVE_MEMORY = (
    "model.recompute=block needs a fraction of it; a smaller train.batch_size or data.crop_size, "
    "and more GPUs for the same batch, need less as well"
)


def run_command(
    argv: Sequence[str],
    usage: str,
    run: Callable[[Config, str], None],
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Load the configuration and ``run(config, arguments)``; the exit status.

    Without arguments, or with ``--help``, ``usage`` and every key are printed. ``errors`` are those
    of the track which a user can mend; they end with status 2, as a full memory or disk does, and
    a file that cannot be written. Being interrupted ends with status 130.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{usage}\nEvery key with its default:\n\n{dumps(Config())}")
        return 0 if argv else 2
    expected: tuple[type[Exception], ...] = (*USER_ERRORS, *errors)
    folder = Path()
    try:
        config = load(argv[0], list(argv[1:]))
        folder = Path(config.train.out, config.train.name)
        run(config, shlex.join(argv))
    except KeyboardInterrupt:
        print("stopped; the same command continues from what is saved", file=sys.stderr)
        return 130
    except Exception as error:
        words = str(error) if isinstance(error, expected) else _explain(error, folder)
        if words is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    return 0


def _explain(error: Exception, folder: Path) -> str | None:
    """What a user can do about an error of the system; None where it is the program's own."""
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, MemoryError) or any(name in words for name in OUT_OF_MEMORY):
        return f"out of memory: {SAVE_MEMORY}\n  ({words})"
    return file_trouble(error, folder) if isinstance(error, OSError) else None
