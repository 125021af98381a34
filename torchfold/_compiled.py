"""Functions that ``torch.compile`` sees as one piece: a block, a loss, an update.

A piece is small enough to compile in seconds and is compiled once for all blocks of a stack, whose
parameters are its inputs. Compiling is switched on for the whole process, by ``step.configure``.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
VERSIONS = 64
_enabled = False


def enable(on: bool) -> None:
    """Compile from now on, or no longer."""
    global _enabled
    _enabled = on
    if on:  # a block has a version for each of its uses: with or without gradient, dropout, ...
        import torch._dynamo  # slow to import, and only needed here

        torch._dynamo.config.recompile_limit = VERSIONS


def piece(function: Function) -> Function:
    """Mark a function to be compiled as one piece, without a break."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        alone = _enabled and not torch.compiler.is_compiling()  # not inside another piece
        return (compiled() if alone else function)(*arguments, **named)

    return run  # type: ignore[return-value]
