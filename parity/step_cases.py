"""Levels 2 and 3 of a configuration, from one program in each track: the training step.

Compiling a network takes minutes at full size, so a single training step has to tell everything: it
returns the model's outputs beside what it logs, and the gradient is read off Adam's first moment,
which starts at zero. The number of recycling passes is data. Dropout is on.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from foldcore.config import Config
from parity.case import Case, Run, Setting, draw, flip
from parity.judge import ROUNDED
from parity.module_cases import draw_parameter
from parity.module_run import Module
from parity.network_cases import first_example, gradients, steps, unpadded, variant
from parity.step_runs import SECTIONS, SMALL, Program, program
from parity.tracks import Arrays
from parity.variety import varied

STEP = 20  # after the warm-up
MOMENTS = ("mu", "nu")
MUTATED = "evoformer/left_single//weights"


@dataclass(frozen=True)
class StepCases:
    """Both cases; ``example`` gives parameters and a batch."""

    config: Config
    example: Callable[[], tuple[Arrays, Arrays]]
    name: str = ""  # begins those of the cases
    step_passes: int | None = None  # of recycling in the optimiser step; None: the batch's own
    network_runs: int = 4  # that measure noise, in each track
    # more: some second moments are one large number of a thousand, and few runs say little about it
    step_runs: int = 6

    def network(self, passes: Sequence[int]) -> Case:
        """Level 2: outputs, loss terms and the gradient of every parameter."""
        make = functools.partial(self._variants, passes)
        names = tuple(map(variant, passes))
        return self._case("network", 2, make, self._network, self.network_runs, names)

    def step(self) -> Case:
        """Level 3: what one optimiser step changes; noise moves the moments as well."""
        make, runs = self._in_the_middle, self.step_runs
        case = self._case("optimiser step", 3, make, self._moves, runs, ("",))
        return replace(case, perturbed_inputs=MOMENTS)

    def _case(
        self, kind: str, level: int, make: Any, run: Any, runs: int, variants: tuple[str, ...]
    ) -> Case:
        return Case(
            name=f"{self.name} {kind}".strip(),
            level=level,
            make=make,
            jax=functools.partial(run, "jaxfold"),
            torch=functools.partial(run, "torchfold"),
            mutate=flip(MUTATED),
            perturbed_runs=runs,
            variants=variants,
        )

    def _variants(self, passes: Sequence[int]) -> tuple[Arrays, dict[str, Arrays]]:
        """The example with these numbers of recycling passes."""
        parameters, batch = self.example()
        return parameters, {variant(n): batch | recycled(n) for n in passes}

    def _in_the_middle(self) -> tuple[Arrays, dict[str, Arrays]]:
        """The example, and both moments as flat buffers: of a run some way on.

        As if the clip's length were spread over all parameters.
        """
        parameters, batch = self.example()
        if self.step_passes is not None:
            batch |= recycled(self.step_passes)
        size = sum(array.size for array in parameters.values())
        usual = self.config.optimizer.clip_norm / size**0.5  # of one element of the gradient
        moments = {"mu": draw("mu", (size,), usual), "nu": draw("nu", (size,), usual) ** 2}
        return parameters, {"": batch | moments}

    def _network(self, package: str, setting: Setting) -> Run:
        return lambda parameters, inputs: observe(
            program(package, self.config, setting), parameters, inputs
        )

    def _moves(self, package: str, setting: Setting) -> Run:
        return lambda parameters, inputs: moves(
            program(package, self.config, setting), parameters, inputs
        )


def recycled(passes: int) -> Arrays:
    """What a batch says about recycling."""
    return {"num_iter_recycling": np.array([passes], np.int32)}


def observe(step: Program, parameters: Arrays, inputs: Arrays) -> Arrays:
    """Outputs, loss terms and gradients of the network in a step."""
    start = step.layout.flatten(parameters).astype(step.setting.wide)
    zeros = np.zeros_like(start)
    state = step.state(STEP - 1, params=start, ema=start, mu=zeros, nu=zeros)
    updated, logged = step(state, inputs)
    first_moment, logged = step.fetch((updated.mu, logged))
    settings = step.config.optimizer
    clipped = settings.clip_norm / max(float(logged["grad_norm"]), settings.clip_norm)
    gradient = first_moment / start.dtype.type((1 - settings.beta1) * clipped)
    names = [n.removeprefix("output ") for n in logged if n.startswith("output ")]
    outputs = {n: first_example(n, logged[f"output {n}"]) for n in names}
    losses = {n: x for n, x in logged.items() if n.startswith("loss/")}
    return {
        **{f"output {n}": unpadded(n, x, inputs) for n, x in outputs.items()},
        **{f"output {n}": x for n, x in losses.items()},
        **gradients(step.layout.unflatten(gradient)),
        **steps(inputs, outputs),
    }


def moves(step: Program, parameters: Arrays, inputs: Arrays) -> Arrays:
    """What a step changes, by section and parameter, and what it logs."""
    batch = {name: x for name, x in inputs.items() if name not in MOMENTS}
    start = step.layout.flatten(parameters).astype(step.setting.wide)
    average = start + start.dtype.type(0.01)
    moments = {name: inputs[name] for name in MOMENTS}
    state = step.state(STEP - 1, params=start, ema=average, **moments)
    updated, logged = step(state, batch)
    logged = {n: x for n, x in logged.items() if not n.startswith("output ")}
    updated, logged = step.fetch((updated, logged))
    before = {"params": start, "ema": average, "mu": 0.0, "nu": 0.0}
    found = {f"output {name}": value for name, value in logged.items()}
    for section in SECTIONS:
        moved = getattr(updated, section) - before[section]
        for name, array in step.layout.unflatten(moved).items():
            found[f"output {section} {name}"] = array
        for name, array in step.layout.unflatten(getattr(updated, section)).items():
            found[f"{ROUNDED}output {section} {name}"] = array
    return found


def small_example() -> tuple[Arrays, Arrays]:
    """Of the reduced size, with a template and with every part of the network that matters."""
    module = Module(lambda track: {"": track.model_of(SMALL.model)}, lambda *_: None)
    shapes = module.shapes()
    random = np.random.default_rng(0)
    parameters = {name: draw_parameter(random, name, shapes[name]) for name in sorted(shapes)}
    return parameters, next(varied(SMALL))


SMALL_CASES = StepCases(SMALL, small_example)
