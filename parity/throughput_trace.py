"""What the device and the host do during one step, as the frameworks' profilers saw it.

Kernels and copies of all streams are put together: the device is idle where none of them runs.
Tracing takes time of its own, above all on the host, so gaps are an upper bound.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

MARK = "one training step"
TOP = 60  # kernels listed
LONG = 0.01  # milliseconds: gaps that are more than the time between two launches
KERNELS = Path(__file__).resolve().parent.parent / "foldcore" / "kernels"
# calls of the host that return when the device has come so far
WAITS = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize|cu(da)?Memcpy(?!.*(Async|Peer))")
STARTS = re.compile(r"cu(da)?(Graph)?Launch|cu(da)?(Memcpy|Memset).*Async")
TO_HOST = re.compile(r"memcpy ?d(to|2)h", re.IGNORECASE)
# by the first that fits the name of a kernel that is not ours
KINDS = (
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitk|_dot|gemv"),
    ("reductions", r"reduce|softmax|norm"),
    ("copies", r"memcpy|copy|transpose|slice|concatenate|catarray|gather|scatter|pad"),
    ("constants", r"memset|fill|broadcast|iota|arange"),
    ("elementwise operations", r"elementwise|fusion|wrapped|triton_poi|foreach"),
)


@dataclass(frozen=True)
class Span:
    """One kernel, copy or call; times in milliseconds from any origin."""

    name: str
    start: float
    end: float

    @property
    def length(self) -> float:
        """In milliseconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """One step: all on the device, and the host's calls of CUDA from its start to ``until``."""

    device: Sequence[Span]
    host: Sequence[Span]
    start: float  # of the call that starts the step
    until: float


# PyTorch ------------------------------------------------------------------------------------------


def trace_torch(start_step: Callable[[], Any]) -> Trace:
    """The second of two steps, each waited for."""
    import torch

    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as found:
        start_step()
        torch.cuda.synchronize()
        with torch.profiler.record_function(MARK):
            start_step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return read_chrome(json.loads(path.read_text())["traceEvents"])


def read_chrome(events: Iterable[Mapping[str, Any]]) -> Trace:
    """From a trace in Chrome's format; microseconds."""
    by_category: dict[str, list[Span]] = {}
    for event in events:
        if event.get("ph") == "X":
            start, length = event["ts"] / 1e3, event["dur"] / 1e3
            span = Span(event["name"], start, start + length)
            by_category.setdefault(event.get("cat", ""), []).append(span)

    def of(*categories: str) -> list[Span]:
        return [span for name in categories for span in by_category.get(name, [])]

    step = _marked(of("user_annotation"))
    device = of("kernel", "gpu_memcpy", "gpu_memset")
    # what follows the call is our own waiting for it
    return _cut(device, of("cuda_runtime", "cuda_driver"), step.start, step.end)


# JAX ----------------------------------------------------------------------------------------------


def trace_jax(start_step: Callable[[], Any]) -> Trace:
    """The second of two steps, each waited for."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.enable_hlo_proto = 0, False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(start_step())
            with jax.profiler.TraceAnnotation(MARK):
                result = start_step()
            jax.block_until_ready(result)
        paths = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        files = [jax.profiler.ProfileData.from_file(path) for path in paths]
        return read_planes([plane for file in files for plane in file.planes])


def read_planes(planes: Iterable[Any]) -> Trace:
    """From the planes of XLA's profiler; nanoseconds."""
    device: list[Span] = []
    host: list[Span] = []
    for plane in planes:
        on_device = plane.name.startswith("/device:GPU")
        if not on_device and not plane.name.startswith("/host:"):
            continue
        for line in plane.lines:
            if on_device and not line.name.startswith("Stream"):
                continue  # the same events once more, by operation
            for event in line.events:
                if on_device or event.name == MARK or event.name.startswith("cu"):
                    start, length = event.start_ns / 1e6, event.duration_ns / 1e6
                    kept = device if on_device else host
                    kept.append(Span(event.name, start, start + length))
    step = _marked(host)
    # threads of the runtime start the program after the call has returned
    until = max((span.end for span in device), default=step.end)
    return _cut(device, [span for span in host if span.name != MARK], step.start, until)


