"""The PyTorch track beside its definitions: dropout masks, initial values, the optimizer.

Modules, losses, the network and whole steps of both tracks are compared by the parity suite.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxfold.step
import torchfold.params
import torchfold.primitives
from foldcore import dropout as definition
from foldcore.config import OptimizerConfig
from foldcore.initializers import draw
from parity import op_cases
from parity.case import Setting
from parity.module_run import Module, torch_run
from parity.tracks import JAX, TORCH, Arrays, Named, Track, flatten
from tests.torch_twin import TORCH_THREADS
from tests.toy_model import CONFIG


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_num_threads(TORCH_THREADS)
    with jax.enable_x64(True):
        yield


def test_recomputation_changes_nothing() -> None:
    """Recomputed blocks meet the same parameters and dropout masks again."""
    case = next(c for c in op_cases.cases() if c.name == "evoformer stack with dropout")
    parameters, variants = case.make()
    kept, again = (
        torch_run(
            Module(partial(op_cases.evoformer, recompute=recompute), op_cases.call_stack),
            Setting(),
        )(parameters, variants[""])
        for recompute in ("none", "block")
    )
    assert len(kept) > 40
    for name, array in kept.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


# Chance and the optimizer -------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "counter", "expected"), definition.TEST_VECTORS)
def test_known_answers_of_threefry(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    words = torchfold.primitives._threefry(key, counter, torch.device("cpu"))
    assert tuple(int(word) % 2**32 for word in words) == expected


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("on_device", [False, True])
def test_masks_are_the_defined_ones(rate: float, on_device: bool) -> None:
    ids = np.array([3, -7, 2**31 - 1], np.int32)
    seed, step = 2**32 - 1, 70_000
    key = torchfold.primitives.DropoutKey(
        torch.tensor(seed) if on_device else seed,
        torch.tensor(step) if on_device else step,
        torch.from_numpy(ids),
        recycling=2,
        block=47,
        scope="evoformer/a",
    )
    found = torchfold.primitives.keep_mask((3, 1, 65, 9), rate, key, "b")
    expected = definition.keep_mask(
        (3, 1, 65, 9), rate, path="evoformer/a/b", seed=seed, step=step, example_id=ids, block=47,
        recycling=2,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), expected)
    # the share of ones that chance alone gives, give or take five standard deviations
    assert abs(expected.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / expected.size)


def test_initial_values_are_the_drawn_ones() -> None:
    with torch.device("meta"):
        model = TORCH.model.AlphaFold(CONFIG)
    torchfold.params.initialize(model, seed=5)
    ours = jaxfold.step.Network(CONFIG)
    theirs = torchfold.params.parameters(model)
    flat = ours.layout.flatten({name: p.detach().numpy() for name, p in theirs.items()})
    np.testing.assert_array_equal(flat, ours.initialize(seed=5))
    name = "evoformer/evoformer_iteration/msa_transition/transition1//weights"
    expected = draw(name, theirs[name].shape, "relu", 5, stacked=True)
    np.testing.assert_array_equal(theirs[name].detach().numpy(), expected)


def test_wrong_parameters_are_named() -> None:
    model = TORCH.primitives.Linear(3, 2)
    right = {"//weights": np.ones((3, 2)), "//bias": np.ones(2)}
    torchfold.params.load_parameters(model, right)
    for wrong, message in (
        ({"//bias": np.ones(2)}, "'//weights' is missing"),
        (right | {"//scale": np.ones(2)}, "'//scale' is not part"),
        (right | {"//bias": np.ones(3)}, r"'//bias' has shape \(3,\).*needs \(2,\)"),
    ):
        with pytest.raises(torchfold.params.ParameterError, match=message):
            torchfold.params.load_parameters(model, wrong)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(),
        OptimizerConfig(warmup_steps=0, decay_after_steps=5, ema_warmup=True, beta1=0.0),
        OptimizerConfig(warmup_start=1e-5, warmup_steps=20),
    ],
)
@pytest.mark.parametrize("step", [1, 6, 1000])
def test_the_optimizer(config: OptimizerConfig, step: int) -> None:
    def call(track: Track, modules: Named, x: Named) -> Named:
        o = track.optimizer
        clipped, norm = o.clip_by_global_norm(x["gradient"], 0.5)
        return {
            "clipped": clipped,
            "norm": norm,
            "adam": o.adam(clipped, x["mu"], x["nu"] ** 2, x["step"], config),
            "decay": o.ema_decay(x["step"], config),
            "rate": o.learning_rate(x["step"], config),
        }

    names = ("gradient", "mu", "nu")
    inputs = {n: np.random.default_rng(i).normal(size=50) for i, n in enumerate(names)}
    with jax.disable_jit():
        ours = tracked(call, JAX, {k: jnp.asarray(v) for k, v in inputs.items()}, jnp.int32(step))
    theirs = tracked(
        call, TORCH, {k: torch.tensor(v) for k, v in inputs.items()}, torch.tensor(step)
    )
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        # schedules are float32 everywhere: two roundings may differ
        tolerance = 1e-12 if value.dtype == np.float64 else 3e-7
        np.testing.assert_allclose(theirs[name], value, rtol=tolerance, err_msg=name)


def tracked(call: Any, track: Track, inputs: Named, step: Any) -> Arrays:
    outputs = flatten(call(track, {}, inputs | {"step": step}))
    return {name: np.asarray(value) for name, value in outputs.items()}


def test_non_finite_gradients_stay_visible() -> None:
    for bad in (np.nan, np.inf):
        clipped, norm = TORCH.optimizer.clip_by_global_norm(torch.tensor([1.0, bad]), 0.1)
        assert not torch.isfinite(norm) and not torch.isfinite(clipped).all()
