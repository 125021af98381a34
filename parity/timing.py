"""Times on a GPU: graph replays of what PyTorch runs, asynchronous calls of what JAX compiled."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 20
IN_A_GRAPH = 4  # runs, so that the launch of the graph itself does not count


def graph_ms(function: Callable[[], Any]) -> float:
    """Median time of one run, as a CUDA graph whose replays are timed by events.

    What a run moves should be more than the cache holds.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries make their choices
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads (NCCL's) may do as they like meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(IN_A_GRAPH):
            function()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / IN_A_GRAPH)
    return statistics.median(times)


def jax_ms(function: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> float:
    """Median time of one call of a compiled function; calls over different inputs queue up."""
    import jax

    for _ in range(2):
        jax.block_until_ready([function(*x) for x in inputs])
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([function(*x) for x in inputs])
        times.append(1e3 * (time.perf_counter() - start) / len(inputs))
    return statistics.median(times)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: bytes a second copied, operations a second in a large product."""

    name: str
    bandwidth: float
    rate: float

    def floor_ms(self, moved: float, operations: float) -> tuple[float, str]:
        """The least time for so many bytes and operations, and which of them it is due to."""
        by_bytes, by_rate = 1e3 * moved / self.bandwidth, 1e3 * operations / self.rate
        return max(by_bytes, by_rate), "bytes" if by_bytes > by_rate else "operations"


def measure_ceilings() -> Ceilings:
    """A copy of 2 GiB and a product of 8192 x 8192 bfloat16 matrices of random numbers."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = graph_ms(lambda: target.copy_(source))
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product_ms = graph_ms(lambda: left @ right)
    return Ceilings(
        name=torch.cuda.get_device_name(),
        bandwidth=2e3 * source.numel() / copy_ms,
        rate=2e3 * 8192**3 / product_ms,
    )
