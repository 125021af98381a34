"""Level 3: one optimiser step, with dropout, from a state in the middle of a run.

Compared is what the step changes, array by array: the move of the parameters and of their average,
and both moments, beside everything that is logged.
"""

import functools
from dataclasses import dataclass

import numpy as np

from foldcore.config import Config
from parity.case import Case, Run, Setting, draw, flip
from parity.judge import ROUNDED
from parity.module_cases import draw_parameter
from parity.module_run import Module
from parity.step_runs import SECTIONS, SMALL, Program, program
from parity.tracks import Arrays
from parity.variety import varied

RUNS = 8  # of a thousand arrays some second moments are one large number: few runs say little
STEP = 20  # after the warm-up
MOMENTS = ("mu", "nu")
MUTATED = "evoformer/left_single//weights"


@dataclass(frozen=True)
class OptimiserStep:
    """One step of a configuration; ``make_batch`` gives its example."""

    config: Config = SMALL

    def make(self) -> tuple[Arrays, dict[str, Arrays]]:
        """Parameters, and a batch with both moments."""
        module = Module(lambda track: {"": track.model_of(self.config.model)}, lambda *_: None)
        shapes = module.shapes()
        random = np.random.default_rng(0)
        parameters = {name: draw_parameter(random, name, shapes[name]) for name in sorted(shapes)}
        return parameters, {"": next(varied(self.config)) | self.moments(parameters)}

    def moments(self, parameters: Arrays) -> Arrays:
        """Both moments as flat buffers, as if the clip's length were spread over all parameters."""
        size = sum(array.size for array in parameters.values())
        usual = self.config.optimizer.clip_norm / size**0.5  # of one element of the gradient
        return {"mu": draw("mu", (size,), usual), "nu": draw("nu", (size,), usual) ** 2}

    def run(self, package: str, setting: Setting) -> Run:
        """In one track."""

        return lambda parameters, inputs: moves(
            program(package, self.config, setting), parameters, inputs
        )


def moves(step: Program, parameters: Arrays, inputs: Arrays) -> Arrays:
    """What a step changes, by section and parameter, and what it logs."""
    batch = {name: x for name, x in inputs.items() if name not in MOMENTS}
    start = step.layout.flatten(parameters).astype(step.setting.wide)
    average = start + start.dtype.type(0.01)
    moments = {name: inputs[name] for name in MOMENTS}
    state = step.state(STEP - 1, params=start, ema=average, **moments)
    updated, logged = step.fetch(step(state, batch))
    before = {"params": start, "ema": average, "mu": 0.0, "nu": 0.0}
    found = {
        f"output {name}": np.asarray(value)
        for name, value in logged.items()
        if not name.startswith("output ")
    }
    for section in SECTIONS:
        moved = getattr(updated, section) - before[section]
        for name, array in step.layout.unflatten(moved).items():
            found[f"output {section} {name}"] = array
        for name, array in step.layout.unflatten(getattr(updated, section)).items():
            found[f"{ROUNDED}output {section} {name}"] = array
    return found


def cases() -> list[Case]:
    """One: a step at reduced size."""
    step = OptimiserStep()
    return [
        Case(
            name="optimiser step",
            level=3,
            make=step.make,
            jax=functools.partial(step.run, "jaxfold"),
            torch=functools.partial(step.run, "torchfold"),
            mutate=flip(MUTATED),
            perturbed_runs=RUNS,
        )
    ]
