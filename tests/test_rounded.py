"""Parameters rounded for the trunk, beside the state: to the bit, steps are those without."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import jaxfold.step
from foldcore.checkpoint import SECTIONS
from foldcore.config import Config, DataConfig
from parity.tracks import JAX, TORCH, TRUNK, Arrays, Track, to_numpy
from tests import toy_model
from tests.torch_twin import FAST_COMPILE, TORCH_THREADS

SMALL = dict(
    evoformer_blocks=1,
    extra_msa_blocks=1,
    structure_iterations=1,
    templates_enabled=False,
    pae_enabled=False,
)
TRACKS = pytest.mark.parametrize("track", [JAX, TORCH], ids=["jax", "torch"])


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jaxfold.step, "_compiler_options", lambda config: FAST_COMPILE)
    torch.set_num_threads(TORCH_THREADS)
    yield


def network_of(track: Track, dtype: Any) -> Any:
    return track.step.Network(replace(toy_model.CONFIG, **SMALL, dtype=dtype))


def parameters(network: Any) -> np.ndarray:
    shapes = {name: np.empty(shape) for name, shape, _ in network.layout}
    return network.layout.flatten(toy_model.random_parameters(shapes))


def start(track: Track, network: Any, mesh: Any) -> Any:
    """A state on the device, without rounded parameters."""
    params = parameters(network)
    zeros = np.zeros_like(params)
    state = track.train.TrainState(params, zeros, zeros, params, np.zeros((), np.int32))
    return track.distributed.replicate(mesh, state)


def mesh_of(track: Track) -> Any:
    track.distributed.initialize()
    return track.distributed.make_mesh(toy_model.random_batch()["aatype"].shape[0])


def on_host(state: Any) -> Arrays:
    """Its arrays; copies, for the next step takes their places."""
    found = state._asdict() if hasattr(state, "_asdict") else vars(state)
    return {name: np.array(to_numpy(x)) for name, x in found.items() if x is not None}


def compiled(track: Track, network: Any, mesh: Any) -> Any:
    model = replace(toy_model.CONFIG, **SMALL, dtype="bfloat16")
    config = Config(model=model, data=DataConfig(num_templates=0))
    function = partial(track.train.train_step, network, config)
    return track.step.CompiledStep(function, config, mesh, donate=True)


def run_steps(
    track: Track, step: Any, network: Any, rounded: bool = True, resumed: bool = False
) -> list[Arrays]:
    """States and metrics; ``resumed``: each step from what a checkpoint keeps of the one before."""
    batches = [toy_model.random_batch(seed, passes) for seed, passes in enumerate((1, 0, 1))]
    batches[1]["target_feat"][:] = np.nan
    mesh, found = mesh_of(track), []
    state = start(track, network, mesh)
    if rounded:
        state = network.with_rounded(state)
    for batch in batches:
        state, metrics = step(state, track.distributed.place(mesh, batch))
        found.append(on_host(state) | {name: np.array(to_numpy(x)) for name, x in metrics.items()})
        if resumed:
            kept = {name: found[-1][name] for name in (*SECTIONS, "step")}
            state = track.train.TrainState(**kept)
            state = network.with_rounded(track.distributed.replicate(mesh, state))
    return found


@TRACKS
def test_rounded_parameters_follow_the_parameters(track: Track) -> None:
    network, mesh = network_of(track, "bfloat16"), mesh_of(track)
    step = compiled(track, network, mesh)
    whole, resumed = (run_steps(track, step, network, resumed=how) for how in (False, True))
    assert [int(one["step"]) for one in whole] == [1, 1, 2]
    for one in whole:  # the second keeps the parameters as they are
        expected = one["params"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(one["rounded"].astype(ml_dtypes.bfloat16), expected)
    compare(whole, resumed)


@pytest.mark.parametrize(
    "track", [pytest.param(JAX, marks=pytest.mark.slow), TORCH], ids=["jax", "torch"]
)
def test_steps_with_rounded_parameters_are_those_without(track: Track) -> None:
    network, mesh = network_of(track, "bfloat16"), mesh_of(track)
    given = run_steps(track, compiled(track, network, mesh), network)
    without = run_steps(track, compiled(track, network, mesh), network, rounded=False)
    for one in given:
        one.pop("rounded")
    compare(given, without)


def compare(found: list[Arrays], expected: list[Arrays]) -> None:
    """To the bit, step by step."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and "params" in one and "loss/total" in one
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@TRACKS
def test_the_trunk_is_taken_from_the_rounded_parameters(track: Track) -> None:
    network = network_of(track, "bfloat16")
    state = start(track, network, mesh_of(track))
    other = replaced(state, params=state.params + 1)
    mixed = network.unflatten(state.params, network.with_rounded(other).rounded)
    trunk, rest = network.unflatten(other.params), network.unflatten(state.params)
    assert {name.startswith(TRUNK) for name in mixed} == {True, False}
    for name, value in mixed.items():
        expected = (trunk if name.startswith(TRUNK) else rest)[name]
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(to_numpy(value), to_numpy(expected), err_msg=name)


def replaced(state: Any, **changes: Any) -> Any:
    return state._replace(**changes) if hasattr(state, "_replace") else replace(state, **changes)


@TRACKS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_trunk_that_is_not_narrower_needs_none(track: Track, dtype: str) -> None:
    network = network_of(track, dtype)
    state = start(track, network, mesh_of(track))
    assert network.with_rounded(state) is state and state.rounded is None
