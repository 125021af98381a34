"""Level 4: a training run in both tracks, with dropout, from the same weights on the same batches.

The batches come from the loader: crops of real proteins, whose recycling passes, masks, padding,
templates and clamping vary. Rounding differs between the tracks, and training amplifies it; how far
the curves of equal runs drift apart is measured, on runs whose initial weights differ by half a
unit in the last place.
"""

from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from foldcore.config import Config
from parity.case import Setting
from parity.judge import Row, Verdict
from parity.noise import FLOORS, ROUNDING, perturb
from parity.options import FEWEST_STEPS
from parity.step_runs import SMALL, Program, program, some_way_on
from parity.tracks import TRUNK, Arrays
from parity.variety import varied

NAME = "training run"
METRICS = ("loss/total", "grad_norm")
# a run of many steps drifts by a factor of fifty more or less than an equal one: few say little
PERTURBED_RUNS, QUICK_RUNS = 8, 4
LONGEST = 10_000  # steps; arrays that are longer are no curves
PACKAGES = {"jax": "jaxfold", "torch": "torchfold"}
Curves = dict[str, np.ndarray]


@dataclass
class Trajectory:
    """Runs of a configuration in one precision."""

    setting: Setting
    steps: int
    perturbed_runs: int = PERTURBED_RUNS
    config: Config = SMALL

    def __post_init__(self) -> None:
        self.programs = {
            name: program(p, self.config, self.setting) for name, p in PACKAGES.items()
        }
        self.batches = list(islice(varied(self.config), self.steps))
        layout = self.programs["jax"].layout
        self.start = layout.flatten(some_way_on(self.config)).astype(self.setting.wide)

    def judge(self) -> tuple[Verdict, dict[str, Any]]:
        """The verdict, and the curves for the report."""
        found = {name: self.run(name, self.start, self.batches) for name in PACKAGES}
        starts = [self.perturbed(seed) for seed in range(self.perturbed_runs)]
        runs = [found["jax"], *(self.run("jax", start, self.batches) for start in starts)]
        rows = self.rows(found, runs)
        verdict = Verdict(NAME, 4, self.setting.dtype, rows, oracle=False)
        verdict.unnoticed = [name for name in PACKAGES if not self.notices(name, found, runs)]
        return verdict, {f"{NAME} {self.setting.dtype}": self.curves(found, runs)}

    def run(self, name: str, start: np.ndarray, batches: list[Arrays]) -> Curves:
        """Train in one track: what is logged, step by step, and the weights at the end."""
        step: Program = self.programs[name]
        zeros = np.zeros_like(start)
        state = step.state(0, params=start, mu=zeros, nu=zeros, ema=start)
        logged: list[dict[str, float]] = []
        for batch in batches:
            state, metrics = step(state, batch)
            logged.append({key: float(step.fetch(metrics[key])) for key in METRICS})
        curves = {key: np.array([row[key] for row in logged]) for key in METRICS}
        return curves | {"weights": step.fetch(state).params}

    def perturbed(self, seed: int) -> np.ndarray:
        """Initial weights moved by half a unit in the last place."""
        dtype, layout = self.setting.dtype, self.programs["jax"].layout
        random = np.random.default_rng(seed)
        moved = {}
        for name, array in layout.unflatten(self.start).items():
            precision = dtype if name.startswith(TRUNK) else self.setting.wide
            moved[name] = perturb(array, precision, random)
        return np.concatenate([moved[name].ravel() for name in layout.names])

    def rows(self, found: dict[str, Curves], runs: list[Curves]) -> list[Row]:
        """Distances between the tracks in units of the largest of two of the equal ``runs``."""
        rows = []
        for name, jax in found["jax"].items():
            apart = distances(found["torch"][name], jax)
            pairs = combinations([run[name] for run in runs], 2)
            drift = np.max([distances(one, two) for one, two in pairs], axis=0)
            size = distances(runs[0][name], np.zeros_like(jax))
            floors = np.maximum(drift, ROUNDING[self.setting.wide] * size)
            ratio, relative = float((apart / floors).max()), float((apart / size).max())
            rows.append(Row(name, None, None, relative, ratio, FLOORS))
        return rows

    def notices(self, name: str, found: dict[str, Curves], runs: list[Curves]) -> bool:
        """Whether the same comparison fails once one track draws other dropout masks."""
        few = [
            {**batch, "example_id": batch["example_id"] + 1}
            for batch in self.batches[:FEWEST_STEPS]
        ]
        broken = {**found, name: self.run(name, self.start, few)}
        short = {track: cut(curves) for track, curves in broken.items()}
        rows = self.rows(short, [cut(run) for run in runs])
        return any(row.ratio > row.limit for row in rows)

    def curves(self, found: dict[str, Curves], runs: list[Curves]) -> dict[str, Any]:
        """Loss by step in both tracks, and how far equal runs are apart there."""
        loss = "loss/total"
        drift = np.max([np.abs(run[loss] - found["jax"][loss]) for run in runs[1:]], axis=0)
        passes = [int(batch["num_iter_recycling"][0]) for batch in self.batches]
        return {
            **{track: curves[loss].tolist() for track, curves in found.items()},
            "drift": drift.tolist(),
            "recycling": passes,
        }


def distances(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Root mean squares of the difference up to every step from the tenth on, where they are known.

    Curves of equal runs part quickly: an early difference must not hide in later noise. Of weights,
    which have no steps, all of them count. Infinite where a value is not finite.
    """
    square = np.square(np.asarray(one, np.float64) - two)
    shares = np.cumsum(square) / np.arange(1, square.size + 1)
    found = np.sqrt(shares[-1:] if square.size > LONGEST else shares[FEWEST_STEPS - 1 :])
    return np.where(np.isfinite(found), found, np.inf)


def cut(curves: Curves) -> Curves:
    """The first steps of what is logged."""
    return {name: curves[name][:FEWEST_STEPS] for name in METRICS}
