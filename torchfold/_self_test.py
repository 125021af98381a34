"""Runs every kernel once, forward and backward, beside its reference."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foldcore.kernels.cases import CASES, MASKS, UPDATE, Case, MaskCase, UpdateCase
from torchfold import _compiled, ops, optimizer, projections
from torchfold._masks import MaskPlan, Request
from torchfold._triton import architecture, compile_ahead

MODULES = {"ops": ops, "projections": projections}
EVERY: tuple[Case | UpdateCase | MaskCase, ...] = (*CASES, UPDATE, MASKS)


def run(device: torch.device) -> None:
    """Raise WrongKernel for the first kernel whose results differ."""
    architecture(device)  # says what is missing where no kernel can run
    if device.type == "cuda":
        compile_ahead(functools.partial(_run_all, device))
    for case in EVERY:
        found, expected = _run(case, "triton", device), _run(case, "reference", device)
        case.check({name: _difference(found[name], x) for name, x in expected.items()})


def _run_all(device: torch.device) -> None:
    for case in EVERY:
        _run(case, "triton", device)


@functools.singledispatch
def _run(case: Any, implementation: str, device: torch.device) -> Mapping[str, Tensor]:
    """Outputs and gradients for the same bfloat16 numbers, as kernels get them or in float32."""
    dtype = torch.bfloat16 if implementation == "triton" else torch.float32
    arrays = {name: torch.from_numpy(x).to(device) for name, x in case.draw().items()}
    leaves = [name for name in arrays if name not in case.masks]
    for name in leaves:
        arrays[name] = arrays[name].bfloat16().to(dtype).requires_grad_()
    op = getattr(MODULES[case.module], case.op)
    call = functools.partial(op, **case.options, implementation=implementation)
    with torch.no_grad():
        alone = _named("output without gradient", call(*arrays.values()))
    with torch.enable_grad():
        outputs = _named("output", call(*arrays.values()))
        gradients = torch.autograd.grad(_loss(outputs), [arrays[name] for name in leaves])
    return {name: x.detach() for name, x in (alone | outputs).items()} | {
        f"the gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def _named(what: str, output: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """One result, or several by number."""
    if isinstance(output, Tensor):
        return {f"the {what}": output}
    return {f"the {what}, number {i}": x for i, x in enumerate(output)}


def _loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """Not constant in any of them, for a constant gradient has none through a softmax."""
    weights = (torch.cos(torch.arange(x.shape[-1], device=x.device)) for x in outputs.values())
    found = zip(outputs.values(), weights, strict=True)
    return torch.stack([torch.sum(x.float() * w) for x, w in found]).sum()


@_run.register
def _(case: UpdateCase, implementation: str, device: torch.device) -> Mapping[str, Tensor]:
    """The new buffers and all norms."""
    gradient, *buffers = (torch.from_numpy(x).to(device) for x in case.draw().values())
    step, finite = (torch.tensor(x, device=device) for x in (case.step, True))
    overwritten = torch.zeros_like(gradient, dtype=torch.bfloat16)
    with _using(implementation):
        factor, norm = optimizer.clip_factor(gradient, case.max_norm)
        old = optimizer.Buffers(*buffers)._replace(rounded=overwritten)
        new, norms = optimizer.update(gradient, factor, old, step, finite, case.config)
    # beside its own: numbers near the middle between two may become either
    assert new.rounded is not None
    exact = new.rounded.float() / new.params.bfloat16().float()
    return {"the gradient's norm": norm, **new._asdict(), "rounded": exact, **norms}


@_run.register
def _(case: MaskCase, implementation: str, device: torch.device) -> Mapping[str, Tensor]:
    """Every mask."""
    plan = MaskPlan()
    for path, block, shape, rate in case.masks:
        plan.note((path, block), Request(path, shape, rate, 1))
    ids = torch.tensor(case.examples, dtype=torch.int32, device=device)
    with _using(implementation):
        drawn = plan.draw(case.seed, case.step, ids, case.recycling)
    return {
        f"the mask of {path}, block {block}": drawn.of((path, block)).get(
            Request(path, shape, rate, 1)
        )
        for path, block, shape, rate in case.masks
    }


@contextmanager
def _using(implementation: str) -> Iterator[None]:
    """Operations that take no ``implementation``; as they are, for to compile them takes longer."""
    before = ops._chosen, _compiled._enabled
    ops.use(implementation)
    _compiled.enable("none")
    try:
        yield
    finally:
        ops.use(before[0])
        _compiled.enable(before[1])


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.norm(found.float() - expected.float())
    return float(difference / torch.linalg.norm(expected.float()))
