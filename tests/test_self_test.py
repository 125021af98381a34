"""The start-up test beyond the operations of the network: the update, and the masks of dropout."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tests.triton_interpreter  # noqa: F401
from foldcore.kernels import cases, dropout, optimizer
from foldcore.kernels.launch import INTERPRETER, Launch
from jaxfold import _dropout, _optimizer, _rows
from jaxfold import _self_test as jax_self_test
from torchfold import _compiled, _self_test, ops

ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_self_test, "EVERY", (cases.UPDATE, cases.MASKS))
    monkeypatch.setattr(jax_self_test, "EVERY", (cases.UPDATE, cases.MASKS))
    if ON_GPU:
        return
    for module in (_optimizer, _rows, jax_self_test):
        monkeypatch.setattr(module, "architecture", lambda: INTERPRETER)
    for module in (_dropout, _optimizer, _rows):
        monkeypatch.setattr(module, "call", tests.triton_interpreter.jax_call)
    monkeypatch.setattr(jax_self_test, "COMPILER_OPTIONS", {})  # they are a GPU's


def changed(function: Callable[..., Launch], **constants: Any) -> Callable[..., Launch]:
    """The function that makes a launch, with other constants."""

    @functools.wraps(function)
    def make(*arguments: Any, **named: Any) -> Launch:
        launch = function(*arguments, **named)
        return replace(launch, constants={**launch.constants, **constants})

    return make


def test_the_kernels_pass_and_leave_the_choice_of_operations() -> None:
    before = ops._chosen, _compiled._enabled
    ops.self_test()
    jax_self_test.run()
    assert (ops._chosen, _compiled._enabled) == before


@pytest.mark.parametrize("run", [ops.self_test, jax_self_test.run])
def test_a_wrong_update_is_refused(
    run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "update", changed(optimizer.update, BETA2=0.998))
    with pytest.raises(cases.WrongKernel, match="optimizer.update are wrong.*(params|ema) differs"):
        run()


@pytest.mark.parametrize("run", [ops.self_test, jax_self_test.run])
def test_wrong_masks_are_refused(run: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    table = dropout.table
    monkeypatch.setattr(dropout, "table", lambda masks: table([(1, *m) for _, *m in masks]))
    with pytest.raises(cases.WrongKernel, match="dropout are wrong .* of a/b, block 0"):
        run()