def _marked(spans: Sequence[Span]) -> Span:
    found = [span for span in spans if span.name == MARK]
    if not found:
        raise ValueError(f"the profile does not show the span {MARK!r}")
    return found[-1]


def _cut(device: Sequence[Span], host: Sequence[Span], start: float, until: float) -> Trace:
    """What belongs to the step: the one before had ended when this began."""
    own = sorted((s for s in device if s.start >= start), key=lambda span: span.start)
    return Trace(own, [s for s in host if start <= s.start < until], start, until)


TRACERS = {"jax": trace_jax, "torch": trace_torch}


# What it amounts to -------------------------------------------------------------------------------


def summarize(trace: Trace) -> dict[str, Any]:
    """Launches, gaps, waits of the host, time by kind and by kernel; nothing without a device."""
    if not trace.device:
        return {}
    busy = merge(trace.device)
    gaps = [after - before for (_, before), (after, _) in pairwise(busy)]
    span, long = busy[-1][1] - busy[0][0], [gap for gap in gaps if gap >= LONG]
    waits = [call for call in trace.host if WAITS.match(call.name)]
    return {
        "launches": len(trace.device),
        "kernel_ms": round(sum(span.length for span in trace.device), 3),
        "busy_ms": round(span - sum(gaps), 3),
        "traced_ms": round(span, 3),
        "first_kernel_ms": round(busy[0][0] - trace.start, 3),
        "gaps": len(gaps),
        "idle_ms": round(sum(gaps), 3),
        "idle_share": round(sum(gaps) / span, 4),
        "longest_gap_ms": round(max(gaps, default=0.0), 4),
        "long_gaps": len(long),
        "long_gaps_ms": round(sum(long), 3),
        # a profiler that saw no call of the host cannot tell
        "host_syncs": len(waits) if trace.host else None,
        "host_sync_ms": round(sum(s.length for s in waits), 3) if trace.host else None,
        "host_launches": sum(1 for s in trace.host if STARTS.match(s.name)) if trace.host else None,
        "copies_to_host": sum(1 for span in trace.device if TO_HOST.search(span.name)),
        "kinds": _totals(trace.device, kind_of, "kind"),
        "kernels": _totals(trace.device, lambda name: name[:150], "name")[:TOP],
    }


def merge(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Intervals in which any of them runs; ``spans`` are sorted by their start."""
    merged: list[tuple[float, float]] = []
    for span in spans:
        if merged and span.start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span.end)
        else:
            merged.append((span.start, span.end))
    return merged


def _totals(spans: Iterable[Span], key: Callable[[str], str], field: str) -> list[dict[str, Any]]:
    found: dict[str, tuple[float, int]] = {}
    for span in spans:
        total, count = found.get(key(span.name), (0.0, 0))
        found[key(span.name)] = total + span.length, count + 1
    slowest = sorted(found.items(), key=lambda item: -item[1][0])
    return [
        {field: name, "ms": round(total, 3), "calls": count} for name, (total, count) in slowest
    ]


@cache
def kind_of(name: str) -> str:
    """The file of a kernel of ours; what sort of thing a kernel of a library does."""
    for own, file in _own_kernels().items():
        if re.match(rf"{own}(\W|_\d|$)", name):
            return f"our {file}"
    low = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, low)), "other")


@cache
def _own_kernels() -> dict[str, str]:
    """Names of the kernels, in Triton and in Gluon, and the files they are in."""
    pattern = re.compile(r"^@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
    return {
        name: path.stem.replace("_", " ")
        for path in sorted(KERNELS.glob("*.py"))
        for name in pattern.findall(path.read_text())
    }
