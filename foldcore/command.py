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


def run_command(
    argv: Sequence[str],
    usage: str,
    run: Callable[[Config, str], None],
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Load the configuration and ``run(config, arguments)``; the exit status.

    Without arguments, or with ``--help``, ``usage`` and every key are printed. ``errors`` are those
    of the track which a user can mend; they end with status 2.
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
    return 0
