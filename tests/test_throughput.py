"""Step times, their page, and where the time of a step goes."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from foldcore.config import Config, TrainConfig, load
from foldcore.features import dimensions, shape
from parity import (
    flops,
    throughput,
    throughput_modules,
    throughput_page,
    throughput_roofline,
    throughput_run,
    throughput_tables,
    throughput_time,
)
from parity.derived import InJax
from parity.throughput_trace import (
    MARK,
    Span,
    Trace,
    kind_of,
    read_chrome,
    read_planes,
    summarize,
    trace_jax,
)
from parity.timing import Ceilings

PUBLISHED = replace(Config(), train=TrainConfig(batch_size=1))
TINY = Path(__file__).parent / "data" / "tiny.toml"
WITH_TEMPLATES = ["model.templates_enabled=true", "data.num_templates=2", "model.c_t=8"]
CEILINGS = Ceilings("a GPU", bandwidth=4e12, rate=8e14)


# Operations ---------------------------------------------------------------------------------------


def test_operations_of_a_step_at_full_size() -> None:
    forward = sum(flops.forward(PUBLISHED).values())
    assert flops.step(PUBLISHED, 3) - flops.step(PUBLISHED, 1) == pytest.approx(2 * forward)
    assert flops.step(PUBLISHED, 1.5) == pytest.approx(53e12, rel=0.01)  # at 1.5 passes on average
    two = replace(PUBLISHED, train=TrainConfig(batch_size=2))
    assert flops.step(two, 1.5) == 2 * flops.step(PUBLISHED, 1.5)


def test_operations_of_a_module_by_hand() -> None:
    assert flops.linear(3, 4, 5) == 2 * 3 * 4 * 5
    s, r, c = 128, 256, 256
    transition = flops.forward(PUBLISHED)["MSA transition"]
    assert transition == 48 * (2 * s * r * c * 4 * c) * 2  # two layers of four times the channels
    row = 5 * 2 * s * r * c * c + 2 * 2 * s * r * r * c + 2 * r * r * 128 * 8
    assert flops.forward(PUBLISHED)["MSA row attention"] == 48 * row


def test_utilization_of_known_devices() -> None:
    assert flops.utilization(9.89e14, 2.0, "1 x gpu NVIDIA H100 80GB HBM3") == 0.5
    assert flops.utilization(1e12, 1.0, "1 x cpu cpu") is None


# Modules and their roofline -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [PUBLISHED, load(TINY, []), load(TINY, WITH_TEMPLATES)])
def test_the_modules_make_up_a_step(config: Config) -> None:
    parts = throughput_modules.parts(config)
    one = replace(config, train=TrainConfig(batch_size=1))
    for passes in (1, 4):
        counted = sum(part.calls_in(passes) * part.operations for part in parts)
        backward = sum(2 * part.calls * part.operations for part in parts)
        assert counted + backward == pytest.approx(flops.step(one, passes - 1))


def least(name: str) -> tuple[throughput_modules.Part, int, int]:
    part = next(p for p in throughput_modules.parts(PUBLISHED) if p.name == name)
    return part, *throughput_roofline.moved(part, PUBLISHED)


def test_bytes_of_a_module_by_hand() -> None:
    part, forward, backward = least("MSA transition")
    msa, parameters = 128 * 256 * 256, 2 * 256 + 8 * 256**2 + 4 * 256 + 256
    assert forward == 2 * (msa + parameters + msa)  # bfloat16
    assert backward == forward + 2 * (msa + parameters)
    floor, by = CEILINGS.floor_ms(forward, part.operations)
    assert by == "operations" and floor == pytest.approx(1e3 * part.operations / 8e14)


def test_only_features_that_are_read_count() -> None:
    _, forward, _ = least("structure module")
    pair, r = 2 * 256 * 256 * 128, 256
    assert pair < forward < pair + 20e6  # no MSA: that of the extra sequences alone is larger
    seen = throughput_modules.shapes(PUBLISHED)
    assert seen["msa_feat"] == (1, 124, r, 49) and seen["true_msa"] == (1, 1, 124, r)


# Times of modules ---------------------------------------------------------------------------------


def random_batch(config: Config) -> dict[str, np.ndarray]:
    random, sizes = np.random.default_rng(1), dimensions(config.data)
    names = ("seq_mask", "extra_msa_mask", "msa_feat", "target_feat", "residue_index", "aatype")
    batch = {name: random.integers(0, 2, shape(name, sizes)) for name in names}
    return {
        n: x.astype(np.int32 if n in ("aatype", "residue_index") else np.float32)
        for n, x in batch.items()
    }


@pytest.mark.parametrize("track", throughput.TRACKS)
def test_a_module_that_fails_does_not_stop_the_others(
    track: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(TINY, [])
    good = next(p for p in throughput_modules.parts(config) if p.name == "pair transition")

    def fail(*arguments: Any) -> Any:
        raise ValueError("no such kernel\nfor this shape")

    bad = replace(good, name="bad", module=replace(good.module, call=fail))
    monkeypatch.setattr(throughput_time, "parts", lambda config: [bad, good])
    found = list(throughput_time.module_times(track, config, random_batch(config)))
    names = [row["module"] for row in found]
    assert names == ["bad", "pair transition", throughput_roofline.UPDATE]
    assert found[0]["failed"] == "ValueError: no such kernel"
    assert found[1]["forward_ms"] > 0 and found[1]["calls"] == 2
    assert found[2]["forward_ms"] > 0 and found[2]["backward_ms"] == 0


def test_both_tracks_time_the_same_computation() -> None:
    config = load(TINY, ["model.evoformer_blocks=2"])
    batch = random_batch(config)
    batch["seq_mask"][:] = batch["extra_msa_mask"][:] = 1
    inputs = throughput_modules.make_inputs(config, batch)
    name = "extra MSA row attention"
    part = next(p for p in throughput_modules.parts(config) if p.name == name)
    parameters = throughput_modules.draw_parameters(part)
    forward, both = throughput_time._InTorch(config, inputs)._functions(part, parameters)
    gradients = both()
    # one for four weights; those of the MSA and of the pair as well
    assert len(gradients) == len(parameters) - 3 + 2
    assert all(x is not None and x.abs().sum() > 0 for x in gradients)

    own, x = ({n: jnp.asarray(v) for n, v in arrays.items()} for arrays in (parameters, inputs))
    derived = {n: x.pop(n) for n in part.module.derive}
    in_jax, both_in_jax = throughput_time.jax_functions(part)
    arrays = InJax(part.module).arrays(own)
    (outputs,) = in_jax(arrays, x, (derived,), {})
    found = forward()[0].numpy()
    np.testing.assert_allclose(outputs["extra"], found, rtol=1e-3, atol=1e-4)
    ((_, (by_arrays, _)),) = both_in_jax(arrays, x, (derived,), {"extra": outputs["extra"]})
    assert len(by_arrays) == len(parameters) - 3
    assert all(jnp.any(x) for x in by_arrays)


@pytest.mark.parametrize("track", throughput.TRACKS)
def test_what_stacks_derive_is_timed(track: str) -> None:
    config = load(TINY, [])
    found = throughput_time.module_times(track, config, random_batch(config), "weights derived")
    names = {row["module"]: row for row in found}
    assert names.keys() == {"weights derived", "extra weights derived"}
    assert all(row.get("forward_ms", 0) > 0 for row in names.values()), names


# The profile --------------------------------------------------------------------------------------


def test_gaps_of_several_streams() -> None:
    device = [Span("a", 1, 2), Span("b", 1.5, 3), Span("c", 1.6, 1.8), Span("a", 3.004, 4)]
    device += [Span("MemcpyD2H", 4.5, 5)]
    host = [Span("cuLaunchKernel", 0.1, 0.2), Span("cuStreamSynchronize", 0.3, 0.8)]
    found = summarize(Trace(device, host, start=0.25, until=5))
    assert (found["launches"], found["gaps"], found["long_gaps"]) == (5, 2, 1)
    assert found["idle_ms"] == pytest.approx(0.504) and found["longest_gap_ms"] == 0.5
    assert found["busy_ms"] == pytest.approx(4 - 0.504) and found["traced_ms"] == 4
    assert found["kernel_ms"] == pytest.approx(4.196) and found["first_kernel_ms"] == 0.75
    assert (found["host_syncs"], found["host_sync_ms"], found["copies_to_host"]) == (1, 0.5, 1)
    assert found["kernels"][0] == {"name": "a", "ms": 1.996, "calls": 2}
    assert summarize(Trace(device, [], 0, 5))["host_syncs"] is None  # not known is not none
    assert summarize(Trace([], host, 0, 5)) == {}


def test_a_step_is_cut_out_of_a_chrome_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        {"ph": "M", "name": "process_name"},
        event("kernel", "of the step before", 0, 900),
        event("cuda_runtime", "cudaDeviceSynchronize", 500, 450),
        event("user_annotation", MARK, 1000, 500),
        event("cuda_runtime", "cudaGraphLaunch", 1100, 100),
        event("cuda_runtime", "cudaEventSynchronize", 1300, 10),
        event("cpu_op", "aten::add", 1350, 10),
        event("kernel", "nvjet_tst_128x256", 1400, 600),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 2100, 100),
        event("gpu_user_annotation", MARK, 1400, 800),
        event("cuda_runtime", "cudaDeviceSynchronize", 1600, 700),  # our own
    ]
    found = summarize(read_chrome(events))
    assert (found["launches"], found["host_launches"], found["host_syncs"]) == (2, 1, 1)
    assert found["idle_ms"] == 0.1 and found["host_sync_ms"] == 0.01
    assert [kind["kind"] for kind in found["kinds"]] == ["matrix products", "copies"]


def test_a_step_is_cut_out_of_the_planes_of_xla() -> None:
    def line(name: str, *events: tuple[str, float, float]) -> SimpleNamespace:
        made = [SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in events]
        return SimpleNamespace(name=name, events=made)

    kernels = [("forward_kernel", 100, 800), ("forward_kernel", 1200, 400)]
    threads = [
        line("python", (MARK, 1000, 100)),
        line("runtime", ("cuLaunchKernel", 1110, 10), ("cuStreamSynchronize", 1300, 300)),
        line("profiler", ("cuCtxSynchronize", 2500, 100)),
    ]
    copies = line("Stream #14(MemcpyD2D)", ("MemcpyD2D", 1700, 300))
    device = [line("Stream #13(Compute)", *kernels), copies, line("XLA Ops", *kernels)]
    planes = [("/host:CPU", threads), ("/device:GPU:0", device), ("Task Environment", threads)]
    found = summarize(read_planes([SimpleNamespace(name=n, lines=x) for n, x in planes]))
    assert (found["launches"], found["gaps"], found["host_syncs"]) == (2, 1, 1)
    assert [kind["kind"] for kind in found["kinds"]] == ["our attention", "copies"]


def test_the_step_is_found_in_real_profiles(tmp_path: Path) -> None:
    program = jax.jit(lambda x: x @ x)
    found = trace_jax(lambda: program(jnp.ones((8, 8))))
    assert found.start < found.until and summarize(found) == {}
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        with torch.profiler.record_function(MARK):
            torch.ones(8, 8) @ torch.ones(8, 8)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert read_chrome(events).start < read_chrome(events).until
    with pytest.raises(ValueError, match="does not show the span"):
        read_chrome([])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("forward_kernel", "our attention"),
        ("triangle_output_backward_kernel", "our triangle output backward"),
        ("triangle_product_kernel", "our triangle product"),  # in Gluon
        ("void cublasLt::splitKreduce_kernel<32>(float*)", "matrix products"),
        ("gemm_fusion_dot_12", "matrix products"),
        ("loop_dynamic_update_slice_fusion", "copies"),
        ("at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("input_reduce_fusion_3", "reductions"),
        ("loop_add_fusion", "elementwise operations"),
        ("unheard_of", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# Tables and page ----------------------------------------------------------------------------------


def row(track: str, recycling: int, step_ms: float, **more: Any) -> dict[str, Any]:
    values = dict(step_ms_p10=step_ms - 1, step_ms_p90=step_ms + 1, examples_per_s=1, mfu=None)
    named = dict(track=track, config="small", recycling=recycling, step_ms=step_ms, batch_size=1)
    rest = dict(peak_gib=1.5, compile_s=2.0, device="1 x <gpu>", overrides=[], versions={"a": "1"})
    return named | values | rest | more


def timed() -> list[dict[str, Any]]:
    return [
        {"module": "x", "calls": 3, "every_pass": True, "forward_ms": 2.0, "backward_ms": 5.0},
        {"module": "y", "calls": 1, "every_pass": False, "forward_ms": 1.0, "backward_ms": 0.5},
        {"module": "z", "calls": 9, "every_pass": True, "failed": "ValueError: <no>"},
    ]


def roofline() -> dict[str, Any]:
    ways = {"forward": {"ms": 0.5, "bound": "bytes"}, "backward": {"ms": 1.0, "bound": "bytes"}}
    ceilings = {"name": "a GPU", "bandwidth": 4.25e12, "rate": 8.1e14}
    return {"ceilings": ceilings, "modules": dict.fromkeys("xyz", ways)}


def test_modules_of_a_step_against_the_roofline() -> None:
    rows = [row("torch", 3, 100.0, modules=timed(), batch_size=2)]
    throughput_tables.add_rooflines(rows, roofline())
    x, y, z, whole, rest = throughput_tables.in_step(rows[0])
    # two examples, each with three calls in each of four passes, three of them with a gradient
    assert (x["calls"], x["forward_ms"], x["backward_ms"]) == (24, 48.0, 30.0)
    assert x["roofline_ms"] == 12 + 6 and x["ratio"] == 78 / 18
    assert (y["calls"], y["both_ms"], y["roofline_ms"]) == (2, 3.0, 3.0)
    assert z["both_ms"] is None and z["share"] is None
    assert (whole["both_ms"], whole["roofline_ms"]) == (81.0, 21.0)
    assert rest["both_ms"] == 19.0 and rest["share"] == pytest.approx(0.19)
    text = throughput_tables.describe(rows[0])
    assert "z: ValueError: <no>" in text and "everything else" in text and "81.0%" in text


def test_without_a_gpu_there_are_dashes() -> None:
    rows = [row("torch", 0, 100.0, modules=timed()[:2])]
    throughput_tables.add_rooflines(rows, None)
    x = throughput_tables.module_cells(rows[0])[0]
    assert x == ["x", "3", "6.00", "15.00", "21.00", "-", "-", "21.0%"]
    assert " - " in throughput_tables.steps(rows)


def test_the_page_shows_every_row_the_modules_and_the_kernels() -> None:
    device = [Span("void fast<int>(x)", 0, 1.5), Span("slow_kernel", 2, 22.25)]
    found = summarize(Trace(device, [Span("cudaGraphLaunch", -1, 0)], start=-1, until=22))
    rows = [row("jax", 0, 100.5), row("torch", 0, 90.25)]
    rows += [row("torch", 1, 120.75, modules=timed(), **found)]
    throughput_tables.add_rooflines(rows, roofline())
    page = throughput_page.render(rows, flops.forward(PUBLISHED))
    for text in ("100.5 ms", "90.2 ms", "120.8 ms", "fast&lt;int&gt;", "1 x &lt;gpu&gt;"):
        assert text in page
    assert "2 kernels and copies keep the device busy for 21.8 ms of the 22.2 ms" in page
    assert "0.50 ms (2.2%) in 1 gaps, the longest 500 us" in page
    assert "waits for it 0 times" in page and "a GPU copies 4.25 TB/s" in page
    assert "z: ValueError: &lt;no&gt;" in page and "everything else" in page
    assert page.index("slow_kernel") < page.index("fast&lt;int&gt;")
    assert page.count("<svg") == 3 and "http" not in page  # nothing to load


# The command --------------------------------------------------------------------------------------


def test_what_a_worker_measured_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        part = Path(command[command.index("--out", command.index("--track")) + 1])
        worker, track = command[-1], command[command.index("--track") + 1]
        # JAX may take a GPU's memory in its own process alone
        assert (env.get("JAX_PLATFORMS") != "cpu") == (worker == "steps" and track == "jax")
        if worker == "roofline":
            part.write_text(json.dumps(roofline()))
        else:
            part.write_text(json.dumps([row(track, 0, 50.0, modules=timed()[:2])]))
        return SimpleNamespace(returncode=-11 if track == "jax" and worker == "steps" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    out = tmp_path / "deep" / "t.json"
    assert throughput.main(["--config", str(TINY), "--out", str(out)]) == 1
    assert "steps jax: exit status -11" in capsys.readouterr().err
    rows = json.loads(out.read_text())
    assert [r["track"] for r in rows] == ["jax", "torch"]
    assert rows[0]["modules"][0]["forward_roofline_ms"] == 0.5
    assert {path.name for path in out.parent.iterdir()} == {
        *("t.json", "t.html", "t.jax.txt", "t.torch.txt")
    }


class Pipeline:
    """A trainer whose device takes ten ticks for a step and whose host takes four to start one."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.ready, self.started = clock, 0.0, []

    def start(self, batch: str) -> float:
        self.clock[0] += 4
        self.ready = max(self.ready, self.clock[0]) + 10
        self.started.append(batch)
        return self.ready

    def _loss(self, ready: float) -> float:
        self.clock[0] = max(self.clock[0], ready)
        return 0.0


def test_steps_are_timed_as_training_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's part of a step is hidden behind the step before."""
    clock = [0.0]
    monkeypatch.setattr(throughput_run.time, "perf_counter", lambda: clock[0])
    pipeline = Pipeline(clock)
    assert throughput_run.Trainer.intervals(pipeline, "batch", 3) == [10, 10, 10]  # type: ignore[arg-type]
    assert pipeline.started == ["batch"] * 5 and clock[0] == pipeline.ready


def test_a_track_is_measured_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    arguments = ["--config", str(TINY), "--track", "torch", "--recycling", "1", "--steps", "1"]
    assert throughput.main([*arguments, "--module", "pair transition", "--out", str(out)]) == 0
    (found,) = json.loads(out.read_text())
    assert found["recycling"] == 1 and found["step_ms"] > 0 and found["mfu"] is None
    assert found["alone_ms"] > 0
    assert [module["module"] for module in found["modules"]] == ["pair transition"]
    assert found["modules"][0]["forward_ms"] > 0
    assert found["modules"][0]["forward_roofline_ms"] is None and found["ceilings"] is None
    assert "Time by module" in out.with_suffix(".html").read_text()
