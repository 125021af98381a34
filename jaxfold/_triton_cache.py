"""Compiling Triton kernels for JAX: all of a program's at once, and each only once on a machine.

jax-triton compiles a kernel when it is lowered, one after another, and forgets it with the process.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

Step = Callable[..., Any]
KEPT = {"binary", "name", "shared_mem_bytes", "ttgir", "llir", "ttir"}


def compile_all(program: ClosedJaxpr, primitive: str = "triton_kernel_call") -> None:
    """Compile the kernels that a traced program calls; its lowering then finds them ready.

    Threads do it: Triton lets go of Python's lock while its compiler runs.
    """
    found = {_key(call): call for call in calls(program.jaxpr, primitive)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_lower, found.values()))


def calls(program: Jaxpr, primitive: str) -> Iterator[JaxprEqn]:
    """The equations of this primitive, those of inner programs included."""
    for equation in program.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, Jaxpr):
                    yield from calls(inner, primitive)


def _key(call: JaxprEqn) -> str:
    """The same for calls of one kernel with arrays of the same shapes."""
    return f"{[variable.aval for variable in call.invars]} {sorted(call.params.items(), key=str)}"


def _lower(call: JaxprEqn) -> None:
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in call.invars]  # type: ignore[attr-defined]
    jax.jit(partial(call.primitive.bind, **call.params)).lower(*shapes)


class Known(NamedTuple):
    """A kernel found on the disk, where jax-triton expects Triton's module of it."""

    ttir: str
    result: Any

    def __str__(self) -> str:
        return self.ttir


class Kept:
    """jax-triton's two steps to a kernel; what they gave is read from a folder the next time.

    ``make(function, source, options=, ...)`` parses a kernel to Triton's module, ``compile(module,
    ...)`` makes PTX of it.
    """

    def __init__(
        self, make: Step, compile: Step, folder: Path, version: str, result_type: type
    ) -> None:
        self._make, self._compile = make, compile
        self._folder, self._version, self._type = folder, version, result_type
        self._current = threading.local()  # a thread makes a kernel and then compiles it

    def make(self, function: Any, source: Any, *, options: Any, **rest: Any) -> Any:
        """What was kept for this source, sizes and options; else Triton's module."""
        parts = (self._version, source.hash(), options.hash())
        path = self._folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"
        if (known := _read(path)) is not None:
            return Known(known.pop("ttir"), self._type(**known))
        module = self._make(function, source, options=options, **rest)
        self._current.kernel = path, str(module)  # compiling changes the module
        return module

    def compile(self, module: Any, *rest: Any) -> Any:
        """The compiled kernel."""
        if isinstance(module, Known):
            return module.result
        path, ttir = self._current.kernel
        result = self._compile(module, *rest)
        _write(path, {**asdict(result), "ttir": ttir})
        return result


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept; None where it is missing or was damaged, and the kernel has to be compiled."""
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return known if isinstance(known, dict) and set(known) == KEPT else None


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    part.write_text(json.dumps(result))
    part.replace(path)
