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
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

Compile = Callable[..., Any]  # (ttir, backend, options, compute capability, platform) -> result
KEPT = ("binary", "name", "shared_mem_bytes", "ttgir", "llir")  # fields of a result


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


def on_disk(compile_kernel: Compile, folder: Path, version: str, result_type: type) -> Compile:
    """``compile_kernel``, whose results are kept in a folder and read from it the next time."""

    def run(ttir: Any, backend: Any, options: Any, compute_capability: int, platform: str) -> Any:
        parts = (version, platform, str(compute_capability), options.hash(), str(ttir))
        path = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"
        if (known := _read(path)) is not None:
            return result_type(**known)
        result = compile_kernel(ttir, backend, options, compute_capability, platform)
        _write(path, {name: value for name, value in asdict(result).items() if name in KEPT})
        return result

    return run


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept; None where it is missing or was damaged, and the kernel has to be compiled."""
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return known if isinstance(known, dict) and set(known) == set(KEPT) else None


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    part.write_text(json.dumps(result))
    part.replace(path)
