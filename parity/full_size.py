"""Levels 2 and 3 at the size of a configuration, from one program in each track.

Compiling a network of full size takes minutes, so a single training step has to tell everything: it
returns the model's outputs beside what it logs, and the gradient is read off Adam's first moment,
which starts at zero. The number of recycling passes is data.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from foldcore.config import Config, load
from parity.case import Case, Run, Setting, flip
from parity.network_cases import PASSES, first_example, gradients, steps, unpadded
from parity.step_cases import MUTATED, STEP, OptimiserStep, moves
from parity.step_runs import batches, program, some_way_on
from parity.tracks import Arrays

LOOK_AT = 12  # examples of the loader of which the longest is taken
RUNS = 3  # perturbed runs in each track


def configuration(path: str, overrides: Sequence[str]) -> Config:
    """The network of a file, on the embedded proteins, one example a step, with exact products."""
    own = ["data.path=embedded", "data.workers=0", "data.accept_unknown=true", "train.batch_size=1"]
    own += ["model.matmul_precision=ieee", "train.cuda_graphs=false", "train.compile=none"]
    own += ["data.distillation_path=", "train.max_recycling_iters=3"]
    return load(path, [*own, *overrides])


@dataclass(frozen=True)
class FullSize:
    """The parameters and the example of a configuration."""

    config: Config

    def parameters(self) -> Arrays:
        """Those of a run some way on."""
        return some_way_on(self.config)

    def batch(self) -> Arrays:
        """The longest of the first examples that have all recycling passes."""
        found = islice(batches(self.config), LOOK_AT)
        whole = [batch for batch in found if batch["num_iter_recycling"][0] == max(PASSES)]
        return max(whole, key=lambda batch: int(batch["seq_length"][0]))

    def network(self) -> tuple[Arrays, dict[str, Arrays]]:
        """The case of level 2."""
        batch = self.batch()
        variants = {
            f"{n} recycling passes": {**batch, "num_iter_recycling": np.array([n], np.int32)}
            for n in PASSES
        }
        return self.parameters(), variants

    def step(self) -> tuple[Arrays, dict[str, Arrays]]:
        """The case of level 3."""
        batch = {**self.batch(), "num_iter_recycling": np.array([1], np.int32)}
        parameters = self.parameters()
        return parameters, {"": batch | OptimiserStep(self.config).moments(parameters)}

    def run_network(self, package: str, setting: Setting) -> Run:
        """Outputs, loss terms and the gradient of every parameter, in one track."""

        def run(parameters: Arrays, inputs: Arrays) -> Arrays:
            step = program(package, self.config, setting, observed=True)
            start = step.layout.flatten(parameters).astype(setting.wide)
            zeros = np.zeros_like(start)
            state = step.state(STEP - 1, params=start, ema=start, mu=zeros, nu=zeros)
            updated, logged = step(state, inputs)
            first_moment, logged = step.fetch((updated.mu, logged))
            settings = self.config.optimizer
            clipped = settings.clip_norm / max(float(logged["grad_norm"]), settings.clip_norm)
            gradient = first_moment / start.dtype.type((1 - settings.beta1) * clipped)
            outputs = {
                n.removeprefix("output "): first_example(n.removeprefix("output "), np.asarray(x))
                for n, x in logged.items()
                if n.startswith("output ")
            }
            losses = {n: np.asarray(x) for n, x in logged.items() if n.startswith("loss/")}
            return {
                **{f"output {n}": unpadded(n, x, inputs) for n, x in outputs.items()},
                **{f"output {n}": x for n, x in losses.items()},
                **gradients(step.layout.unflatten(gradient)),
                **steps(inputs, outputs),
            }

        return run

    def run_step(self, package: str, setting: Setting) -> Run:
        """What the update changes, in one track."""
        return lambda parameters, inputs: moves(
            program(package, self.config, setting, observed=True), parameters, inputs
        )


def cases(path: str, overrides: Sequence[str]) -> list[Case]:
    """The network with 0 to 3 recycling passes, and one optimiser step."""
    full = FullSize(configuration(path, overrides))

    def case(name: str, level: int, make: Any, run: Any) -> Case:
        return Case(
            name=name,
            level=level,
            make=make,
            jax=functools.partial(run, "jaxfold"),
            torch=functools.partial(run, "torchfold"),
            mutate=flip(MUTATED),
            perturbed_runs=RUNS,
        )

    name = full.config.train.name
    return [
        case(f"{name} network", 2, full.network, full.run_network),
        case(f"{name} optimiser step", 3, full.step, full.run_step),
    ]
