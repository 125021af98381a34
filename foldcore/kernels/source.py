"""What Triton's compiler takes kernels as: those in Triton, and those in Gluon, its lower level."""

import functools
import sys
import threading
from typing import Any

from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITCallable

_parsing = threading.Lock()


def source_type(kernel: Any) -> type[ASTSource]:
    """The type of the source of a kernel, what ``triton.jit`` or ``gluon.jit`` returns."""
    return GluonASTSource if kernel.is_gluon() else ASTSource


@functools.cache
def parse_in_turn() -> None:
    """Let threads that compile kernels parse them one at a time, from now on.

    Before 3.12 Python's parser keeps count of its depth for all threads in one place, and now and
    then refuses what two of them parse at once (python/cpython#106905).
    """
    if sys.version_info >= (3, 12):
        return
    parse = JITCallable.parse

    def alone(kernel: Any) -> Any:
        with _parsing:
            return parse(kernel)

    JITCallable.parse = alone
