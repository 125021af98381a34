"""How two results are compared, and the table in which a process reports its comparisons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLOAT64_TOLERANCE = 1e-9  # relative to the largest value of an array
FLOAT32_NOISE = 4.0  # how many times the noise of the oracle itself a float32 result may be off
PERTURBED_RUNS = 3


@dataclass(frozen=True)
class Comparison:
    """One array of one case. ``mutated`` is the error of the same case with one thing broken."""

    error: float
    scale: float  # size of the oracle's array
    limit: float  # the error allowed
    mutated: float
    noise: float = 0.0  # float32 only: spread of the oracle's perturbed runs

    def agrees(self) -> bool:
        """Whether the two codes agree."""
        return self.error <= self.limit

    def can_fail(self) -> bool:
        """Whether the comparison notices the mutation."""
        return self.mutated > self.limit


def compare(
    ours: np.ndarray,
    oracle: np.ndarray,
    mutated: np.ndarray,
    perturbed: Sequence[np.ndarray] = (),
    absolute: float | None = None,
) -> Comparison:
    """Compare in float64 (no ``perturbed``) by the largest error, in float32 by the norm of errors.

    ``absolute`` is the size to compare with where the array itself is zero in exact arithmetic.
    """
    ours, oracle, mutated = (np.asarray(x, np.float64) for x in (ours, oracle, mutated))
    if ours.shape != oracle.shape:
        raise ValueError(f"shapes differ: {ours.shape} here, {oracle.shape} in the oracle")
    if not perturbed:
        scale = float(np.abs(oracle).max()) if absolute is None else absolute
        error, broken = (float(np.abs(x - oracle).max()) for x in (ours, mutated))
        return Comparison(error, scale, FLOAT64_TOLERANCE * scale, broken)
    scale = float(np.linalg.norm(oracle)) if absolute is None else absolute
    # three runs of a single number may happen to agree; the number itself is rounded
    rounding = float(np.finfo(np.float32).eps) * scale
    noise = max(rounding, spread([np.asarray(x, np.float64) for x in perturbed]))
    error, broken = (float(np.linalg.norm(x - oracle)) for x in (ours, mutated))
    return Comparison(error, scale, FLOAT32_NOISE * noise, broken, noise)


def spread(runs: Sequence[np.ndarray]) -> float:
    """Largest distance between two of the runs."""
    return max(float(np.linalg.norm(a - b)) for a in runs for b in runs)


def perturb(params: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Move every parameter by half a unit in the last place, up or down at random.

    Rounding to float32 turns that into a whole unit for about half of them.
    """
    random = np.random.default_rng(seed)

    def move(value: Any) -> np.ndarray:
        wide = np.asarray(value, np.float64)
        half = np.spacing(np.abs(np.asarray(value, np.float32))).astype(np.float64) / 2
        return (wide + half * random.choice([-1.0, 1.0], wide.shape)).astype(np.float32)

    return {name: move(params[name]) for name in sorted(params)}


def write(path: str | Path, table: Mapping[str, Comparison]) -> None:
    """Report to the process that asked."""
    rows = {name: asdict(comparison) for name, comparison in table.items()}
    Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def read(path: str | Path) -> dict[str, Comparison]:
    """What ``write`` wrote."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name: Comparison(**row) for name, row in rows.items()}
