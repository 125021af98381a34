"""How the PyTorch track runs a step: masks drawn together, parts for graphs, no break, no wait."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from foldcore import dropout as definition
from foldcore.config import Config, TrainConfig
from tests import toy_model, triton_interpreter  # noqa: F401
from tests.torch_twin import TORCH_THREADS
from torchfold import distributed, ops, train
from torchfold._arrays import map_tree
from torchfold._graphs import TwoParts
from torchfold._masks import MaskPlan, Rehearsal, Request
from torchfold.losses import alphafold_loss
from torchfold.model import RESAMPLED
from torchfold.ops import UnsupportedOp
from torchfold.primitives import DropoutKey, dropout_factor
from torchfold.step import CompiledStep, Network, configure, fetch, prefetch
from torchfold.train import TrainState

STEP = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(TORCH_THREADS)
    yield


def as_torch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}


def network_and_parameters(**changes: Any) -> tuple[Network, dict[str, torch.Tensor]]:
    """The toy network with parameters that make every part matter."""
    network = Network(replace(toy_model.CONFIG, **changes))
    return network, network.unflatten(torch.from_numpy(flat_parameters(network)))


def flat_parameters(network: Network) -> np.ndarray:
    shapes = {name: np.empty(shape) for name, shape, _ in network.layout}
    return network.layout.flatten(toy_model.random_parameters(shapes))


# Masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_masks_drawn_together_are_those_of_the_definition(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_chosen", implementation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan, ids = MaskPlan(), np.array([3, -2], np.int32)
    asked = [
        Request("a/x", (1, 5, 4), 0.15, 1),
        Request("a/y", (9, 700), 0.25, 1),  # more than one program of the kernel
        Request("t/x", (6, 1), 0.15, 3),
    ]
    owners = [("a", 0), ("a", 0), ("t", 2)]
    for owner, request in zip(owners, asked, strict=True):
        plan.note(owner, request)
    step = torch.tensor(STEP, device=device)
    drawn = plan.draw(5, step, torch.from_numpy(ids).to(device), 1)
    for owner, request in zip(owners, asked, strict=True):
        want = definition.keep_mask(
            (2, *request.shape),
            request.rate,
            path=request.path,
            seed=5,
            step=STEP,
            example_id=ids,
            block=owner[1],
            recycling=1,
        )
        found = drawn.of(owner).get(request).cpu().numpy()
        want = want.repeat(request.repeat, axis=0)
        np.testing.assert_array_equal(found, want)
        factor = drawn.of(owner).factor(request)
        assert (factor is None) == (implementation == "reference")
        if factor is not None:
            np.testing.assert_allclose(factor.cpu(), want / (1 - request.rate), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_draws_the_masks_of_its_model(seed: int) -> None:
    network, params = network_and_parameters()
    batch = as_torch(toy_model.random_batch(seed, recycling=2))
    key = DropoutKey(seed, torch.tensor(STEP), batch["example_id"])
    by_path = {path: params[name] for path, name in network._names.items()}
    with torch.no_grad():
        one_by_one = functional_call(network._model, by_path, (batch, key))
        without = functional_call(network._model, by_path, (batch, None))
        for _ in range(2):  # with and without a rehearsal before it
            together = network(params, batch, key)
            for name, value in one_by_one.items():
                assert torch.equal(together[name], value), name
    assert not torch.equal(without["msa"], one_by_one["msa"])


def test_a_rehearsal_has_a_mask_for_every_example() -> None:
    plan, ids = MaskPlan(), torch.tensor([3, -2], dtype=torch.int32)
    key = DropoutKey(0, torch.tensor(STEP), ids)
    key = replace(key, _masks=Rehearsal(plan, ids.device)).repeat(3)
    factor = dropout_factor(torch.zeros(6, 4, 5, 8), 0.25, key, "x", shared_axis=1)
    assert factor is not None and factor.shape == (6, 1, 5, 8)


# The step in two parts ----------------------------------------------------------------------------

Step = Any


def step_and_state(config: Config, device: str = "cpu") -> tuple[Step, TrainState]:
    """A training step of the toy network, and its state."""
    distributed.initialize()
    mesh = distributed.make_mesh(config.train.batch_size)
    network = Network(config.model)
    step = distributed.over_mesh(partial(train.train_step, network, config), mesh)
    params = flat_parameters(network)
    zeros = np.zeros_like(params)
    start = TrainState(params, zeros, zeros, params, np.zeros((), np.int32))
    state = map_tree(lambda array: torch.tensor(array, device=device), start)
    return step, network.with_rounded(state)


def toy_config(**changes: Any) -> Config:
    return Config(model=replace(toy_model.CONFIG, **changes))


@pytest.mark.parametrize(
    ("recompute", "dtype"), [("none", "float32"), ("block", "float32"), ("block", "bfloat16")]
)
@torch.no_grad()
def test_the_two_parts_make_the_step(recompute: str, dtype: str) -> None:
    config = toy_config(recompute=recompute, dtype=dtype)
    step, whole = step_and_state(config)
    _, parted = step_and_state(config)
    two: TwoParts | None = None
    absent = ("rounded",) if dtype == "float32" else ()
    for seed, recycling in enumerate((2, 0)):  # two examples each
        batch = as_torch(toy_model.random_batch(seed, recycling))
        updated, expected = step(whole, batch)
        map_tree(lambda old, new: old.copy_(new), whole, updated)
        if two is None:
            two = TwoParts(step, Network(config.model)._next_pass, config, parted, batch)
        two.load(batch)
        for _ in range(recycling):
            two.one_pass(parted)
        found = two.finish(parted)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        for name, one, other in zip(TrainState._fields, whole, parted, strict=True):
            assert one is other is None if name in absent else torch.equal(one, other), name
        assert found["recycling"] == recycling and parted.step == seed + 1


class NoTransfers(TorchDispatchMode):
    """Refuses operations between the host and the device, which is ``meta`` here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves, _ = tree_flatten((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        assert len(devices) < 2, function
        return result


ONE_BLOCK = dict(evoformer_blocks=1, extra_msa_blocks=1, template_blocks=1, structure_iterations=1)


@torch.no_grad()
def test_a_step_exchanges_nothing_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(data: Any, dtype: Any = None, device: Any = "cpu") -> torch.Tensor:
        assert torch.device(device).type == "cpu", data  # its copy to the device is not dispatched
        return make_tensor(data, dtype=dtype)

    config = replace(toy_config(recompute="block", **ONE_BLOCK), train=TrainConfig(batch_size=1))
    step, state = step_and_state(config, "meta")  # whose values nobody can read
    batch = {k: x[:1].to("meta") for k, x in as_torch(toy_model.random_batch()).items()}
    two = TwoParts(step, Network(config.model)._next_pass, config, state, batch)
    two.one_pass(state)
    two.finish(state)  # tables of constants are on the device now
    make_tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", tensor)
    with NoTransfers():
        two.load(batch)
        two.one_pass(state)
        two.finish(state)
        for transfer in (
            lambda: torch.zeros(2, device="meta") + torch.zeros(()),
            lambda: torch.zeros(2).to("meta"),
            lambda: torch.tensor(1.0, device="meta"),
        ):
            with pytest.raises(AssertionError):
                transfer()


@pytest.mark.parametrize(
    "templates_enabled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "whole"]
)
def test_the_compiler_sees_one_graph(templates_enabled: bool) -> None:
    network, params = network_and_parameters(
        **ONE_BLOCK, templates_enabled=templates_enabled, pae_enabled=templates_enabled
    )
    config = Config().loss
    step = torch.tensor(STEP)
    batch = as_torch(toy_model.random_batch())
    key = DropoutKey(0, step, batch["example_id"])
    before = network._next_pass(
        torch.from_numpy(flat_parameters(network)), None, batch, None, None
    )._asdict()
    slot = {name: x[:, :1] if name in RESAMPLED else x for name, x in batch.items()}

    def loss(params: Any, batch: Any) -> Any:
        return alphafold_loss(network(params, batch, key), batch, config)

    with torch.no_grad():
        loss(params, {**slot, **before})  # the rehearsal of the masks
        found = torch._dynamo.explain(loss)(params, {**slot, **before})
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1
    assert found.op_count > 500


# A compiled step ----------------------------------------------------------------------------------


class ListLoader:
    """What ``prefetch`` asks of a loader, for batches made beforehand."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self._batches, self._taken = batches, 0

    def is_ready(self) -> bool:
        return self._taken < len(self._batches)

    def __next__(self) -> dict[str, Any]:
        self._taken += 1
        return self._batches[self._taken - 1]

    def state(self) -> int:
        return self._taken


def run_steps(config: Config, batches: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    """Metrics and state after each batch."""
    configure(config)
    distributed.initialize()
    mesh = distributed.make_mesh(config.train.batch_size)
    network = Network(config.model)
    step = CompiledStep(partial(train.train_step, network, config), config, mesh, donate=True)
    params = flat_parameters(network)
    zeros = np.zeros_like(params)
    start = TrainState(params, zeros, zeros, params, np.zeros((), np.int32))
    state, found = distributed.replicate(mesh, start), []
    loader: Any = ListLoader(batches)
    for _, (batch, _, _) in zip(batches, prefetch(loader, mesh), strict=False):
        state, metrics = step(state, batch)
        # on a CPU, views of what the next changes
        result = fetch({**metrics, **state._replace(rounded=None)._asdict()})
        del result["rounded"]
        found.append({name: np.array(value) for name, value in result.items()})
    return found


def test_a_step_that_is_not_finite_is_left_out() -> None:
    config = toy_config(**ONE_BLOCK)
    batches = [toy_model.random_batch(seed, passes) for seed, passes in enumerate((1, 0, 0))]
    batches[1]["target_feat"][:] = np.nan
    found = run_steps(config, batches)
    assert [int(one["step"]) for one in found] == [1, 1, 2]
    assert [float(one["recycling"]) for one in found] == [1, 0, 0]
    before, left_out, after = (one["params"] for one in found)
    np.testing.assert_array_equal(left_out, before)
    assert np.all(np.isfinite(after)) and np.any(after != before)


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["none", "structure", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_graphs_make_the_step(recompute: str, compiled: str) -> None:
    config = toy_config(recompute=recompute, matmul_precision="ieee")
    batches = [toy_model.random_batch(seed, passes) for seed, passes in enumerate((1, 3, 0, 2))]
    batches[2]["target_feat"][:] = np.nan  # this update is left out
    changed: list[dict[str, Any]] = [
        {"cuda_graphs": False, "compile": "none"},
        {"cuda_graphs": True, "compile": compiled},
    ]
    eager, graphed = (
        run_steps(replace(config, train=replace(config.train, **changes)), batches)
        for changes in changed
    )
    assert [int(one["step"]) for one in graphed] == [1, 2, 2, 3]
    for index, (one, two) in enumerate(zip(eager, graphed, strict=True)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            largest = np.nanmax(np.abs(value), initial=1e-6)
            # float32 rounding, amplified by Adam, which turns tiny gradients into whole steps
            np.testing.assert_allclose(
                two[name], value, rtol=0, atol=1e-3 * largest, err_msg=f"{name} {index}"
            )


@pytest.mark.gpu
def test_an_operation_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(*arguments: Any) -> Any:
        total, logged = train_loss(*arguments)
        return total * float(total.detach() > 0), logged

    train_loss = train.loss_fn
    monkeypatch.setattr(train, "loss_fn", waiting)
    with pytest.raises(UnsupportedOp, match=r"test_torch_step.py:\d+: .*float\(total"):
        run_steps(toy_config(), [toy_model.random_batch()])
