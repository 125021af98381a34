"""Compiled kernels of the JAX track: found in a program, compiled together, kept on the disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxfold._triton_cache import Kept, calls, compile_all


def nested(x: jax.Array) -> jax.Array:
    """Sines in a loop, a scan, a branch, a function and by themselves."""
    x = jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), jnp.sin(x))
    x, _ = jax.lax.scan(lambda y, _: (jnp.sin(y), None), x, None, length=2)
    return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x) + jax.jit(lambda y: jnp.sin(y))(x)


def test_calls_are_found_wherever_they_are() -> None:
    program = jax.jit(nested).trace(jnp.ones(3)).jaxpr
    assert len(list(calls(program.jaxpr, "sin"))) == 5
    assert not list(calls(program.jaxpr, "tan"))


def test_every_kernel_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []
    monkeypatch.setattr("jaxfold._triton_cache._lower", lowered.append)
    program = jax.jit(lambda x, y: (nested(x), nested(x), jnp.sin(y)))
    compile_all(program.trace(jnp.ones(3), jnp.ones(4)).jaxpr, "sin")
    assert sorted(call.invars[0].aval.shape for call in lowered) == [(3,), (4,)]


def test_lowering_accepts_what_is_found() -> None:
    compile_all(jax.jit(nested).trace(jnp.ones(3)).jaxpr, "sin")


@dataclass
class Result:
    binary: str
    name: str
    shared_mem_bytes: int
    ttgir: str | None = None
    llir: str | None = None


class Named:
    """A source or options."""

    def __init__(self, name: str) -> None:
        self.name = name

    def hash(self) -> str:
        return self.name


class Module:
    """What compiling changes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class Compiler:
    """Counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.compiled: list[str] = []
        self._kept = Kept(self._make, self._compile, folder, "1.0", Result)

    def _make(self, function: None, source: Named, *, options: Named, context: str) -> Module:
        assert context == "c"
        return Module(f"{source.name} with {options.name}")

    def _compile(self, module: Module, compute_capability: int) -> Result:
        self.compiled.append(text := str(module))
        module.text = "changed"
        return Result(f"ptx of {text}", text, compute_capability)

    def __call__(self, source: str, options: str = "o") -> tuple[str, Result]:
        module = self._kept.make(None, Named(source), options=Named(options), context="c")
        return str(module), self._kept.compile(module, 90)


def test_a_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    first, second = Compiler(tmp_path / "new"), Compiler(tmp_path / "new")
    asked: list[tuple[Any, ...]] = [("a",), ("b",), ("a", "p")]
    results = [first(*arguments) for arguments in asked]
    assert len(first.compiled) == len(asked)
    assert [second(*arguments) for arguments in asked] == results
    assert not second.compiled


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"binary": 1}'])
def test_a_damaged_file_is_compiled_again(tmp_path: Path, damage: str) -> None:
    text, result = Compiler(tmp_path)("a")
    assert text == result.name == "a with o"
    (kept,) = tmp_path.iterdir()
    kept.write_text(damage)
    again = Compiler(tmp_path)
    assert again("a") == (text, result)
    assert len(again.compiled) == 1
    assert Compiler(tmp_path)("a") == (text, result)
