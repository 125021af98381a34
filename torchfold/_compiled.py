"""Functions that ``torch.compile`` sees as one piece: a block, a loss, an update.

A piece is small enough to compile in seconds and is compiled once for all blocks of a stack, whose
parameters are its inputs. Compiling is switched on for the whole process, by ``step.configure``: of
the pieces around the trunk alone, many small float32 operations ("structure"), or of its blocks as
well ("blocks"), whose time goes into kernels that are there already.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
VERSIONS = 64
_enabled = "none"
_programs: dict[Callable[..., Any], Callable[..., Any]] = {}


def enable(what: str) -> None:
    """Compile from now on: "none", "structure" or "blocks"."""
    global _enabled
    _enabled = what
    if what != "none":  # a piece has a version for each use: with or without gradient, dropout, ...
        import torch._dynamo  # slow to import, and only needed here
        import torch._inductor.config

        torch._dynamo.config.recompile_limit = VERSIONS
        # one launch size for each kernel: to time several takes a third of the time to compile, has
        # saved nothing, and lets results differ from one process to the next
        torch._inductor.config.deterministic = True


@contextmanager
def paused() -> Iterator[None]:
    """Run pieces as they are written, for instance where they are only looked at."""
    global _enabled
    before, _enabled = _enabled, "none"
    try:
        yield
    finally:
        _enabled = before


def piece(function: Function) -> Function:
    """Mark a function to be compiled as one piece, without a break."""
    return _marked(function, ("structure", "blocks"))


def constant_piece(function: Function) -> Function:
    """The same for what has no gradient: one program serves passes with a gradient and without."""
    return torch.no_grad()(piece(function))


def trunk_piece(function: Function) -> Function:
    """The same for a block of the trunk."""
    return _marked(function, ("blocks",))


def _marked(function: Function, when: tuple[str, ...]) -> Function:

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if _enabled not in when or torch.compiler.is_compiling():  # inside another piece
            return function(*arguments, **named)
        if function not in _programs:
            with torch.no_grad(), paused():  # fills tables: a program that does is of no use again
                function(*arguments, **named)
            _programs[function] = torch.compile(function, fullgraph=True, dynamic=False)
        return _programs[function](*arguments, **named)

    return run  # type: ignore[return-value]
