"""Kernels of a captured step are compiled before it runs, all that it launches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from foldcore.config import TrainConfig
from foldcore.kernels.launch import Launch
from tests import toy_model
from tests.test_torch_step import ONE_BLOCK, as_torch, step_and_state, toy_config
from torchfold import _triton, ops
from torchfold._arrays import map_tree
from torchfold._graphs import GraphedStep, TwoParts
from torchfold.step import Network

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="loads nothing without a GPU")


def kind(launch: Launch) -> str:
    return _triton._kind(launch, [])


@pytest.mark.slow
@torch.no_grad()
def test_kernels_of_both_parts_are_compiled_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: set[str] = set()
    launched: set[str] = set()
    monkeypatch.setattr(_triton, "_load", lambda launch, dtypes: loaded.add(kind(launch)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ops, "_chosen", "triton")
    config = replace(toy_config(**ONE_BLOCK), train=TrainConfig(batch_size=1))
    step, state = step_and_state(config)
    batch = {name: x[:1] for name, x in as_torch(toy_model.random_batch()).items()}
    parts = TwoParts(step, Network(config.model)._next_pass, config, state, batch)
    before = map_tree(torch.clone, state)
    parts.load(batch)
    GraphedStep._compile_kernels(SimpleNamespace(_parts=parts))  # type: ignore[arg-type]
    assert all(torch.equal(x, y) for x, y in zip(before[:5], state[:5], strict=True))

    def options(launch: Launch, architecture: int) -> dict[str, Any]:
        launched.add(kind(launch))
        return real(launch, architecture)

    real = _triton.options
    monkeypatch.setattr(_triton, "options", options)
    parts.load(batch)
    parts.one_pass(state)
    parts.finish(state)
    assert launched == loaded
    assert len(loaded) > 30
