"""The benchmarks of kernels, at small sizes in Triton's interpreter: whose results are compared."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from foldcore.kernels.launch import NEEDS_GPU
from parity import (
    bench_attention,
    bench_kernels,
    bench_modules,
    bench_rows,
    bench_state,
    benchmark,
    peers,
    sweep_attention,
    sweep_rows,
    throughput_modules,
)
from parity.throughput import read_config
from parity.throughput_trace import Span, Trace
from parity.timing import Ceilings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself")

CEILINGS = Ceilings("a device", bandwidth=1e12, rate=1e14)
SMALL = (
    *("data.crop_size=5", "data.num_msa_clusters=4", "data.num_extra_msa=3"),
    *("model.c_m=16", "model.c_z=16", "model.c_e=8", "model.msa_heads=2", "model.msa_head_dim=8"),
    *("model.extra_msa_heads=2", "model.extra_msa_head_dim=4", "model.pair_heads=2"),
    *("model.pair_head_dim=8", "model.triangle_hidden=16", "model.outer_product_hidden=4"),
)


def once(function: Callable[..., Any], inputs: Any = ((),)) -> float:
    function(*inputs[0])
    return 2.0


def traced(start: Callable[[], Any]) -> Trace:
    start()
    return Trace([Span("first", 3.0, 4.0), Span("second", 3.5, 11.0)], [], 1.0, 12.0)


def test_programs_of_jax_take_from_their_first_kernel_to_their_last() -> None:
    assert benchmark._device_ms(lambda *sets: None, [(1,), (2,)]) == 4.0


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    # without making code of what is traced
    monkeypatch.setattr(peers, "compiled", partial(peers.compiled, backend="aot_eager"))
    monkeypatch.setattr(benchmark, "graph_ms", once)
    monkeypatch.setattr(benchmark, "jax_ms", once)
    monkeypatch.setitem(benchmark.TRACERS, "jax", traced)


def check(
    one: benchmark.Benchmark, tolerance: float = 0.03, names: Sequence[str] | None = None
) -> None:
    """Our kernels, plain PyTorch and plain JAX all do what the reference does."""
    names = names or NAMES
    found = {row["implementation"]: row for row in one.rows(CEILINGS, names)}
    assert list(found) == list(names)
    if NAMES[0] in names:
        assert NEEDS_GPU in found[NAMES[0]]["failed"]
    for name in set(names) - {NAMES[0]}:
        row = found[name]
        assert "failed" not in row, row
        assert {"output", *one.differentiable} - row["errors"].keys() <= ALWAYS_ZERO
        assert max(row["errors"].values()) < tolerance, row["errors"]
        assert row["forward_ms"] > 0 and row["forward_share"] > 0


# the same for all keys, which a softmax does not see
ALWAYS_ZERO = {"module: feat_2d_norm//offset"}
NAMES = ("triton, JAX", "triton, torch", "torch", "torch compiled", "XLA")


def modules() -> dict[str, benchmark.Benchmark]:
    config = read_config("initial_training", SMALL)
    return {one.op: one for one in bench_modules.benchmarks(config)}


@pytest.mark.parametrize(
    "name",
    ["MSA row attention", "extra MSA column attention", "triangle multiplication incoming"],
)
def test_modules(name: str) -> None:
    check(modules()[name])


def test_modules_as_in_a_stack() -> None:
    config, name = read_config("initial_training", SMALL), "MSA row attention"
    (part,) = (x for x in throughput_modules.parts(config) if x.name == name)
    whole = bench_modules._Whole(part, config)
    timed = whole.timed("reference")
    one = replace(
        whole.benchmark(), timed={"torch": timed["triton, torch"], "XLA": timed["triton, JAX"]}
    )
    check(one, names=("torch", "XLA"))
    arrays = one.draw()
    plain = one.versions["torch"](*arrays.values())
    made = one.timed["torch"].arrays(arrays)
    assert len(made) == len(arrays) - 3  # one for four weights
    torch.testing.assert_close(one.timed["torch"].version(*made.values()), plain)
    numbers = {name: jnp.asarray(x.float().numpy()) for name, x in arrays.items()}
    made = one.timed["XLA"].arrays(numbers)
    assert len(made) == len(arrays) - 3
    found = torch.from_numpy(np.array(one.timed["XLA"].version(*made.values())))
    torch.testing.assert_close(found, plain.float(), rtol=0.05, atol=0.05)


def test_every_module_that_has_a_best_time_is_there() -> None:
    assert modules().keys() == bench_modules.TAKES.keys()
    assert bench_modules.BEST.keys() <= bench_modules.TAKES.keys()


SHAPES = (
    bench_attention.Shape("rows", 2, 3, 5, 2, 16),
    bench_attention.Shape("columns", 1, 5, 3, 2, 16, axis=1, biased=False),
)


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_attention_and_its_peers(i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "SHAPES", SHAPES[i : i + 1])
    (attention,) = bench_attention.benchmarks()
    check(attention)
    (row,) = attention.rows(CEILINGS, ["torch SDPA"])
    assert max(row["errors"].values()) < 0.03, row


def test_other_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "NORMS": [(3, 16)],
        "BIASES": [(3, 16, 2)],
        "UPDATES": [("", (1, 2, 3), 16, 16, 2)],
        "OUTER": [("", 3, 4, 4, 16)],
        "TRIANGLES": [(), (1, 4, 16, 16)],
        "GLOBAL": (5, 3, 2, 8),
        "TEMPLATES": (3, 4, 2, 8),
    }
    for name, shapes in small.items():
        monkeypatch.setattr(bench_rows, name, shapes)
    seen = set()
    for one in bench_rows.benchmarks():
        check(one, names=("triton, torch", "torch compiled"))
        seen.add(one.op)
    assert len(seen) == len(small)


def test_single_kernels_get_what_they_take() -> None:
    kernels = [*sweep_attention.in_use(), *sweep_rows.in_use()]
    for one in kernels:
        launch = one.launch()
        count = len(one.input_dtypes()) + len(launch.outputs) + len(launch.constants)
        assert count == len(launch.kernel.arg_names), one.label
    assert len({one.label for one in kernels}) == len(kernels)


def test_the_update() -> None:
    update, _ = bench_state.benchmarks(size=300)
    check(update, tolerance=1e-6)


def test_masks_of_both_tracks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = {"row": ((1, 5, 4), 0.15), "pair": ((5, 1, 3), 0.25)}
    monkeypatch.setattr(bench_state, "MASKS", masks)
    *_, drawn = bench_state.benchmarks(blocks=3)
    for row in drawn.rows(CEILINGS, ("triton, torch", "torch", "XLA")):
        assert row["errors"] == {"output": 0.0}, row


def test_what_fails_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(bench_rows, "NORMS", ((3, 16), (2, 16)))
    first, second, *_ = bench_rows.benchmarks()
    object.__setattr__(first, "draw", broken)
    monkeypatch.setattr(bench_kernels, "SOURCES", (argparse.Namespace(benchmarks=lambda: chosen),))
    monkeypatch.setattr(bench_kernels, "QUICK", ("triton, torch",))
    chosen = [first, second]
    given = ["--implementation", "triton, torch", "--op", "layer_norm"]
    options = bench_kernels._parser().parse_args(given)
    monkeypatch.setattr(bench_kernels, "launch_rows", lambda *_: ())
    monkeypatch.setattr(bench_kernels, "compile_kernels", lambda _: None)
    rows = list(bench_kernels.measure(options, CEILINGS, ends=float("inf")))
    assert [row.get("failed") for row in rows] == ["MemoryError: no room", None]
    late = list(bench_kernels.measure(options, CEILINGS, ends=0))
    assert {row["failed"] for row in late} == {"left out, for 180 s are over"}
    assert "MemoryError: no room" in bench_kernels.table(rows)
