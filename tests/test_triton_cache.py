"""Compiled kernels of the JAX track: found in a program, compiled together, kept on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from foldcore.kernels import launch
from jaxfold._triton_cache import Request, calls

ROOT = Path(__file__).resolve().parent.parent


def nested(x: jax.Array) -> jax.Array:
    """Sines in a loop, a scan, a branch, a function and by themselves."""
    x = jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), jnp.sin(x))
    x, _ = jax.lax.scan(lambda y, _: (jnp.sin(y), None), x, None, length=2)
    return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x) + jax.jit(lambda y: jnp.sin(y))(x)


def test_calls_are_found_wherever_they_are() -> None:
    program = jax.jit(nested).trace(jnp.ones(3)).jaxpr
    assert len(list(calls(program.jaxpr, "sin"))) == 5
    assert not list(calls(program.jaxpr, "tan"))


def test_scalars_do_not_decide_what_is_compiled() -> None:
    aval = jax.core.ShapedArray((3,), jnp.dtype("bfloat16"))
    common = dict(fn=len, out_shapes=(aval,), num_warps=4, num_stages=2, compute_capability=90, N=3)

    def request(*scalars: tuple[int, str, int | float]) -> Request:
        return Request.of([aval], {**common, "scalar_args": scalars, "name": "a", "grid": (1,)})

    one, other = request((1, "fp32", 0.5), (2, "i32", -1)), request((1, "fp32", 2.0), (2, "i32", 7))
    assert one == other and hash(one) == hash(other)
    assert one != request((1, "fp32", 0.5))
    assert one.types == ("*bf16", "fp32", "i32", "*bf16")
    assert one.constants == (("N", 3),)
    assert one.words().astype("<i8").tobytes()[:4] == np.float32(0.5).tobytes()
    assert one.words().astype("<i8").tobytes()[8:12] == np.int32(-1).tobytes()
    with pytest.raises(ValueError, match="scalars of a come after"):
        request((0, "i32", 1))


TRITON = SimpleNamespace(fn=len, is_gluon=lambda: False)


def test_launches_that_overlap_are_of_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "source", lambda self: SimpleNamespace(hash=lambda: "same"))
    keys = set()
    for architecture in (90, 90, 80):
        keys.add(Request(TRITON, (), (), 4, 2, architecture).key)
    monkeypatch.setattr(launch, "OVERLAP", False)
    keys.add(Request(TRITON, (), (), 4, 2, 90).key)
    assert len(keys) == 3


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two processes, the second of which finds what the first compiled."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder), PYTHONPATH=str(ROOT))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.lowered_kernels"]
    found = []
    for seed in "12":
        environment["PYTHONHASHSEED"] = seed
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    return found


def test_every_kernel_is_compiled_once(reports: list[dict[str, Any]]) -> None:
    first, second = reports
    assert first["hits"] == [False] * len(first["kernels"])
    assert second["hits"] == [True] * len(first["kernels"])


def test_programs_are_equal_in_all_processes(reports: list[dict[str, Any]]) -> None:
    first, second = reports
    assert first["calls"] == second["calls"]
    assert first["kernels"] == second["kernels"]
    assert not any(call["here"] for call in first["calls"].values())


def test_programs_name_their_kernels(reports: list[dict[str, Any]]) -> None:
    calls, kernels = reports[0]["calls"], reports[0]["kernels"]
    counts = {name: [count for _, count in call["keys"]] for name, call in calls.items()}
    assert counts == {"norms": [2], "scaled": [2], "transitions": [1, 1, 1], "update": [1]}
    assert {key for call in calls.values() for key, _ in call["keys"]} == set(kernels)
    assert all(form == "ELF" and threads % 32 == 0 for _, form, threads, *_ in kernels.values())
    assert all(overlapped for *_, overlapped, _ in kernels.values())


def test_scalars_and_places_arrive(reports: list[dict[str, Any]]) -> None:
    calls = reports[0]["calls"]
    half, three = (int(np.float32(x).view(np.int32)) for x in (0.5, 3))
    assert calls["scaled"]["scalars"] == [[f"[{half}, -2]", "2xi64"], [f"[{three}, 7]", "2xi64"]]
    assert calls["norms"]["grids"] == [["[2, 1, 1]", "3xi32"]]
    # parameters, also rounded, both moments and the average are overwritten
    assert [calls[name]["aliases"] for name in ("norms", "scaled", "update")] == [0, 0, 5]
