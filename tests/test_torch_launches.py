"""How PyTorch launches kernels: what Triton is given, now and ahead of time."""

import ast
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton

from foldcore.kernels import launch as launches
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.source import parse_in_turn
from torchfold import _triton


class Kernel:
    """Notes how it is launched, and how it is compiled."""

    def __init__(self) -> None:
        self.given: list[list[tuple[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arrays, **options: self.given.append(list(options.items()))

    def warmup(self, *types: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.given.append(list(options.items()))


def given(monkeypatch: pytest.MonkeyPatch, architecture: int) -> list[tuple[str, Any]]:
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()
    launch = Launch(kernel, (1,), (Output((3,), "float32"),), {"N": 3}, num_warps=8)
    _triton.call(launch, torch.zeros(3))
    _triton.compile_kernel(launch, [torch.float32])
    called, compiled = kernel.given
    assert called == compiled  # in their order too, which Triton's key of a kernel keeps
    return called


def test_kernels_compiled_ahead_are_those_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [("N", 3), ("num_warps", 8), ("num_stages", 2)]
    assert given(monkeypatch, 80) == sizes
    assert given(monkeypatch, 90) == [*sizes, ("launch_pdl", True)]
    assert given(monkeypatch, launches.INTERPRETER) == sizes
    monkeypatch.setattr(launches, "OVERLAP", False)
    assert given(monkeypatch, 90) == sizes


def test_results_of_launches_only_noted_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(_triton, "_noted", noted)
    monkeypatch.setattr(torch, "empty", lambda shape, **kind: torch.full(shape, torch.nan, **kind))
    launch = Launch(Kernel(), (1,), (Output((3,), "float32"),), {"N": 3})
    (found,) = _triton.call(launch, torch.ones(3))
    assert len(noted) == 1 and not found.any()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python's threads parse side by side")
def test_threads_parse_kernels_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, inside, most = ast.parse, [], []

    def slow(text: str) -> ast.Module:
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return parse(text)

    parse_in_turn()
    kernel = triton.JITFunction(given)
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(ast, "parse", slow)
        list(pool.map(lambda _: kernel.parse(), range(8)))
    assert most == [1] * 8
