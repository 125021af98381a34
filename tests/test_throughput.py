"""The count of a step's operations, and the page of step times."""

from dataclasses import replace
from typing import Any

import pytest

from foldcore.config import Config, TrainConfig
from parity import flops, throughput, throughput_page

PUBLISHED = replace(Config(), train=TrainConfig(batch_size=1))


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


def row(track: str, recycling: int, step_ms: float, **more: Any) -> dict[str, Any]:
    values = dict(step_ms_p10=step_ms - 1, step_ms_p90=step_ms + 1, examples_per_s=1, mfu=None)
    named = dict(track=track, config="small", recycling=recycling, step_ms=step_ms)
    rest = dict(peak_gib=1.5, compile_s=2.0, device="1 x <gpu>", overrides=[], versions={"a": "1"})
    return named | values | rest | more


def test_the_page_shows_every_row_and_the_kernels() -> None:
    kernels = throughput.summarize({"void fast<int>(x)": (1.5, 3), "slow_kernel": (20.25, 7)})
    rows = [row("jax", 0, 100.5), row("torch", 0, 90.25), row("torch", 1, 120.75, **kernels)]
    page = throughput_page.render(rows, throughput.COLUMNS.split(), flops.forward(PUBLISHED))
    for text in ("100.5 ms", "90.2 ms", "120.8 ms", "fast&lt;int&gt;", "1 x &lt;gpu&gt;"):
        assert text in page
    assert "10 kernels take 21.8 of 120.8 ms; 99.0 ms (82.0%) lie between them" in page
    assert page.index("slow_kernel") < page.index("fast&lt;int&gt;")
    assert page.count("<svg") == 2 and "http" not in page  # nothing to load
    assert "20.250" in throughput.describe(rows[-1]) and " - " in throughput.table(rows)
