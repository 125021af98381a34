"""Judges what the tracks found: the errors of every array, and their yardstick."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from parity.noise import (
    FLOAT64,
    FLOORS,
    ROUNDING,
    count,
    count_of_differences,
    each,
    noise_floor,
    norm_of_difference,
    spread,
)
from parity.tracks import Arrays

ZERO = 1e-11  # of the largest gradient: below this a gradient is zero but for round-off
TRACKS = ("jax", "torch")
ROUNDED = "rounded "  # begins the name of what an array is the change of, and is rounded instead


@dataclass(frozen=True)
class Row:
    """The verdict on one array. Errors are relative to the size of the array.

    ``ratio`` counts yardsticks (float64: 1e-9; else the noise floor), ``limit`` how many may be.
    """

    name: str
    error_jax: float | None  # from DeepMind's result in float64, else from the float64 result
    error_torch: float | None
    difference: float  # between the tracks
    ratio: float
    limit: float
    zero: bool = False  # the exact value is zero: sizes are those of the largest gradient
    flips: int | None = None  # of a step function: errors count elements


@dataclass
class Verdict:
    """On one case in one precision."""

    name: str
    level: int
    dtype: str
    rows: list[Row]
    oracle: bool
    added: int = 0  # runs in float64 that were added because an array was too far off
    unnoticed: list[str] = field(default_factory=list)  # tracks that could be broken unnoticed
    blind: list[str] = field(default_factory=list)  # arrays that the broken variant left alone

    @property
    def worst(self) -> Row:
        """The array with the largest share of what it may be off; counts only where they fail."""
        rows = [row for row in self.rows if row.flips is None or row.ratio > row.limit]
        return max(rows or self.rows, key=lambda row: row.ratio / row.limit)

    @property
    def failed(self) -> list[Row]:
        """Those that are further off than they may be, the worst first."""
        rows = [row for row in self.rows if row.ratio > row.limit]
        return sorted(rows, key=lambda row: -row.ratio / row.limit)

    @property
    def passed(self) -> bool:
        """All arrays agree, and the comparison can fail."""
        return self.worst.ratio <= self.worst.limit and not self.unnoticed

    def entry(self) -> dict[str, Any]:
        """As it stands in the report."""
        worst, flips = self.worst, [row.flips for row in self.rows if row.flips is not None]
        return {
            "name": self.name,
            "level": self.level,
            "dtype": self.dtype,
            "passed": self.passed,
            "error_jax": worst.error_jax,
            "error_torch": worst.error_torch,
            "difference": worst.difference,
            "ratio": worst.ratio,
            "limit": worst.limit,
            "worst": worst.name,
            "failed": [asdict(row) for row in self.failed],
            "arrays": len(self.rows),
            "oracle": self.oracle,
            "zero": sorted(row.name for row in self.rows if row.zero),
            "flips": sum(flips) if flips else None,
            "added": self.added,
            "mutation_noticed": not self.unnoticed,
            "blind": self.blind,
        }


class Scale:
    """What the arrays of a case are compared with."""

    def __init__(self, found: dict[str, Arrays], exact: Arrays | None, dtype: str) -> None:
        jax, torch = (unrounded(found[track]).keys() for track in TRACKS)
        if jax != torch:
            raise ValueError(f"in one track only: {jax ^ torch}")
        self.exact, self.dtype = exact, dtype
        self.size_of = self._largest if dtype == "float64" else self._length
        # without an oracle the tracks are compared with each other alone
        self.reference = found["jax"] if exact is None else {**found["jax"], **exact}
        gradients = [x for n, x in self.reference.items() if n.startswith("gradient")]
        self.largest = max((self.size_of(x) for x in gradients), default=0.0)
        self.spreads: list[Arrays] = []  # of perturbed runs: of each track in turn, then in float64
        self.sums: Arrays = {}  # more floors, of single numbers, relative to their size

    @staticmethod
    def _largest(array: np.ndarray) -> float:
        return float(np.abs(array).max(initial=0))

    @staticmethod
    def _length(array: np.ndarray) -> float:
        return float(np.linalg.norm(np.asarray(array, np.float64)))

    def widen(self, moved: Arrays) -> None:
        """Take in one more run in float64 with moved parameters, by its distance from the exact."""
        assert self.exact is not None
        apart, known = spread_of([self.exact, moved]), self.spreads[-1]
        self.spreads[-1] = {name: np.maximum(x, known[name]) for name, x in apart.items()}

    def rows(self, found: dict[str, Arrays]) -> list[Row]:
        """The verdict on every array."""
        names = unrounded(found["jax"])
        return each(lambda name: self._row(name, found), names, count(names))

    def _row(self, name: str, found: dict[str, Arrays]) -> Row:
        jax, torch = (np.asarray(found[track][name], np.float64) for track in TRACKS)
        known = self.exact is not None and name in self.exact
        exact = np.asarray(self.reference[name], np.float64) if known else None
        if jax.shape != torch.shape or (exact is not None and exact.shape != jax.shape):
            raise ValueError(f"{name}: shapes differ between {jax.shape} and {torch.shape}")
        if is_step(name):
            return self._step_row(name, jax, torch, exact)
        size, zero = self.size_of(self.reference[name]), False
        if name.startswith("gradient") and size <= ZERO * self.largest:
            size, zero = self.largest, True
        size = size or 1.0
        apart = self._apart
        errors = [None if exact is None else apart(x, exact) / size for x in (jax, torch)]
        difference = apart(jax, torch) / size
        if self.dtype == "float64":
            yardstick, limit = FLOAT64, 1.0
            ratio = max(e for e in (*errors, difference) if e is not None) / yardstick
        else:
            floor = noise_floor(self.spreads, name, jax.size) / size
            floor = max(floor, float(self.sums.get(name, 0.0)))
            rounding = ROUNDING[self.dtype if zero else str(found["torch"][name].dtype)]
            if (before := found["torch"].get(f"{ROUNDED}{name}")) is not None:
                rounding *= self._length(before) / size
            yardstick, limit = max(floor, rounding), FLOORS
            ratio = max(e for e in errors if e is not None) / yardstick
        return Row(name, errors[0], errors[1], difference, ratio, limit, zero)

    def _apart(self, one: np.ndarray, two: np.ndarray) -> float:
        if self.dtype != "float64":
            return norm_of_difference(one, two)
        found = float(np.abs(one - two).max(initial=0))
        return found if np.isfinite(found) else np.inf

    def _step_row(
        self, name: str, jax: np.ndarray, torch: np.ndarray, exact: np.ndarray | None
    ) -> Row:
        """Of bins and choices, how many differ; perturbed runs say how many may."""
        counts = [None if exact is None else count_of_differences(x, exact) for x in (jax, torch)]
        difference = count_of_differences(jax, torch)
        most = max(count for count in (*counts, difference) if count is not None)
        if self.dtype == "float64":
            return Row(name, counts[0], counts[1], difference, most, 0.5, flips=int(most))
        usual = max(1.0, *(float(each[name]) for each in self.spreads))
        return Row(name, counts[0], counts[1], difference, most / usual, FLOORS, flips=int(most))


def spread_of(runs: list[Arrays]) -> Arrays:
    """How far perturbed runs lie apart: distances, and counts where an array holds steps."""

    def apart(kind: bool, distance: Callable[[np.ndarray, np.ndarray], float]) -> Arrays:
        return spread([{n: x for n, x in r.items() if is_step(n) == kind} for r in runs], distance)

    return apart(False, norm_of_difference) | apart(True, count_of_differences)


def unrounded(found: Arrays) -> Arrays:
    """Without what is rounded, which matters of PyTorch's result alone."""
    return {name: x for name, x in found.items() if not name.startswith(ROUNDED)}


def is_number(name: str, array: np.ndarray) -> bool:
    """Whether it is a number by itself: a loss term or a norm, which is the sum of many."""
    return name.startswith("output") and np.ndim(array) == 0


def is_step(name: str) -> bool:
    """Whether an array holds results of a step function."""
    return name.startswith("steps ") or name.endswith(" bins")
