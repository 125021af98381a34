"""Train AlphaFold 2 in JAX.

    python -m jaxfold.train CONFIG [section.key=value ...]

CONFIG is a file such as configs/demo.toml; an override is a TOML assignment. The run folder is
<train.out>/<train.name>/ (see foldcore/runlog.py); the same command again continues the run.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from foldcore.checkpoint import SECTIONS, CheckpointWriter, read_params, restore
from foldcore.command import run_command
from foldcore.config import Config, dumps
from foldcore.data.loader import Loader, open_loader
from foldcore.data.order import merge
from foldcore.evaluation import EvaluationSet, summarize
from foldcore.interrupt import Interrupt
from foldcore.runlog import NonFiniteError, RunLog, Window, check_config, closing_words, due
from jaxfold import distributed
from jaxfold.heads import compute_plddt
from jaxfold.losses import alphafold_loss
from jaxfold.ops import UnsupportedOp, self_test
from jaxfold.optimizer import Buffers, clip_by_global_norm, clip_factor, update
from jaxfold.primitives import DropoutKey
from jaxfold.step import (
    CompiledStep,
    Network,
    configure,
    fetch,
    keep_where,
    mean_over_examples,
    prefetch,
    value_and_grad,
    versions,
)

Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What is trained: flat float32 buffers, laid out by name, and the count of updates."""

    params: Float[Any, " n"]
    mu: Float[Any, " n"]  # Adam's first moment
    nu: Float[Any, " n"]  # Adam's second moment
    ema: Float[Any, " n"]  # averaged parameters, which are evaluated
    step: Int[Any, ""]
    rounded: Float[Any, " n"] | None = None  # params for the trunk, in its dtype; never saved


def make_state(config: Config, network: Network) -> TrainState:
    """The state before the first update, on the host."""
    if path := config.train.initial_params:
        params = read_params(path, network.layout)
    else:
        params = network.initialize(config.train.seed)
    zeros = np.zeros_like(params)
    return TrainState(params, zeros, zeros, params, np.zeros((), np.int32))


