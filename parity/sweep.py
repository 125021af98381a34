"""Tries launch sizes of kernels on this GPU, compiled side by side, and prints the fastest."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from foldcore.kernels.launch import Launch
from parity.timing import graph_ms
from torchfold._triton import call

BEST = 4  # lines to print of each kernel and shape


class Candidate(Protocol):
    """One way to launch one kernel at one shape; can be sent to another process."""

    @property
    def label(self) -> str:
        """Kernel and shape: the candidates of a label compete."""

    @property
    def tiles(self) -> object:
        """What is tried, as it shall be printed."""

    def launch(self) -> Launch: ...

    def input_dtypes(self) -> list[torch.dtype]: ...

    def draw_inputs(self) -> list[Tensor]: ...

    def finish(self, outputs: tuple[Tensor, ...]) -> object:
        """What the sizes make dearer elsewhere, such as adding up partial results."""


def sweep(candidates: Iterable[Candidate], label: str) -> None:
    """Print the fastest sizes of each kernel and shape whose label contains ``label``."""
    chosen = [c for c in candidates if label in c.label]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        compiled = zip(chosen, pool.imap(compile_one, chosen), strict=True)
        for name, group in itertools.groupby(compiled, key=lambda pair: pair[0].label):
            competitors = list(group)
            times = time_all([c for c, failure in competitors if not failure])
            for milliseconds, tiles in sorted(times)[:BEST]:
                print(f"{name:<45} {milliseconds:.4f} ms {tiles}", flush=True)
            if len(times) < len(competitors):
                print(f"{name:<45} {len(competitors) - len(times)} sizes do not fit", flush=True)


def time_all(competitors: list[Candidate]) -> list[tuple[float, str]]:
    """Milliseconds and sizes of those that fit this device."""
    times = []
    inputs = competitors[0].draw_inputs() if competitors else []
    for candidate in competitors:
        try:
            times.append((graph_ms(runner(candidate, inputs)), str(candidate.tiles)))
        except OutOfResources:  # more shared memory than there is; known once it is loaded
            continue
    del inputs
    torch.cuda.empty_cache()
    return times


def runner(candidate: Candidate, inputs: list[Tensor]) -> Callable[[], object]:
    """The function that launches a candidate, to be timed."""
    launch = candidate.launch()
    return lambda: candidate.finish(call(launch, *inputs))


def compile_one(candidate: Candidate) -> str:
    """Fill Triton's cache on disk; says what is wrong with sizes that do not fit."""
    launch = candidate.launch()
    outputs = [getattr(torch, output.dtype) for output in launch.outputs]
    try:
        launch.kernel.warmup(
            *candidate.input_dtypes(),
            *launch.scalars,
            *outputs,
            grid=launch.grid,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    except Exception as error:  # too much shared memory, too many registers
        return f"{type(error).__name__}: {error}"
    return ""
