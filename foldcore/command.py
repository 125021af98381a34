"""The command line of the training programs: ``CONFIG [section.key=value ...]``."""

import shlex
import sys
from collections.abc import Callable, Sequence

from foldcore.checkpoint import CheckpointError
from foldcore.config import Config, ConfigError, dumps, load
from foldcore.data.ledger import LedgerError
from foldcore.data.loader import LoaderError
from foldcore.data.pool import WorkerError
from foldcore.data.share import ShareError
from foldcore.data.slots import SlotsError
from foldcore.deepmind import ParameterFileError
from foldcore.errors import DataError
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
# as PyTorch names its error, and XLA begins its message
OUT_OF_MEMORY = ("OutOfMemoryError", "RESOURCE_EXHAUSTED")
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
    of the track which a user can mend; they end with status 2, as a full memory does.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{usage}\nEvery key with its default:\n\n{dumps(Config())}")
        return 0 if argv else 2
    expected: tuple[type[Exception], ...] = (*USER_ERRORS, *errors)
    try:
        run(load(argv[0], list(argv[1:])), shlex.join(argv))
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        if any(name in words for name in OUT_OF_MEMORY):
            print(f"error: out of memory: {SAVE_MEMORY}\n  ({words})", file=sys.stderr)
            return 2
        raise
    return 0