def loss_fn(
    params: Batch, network: Network, config: Config, batch: Batch, step: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of a batch, and what is logged of it; dropout is drawn for this step."""
    dropout = None
    if config.train.dropout:
        dropout = DropoutKey(config.train.seed, step, batch["example_id"])
    outputs = network(params, batch, dropout)
    total, terms = alphafold_loss(outputs, batch, config.loss)
    logged = {"loss/total": total, **{f"loss/{name}": term for name, term in terms.items()}}
    return total.mean(), {name: value.mean() for name, value in logged.items()}


def train_step(
    network: Network, config: Config, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One update from this device's examples; a non-finite one leaves the state as it was."""
    step, settings = state.step + 1, config.optimizer
    gradient_of = value_and_grad(loss_fn, network)
    # of a single example the mean is itself: clipping it then is part of the update
    clip_last = settings.clip == "global" or config.train.batch_size == 1

    def example_gradient(example: Batch) -> tuple[Array, dict[str, Array]]:
        logged, gradient = gradient_of(state.params, state.rounded, network, config, example, step)
        if not clip_last:
            gradient, logged["grad_norm"] = clip_by_global_norm(gradient, settings.clip_norm)
        return gradient, logged

    gradient, logged = distributed.mean_over_data(mean_over_examples(example_gradient, batch))
    factor = jnp.ones_like(logged["loss/total"])
    if clip_last:
        factor, logged["grad_norm"] = clip_factor(gradient, settings.clip_norm)
    finite = jnp.isfinite(logged["loss/total"]) & jnp.isfinite(logged["grad_norm"])
    old = Buffers(state.params, state.mu, state.nu, state.ema, state.rounded)
    new, norms = update(gradient, factor, old, step, finite, settings)
    updated = TrainState(**new._asdict(), step=keep_where(finite, step, state.step))
    logged.update(norms)
    passes = batch["num_iter_recycling"]
    logged["recycling"] = passes.sum() / len(passes)
    return updated, logged


def eval_step(network: Network, config: Config, state: TrainState, batch: Batch) -> dict[str, Any]:
    """Predictions with the averaged weights, beside the truth, and losses; one row an example."""
    outputs = network(network.unflatten(state.ema), batch, None)
    total, terms = alphafold_loss(outputs, batch, config.loss)
    plddt = compute_plddt(outputs["plddt_logits"])
    found = {
        "predicted": outputs["final_atom37_positions"],
        "true": batch["all_atom_positions"],
        "mask": batch["all_atom_mask"],
        "plddt": (plddt * batch["seq_mask"]).sum(-1) / batch["seq_mask"].sum(-1),
        "loss/total": total,
        **{f"loss/{name}": term for name, term in terms.items()},
    }
    return distributed.gather_over_data(found)


def evaluate(predict: CompiledStep, state: TrainState, run: "Run") -> dict[str, float]:
    """The mean scores over the held-out chains, by name under ``eval/``."""
    batches = run.evaluation.batches(run.log.say)
    return summarize(
        [(fetch(predict(state, distributed.place(run.mesh, batch))), n) for batch, n in batches]
    )


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: Config
    log: RunLog
    loader: Loader
    writer: CheckpointWriter
    network: Network
    mesh: Mesh
    evaluation: EvaluationSet
    stop: Interrupt


def train(config: Config, command: str) -> None:
    """One run, from its newest checkpoint or from scratch, to ``train.steps`` or a signal."""
    configure(config)
    distributed.initialize()
    (rank, world), settings = distributed.process(), config.train
    folder = Path(settings.out, settings.name)
    log = RunLog(folder, settings.steps, enabled=rank == 0)
    with (
        log,
        Interrupt() as stop,
        open_loader(
            config,
            rank=rank,
            world=world,
            folder=folder,
            warn=log.say,
            allocate=distributed.host_array,
        ) as loader,
    ):
        mesh, network = distributed.make_mesh(settings.batch_size), Network(config.model)
        if config.model.implementation == "triton":
            self_test()
        writer = CheckpointWriter(folder / "checkpoints", settings.keep, enabled=rank == 0)
        evaluation = EvaluationSet(
            config, loader.datasets[0], distributed.replicas(mesh), distributed.process()
        )
        run = Run(config, log, loader, writer, network, mesh, evaluation, stop)
        devices, size = distributed.describe_devices(), network.layout.size
        log.say(f"{__package__} on {devices}; {size:,} parameters")
        log.data(loader)
        try:
            finished = run_steps(run, *resume(run))
        except NonFiniteError as error:
            log.keep_batch(loader, error.step)
            raise
        finally:
            log.data(loader)
        writer.wait()
        log.say(closing_words(folder, f"python -m {__package__}.train {command}", finished))


def resume(run: Run) -> tuple[TrainState, Window]:
    """State and pending metrics of the newest checkpoint, loader restored; or of a new run."""
    found = restore(run.log.folder / "checkpoints", run.log.say)
    if found is None:
        run.log.say(f"starting from {run.config.train.initial_params or 'scratch'}")
        run.log.begin(0, run.config)
        return make_state(run.config, run.network), Window()
    check_config(run.log.folder, run.config)
    run.log.say(f"continuing after step {found.step} from {found.path}")
    run.loader.restore(found.metadata["loader"])
    buffers = {section: found.flat(section, run.network.layout) for section in SECTIONS}
    state = TrainState(**buffers, step=np.asarray(found.step, np.int32))
    run.log.begin(found.step, run.config)
    return state, Window(found.metadata["pending"])


def run_steps(run: Run, state: TrainState, window: Window) -> bool:
    """The loop: step, log, save, evaluate; whether it came to its end before a signal."""
    config, settings, log = run.config, run.config.train, run.log
    update = CompiledStep(partial(train_step, run.network, config), config, run.mesh, donate=True)
    predict = CompiledStep(partial(eval_step, run.network, config), config, run.mesh, donate=False)
    first = int(state.step) + 1
    state = run.network.with_rounded(distributed.replicate(run.mesh, state))
    if due(first - 1, settings.steps, settings.eval_every) and log.lacks(first - 1, "eval/"):
        log.row(first - 1, evaluate(predict, state, run))  # the run ended after saving
    batches = prefetch(run.loader, run.mesh)
    steps = range(first, settings.steps + 1)
    for step, (batch, position, waited) in zip(steps, batches, strict=False):
        state, logged = update(state, batch)
        window.add(logged, waited)
        if step == first:
            log.say(update.first_step(logged))
            window.restart_clock()
        stopping = distributed.agree_to_stop(run.stop.requested, step, settings.log_every)
        is_due = partial(due, step, settings.steps)
        if is_due(settings.log_every) or is_due(settings.save_every) or stopping:
            window.land(fetch, step)
        if is_due(settings.log_every):
            log.row(step, window.close(settings.batch_size) | run.loader.incidents.metrics())
        if is_due(settings.save_every) or stopping:
            whole = merge(distributed.exchange(position))
            save(run, state, {"loader": whole, "pending": window.pending})
        if is_due(settings.eval_every) and not stopping:
            log.row(step, evaluate(predict, state, run))
            window.restart_clock()
        log.tick(step)
        if stopping:
            return False
    return True


def save(run: Run, state: TrainState, metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint in the background, once the device has come this far."""
    sections = fetch({section: getattr(state, section) for section in SECTIONS})
    record = {**metadata, "config": dumps(run.config), "versions": versions()}
    run.writer.save(int(fetch(state.step)), sections, run.network.layout, record)


def main(argv: list[str]) -> int:
    """Train as the command line says; the exit status."""
    return run_command(argv, __doc__ or "", train, (UnsupportedOp,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
