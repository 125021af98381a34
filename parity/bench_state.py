"""Benchmarks of what has no gradient: the update of the parameters, the masks of dropout."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from foldcore.config import OptimizerConfig
from parity import peers
from parity.benchmark import Benchmark
from parity.tracks import JAX, TORCH, Track, using
from torchfold._masks import MaskPlan, Request

PARAMETERS = 93_200_000
BUFFERS = ("params", "mu", "nu", "ema")
CONFIG, MAX_NORM, STEP = OptimizerConfig(), 0.1, 3
BLOCKS, SCOPE = 48, "evoformer/evoformer_iteration"
# the masks of a block, of one example: an axis of size 1 is shared
MASKS = {
    "msa_row_attention_with_pair_bias": ((1, 256, 256), 0.15),
    "triangle_multiplication_outgoing": ((1, 256, 128), 0.25),
    "triangle_multiplication_incoming": ((1, 256, 128), 0.25),
    "triangle_attention_starting_node": ((1, 256, 128), 0.25),
    "triangle_attention_ending_node": ((256, 1, 128), 0.25),
}
SEED, AT_STEP, RECYCLING = 1, 7, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def benchmarks(size: int = PARAMETERS, blocks: int = BLOCKS) -> Iterator[Benchmark]:
    """The update of all parameters, and all masks of a pass."""
    yield Benchmark(
        op="clip, Adam, averages",
        shape=f"{size / 1e6:g}M",
        draw=lambda: _buffers(size),
        reference=_update(TORCH, "reference"),
        versions={
            "triton, torch": _update(TORCH, "triton"),
            "torch": _update(TORCH, "reference"),
            "torch compiled": _update(TORCH, "reference", peers.compiled),
        },
        jax_versions={"triton, JAX": _update(JAX, "triton"), "XLA": _update(JAX, "reference")},
        replaced=BUFFERS,
    )
    yield Benchmark(
        op="dropout masks",
        shape=f"{blocks} blocks, {blocks * sum(math.prod(s) for s, _ in MASKS.values()) / 1e6:g}M",
        draw=lambda: {"example_id": torch.tensor([5], dtype=torch.int32, device=DEVICE)},
        reference=_masks_in_torch("reference", blocks),
        versions={
            "triton, torch": _masks_in_torch("triton", blocks),
            "torch": _masks_in_torch("reference", blocks),
        },
        jax_versions={"XLA": _masks_in_jax(blocks)},
    )


def _buffers(size: int) -> dict[str, Tensor]:
    made = {name: torch.randn(size, device=DEVICE) for name in ("gradient", *BUFFERS)}
    return made | {"nu": made["nu"].square()}


def _update(
    track: Track,
    implementation: str,
    around: Callable[..., Any] = lambda function: function,
) -> Callable[..., Any]:
    """The new buffers; the kernel writes them into the places of the old.

    As in a run in float32, without rounded parameters: their errors would hide all others.
    """
    optimizer, is_jax = track.optimizer, track.is_jax

    def run(gradient: Any, *buffers: Any) -> tuple[Any, ...]:
        if is_jax:
            step, finite = jnp.int32(STEP), jnp.bool_(True)
        else:
            step, finite = (torch.full((), x, device=gradient.device) for x in (STEP, True))
        factor, _ = optimizer.clip_factor(gradient, MAX_NORM)
        old = optimizer.Buffers(*buffers)
        return tuple(optimizer.update(gradient, factor, old, step, finite, CONFIG)[0][:4])

    return using(track, implementation, around(run))


def _masks_in_torch(implementation: str, blocks: int) -> Callable[..., Any]:
    plan = MaskPlan()
    requests = [
        ((SCOPE, block), Request(f"{SCOPE}/{name}", shape, rate, 1))
        for name, (shape, rate) in MASKS.items()
        for block in range(blocks)
    ]
    for owner, request in requests:
        plan.note(owner, request)

    def run(example_id: Tensor) -> list[Tensor]:
        drawn = plan.draw(SEED, AT_STEP, example_id, RECYCLING)
        return [drawn.of(owner).get(request) for owner, request in requests]

    return using(TORCH, implementation, run)


def _masks_in_jax(blocks: int) -> Callable[..., Any]:
    """As a scan over blocks draws them."""

    def run(example_id: Any) -> list[Any]:
        key = JAX.primitives.DropoutKey(SEED, AT_STEP, example_id, RECYCLING)

        def of_block(block: Any) -> list[Any]:
            own = key.enter(SCOPE, block)
            return [
                JAX.primitives.keep_mask((1, *shape), rate, own, name)
                for name, (shape, rate) in MASKS.items()
            ]

        return jax.lax.map(of_block, jnp.arange(blocks))

    return run
