"""Times single kernels on this GPU, and finds their fastest launch sizes."""

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from foldcore.kernels.launch import Launch, Output
from parity.benchmark import COMPILERS, Row, failure
from parity.timing import Ceilings, graph_ms
from torchfold._triton import call, compile_kernel

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
    try:
        compile_kernel(candidate.launch(), candidate.input_dtypes())
    except Exception as error:  # too much shared memory, too many registers
        return f"{type(error).__name__}: {error}"
    return ""


# Sizes in use -------------------------------------------------------------------------------------


def launch_rows(candidates: Sequence[Candidate], ceilings: Ceilings) -> Iterator[Row]:
    """A row for each: its time, and how much of it moving its arrays once explains."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(compile_one, candidates))
    for candidate in candidates:
        row: Row = {"op": "kernel", "shape": candidate.label, "implementation": "triton, torch"}
        try:
            yield row | _launch_row(candidate, ceilings)
        except Exception as error:
            yield row | failure(error)
        torch.cuda.empty_cache()


def _launch_row(candidate: Candidate, ceilings: Ceilings) -> Row:
    launch, inputs = candidate.launch(), candidate.draw_inputs()
    spent = graph_ms(lambda: call(launch, *inputs))
    moved = sum(x.numel() * x.element_size() for x in inputs)
    floor, bound = ceilings.floor_ms(moved + sum(map(_bytes, launch.outputs)), 0)
    return {"forward_ms": spent, "bound": bound, "forward_share": floor / spent}


def _bytes(output: Output) -> int:
    return math.prod(output.shape) * getattr(torch, output.dtype).itemsize
