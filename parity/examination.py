"""Runs a case in one precision: both tracks, the float64 result, moved runs, a broken variant."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from parity.case import Case, Run, Setting
from parity.judge import TRACKS, Row, Scale, Verdict, is_number, spread_of, unrounded
from parity.noise import ADDED_RUNS, floors_of_sums, perturbed, redrawn
from parity.tracks import Arrays

EXACT = "float64"


def examine(
    case: Case,
    setting: Setting,
    with_oracle: bool,
    wanted: Callable[[str], Any] = bool,
    say: Callable[[str], Any] = str,
) -> Iterator[Verdict]:
    """Judge the variants whose names are ``wanted``; ``say`` gets a line about every run."""
    if names := [name for name in case.names() if wanted(name)]:
        yield from Examination(case, setting, with_oracle, say).verdicts(names)


class Examination:
    """One case in one precision."""

    def __init__(
        self, case: Case, setting: Setting, with_oracle: bool, say: Callable[[str], Any]
    ) -> None:
        self.case, self.setting, self.say = case, setting, say
        say(f"{setting.dtype} {case.name}: drawing parameters and inputs; the first run compiles")
        self.parameters, self.variants = case.make()
        self.runs: dict[str, Run] = {"jax": case.jax(setting), "torch": case.torch(setting)}
        self.noisy = setting.dtype != "float64"
        if self.noisy:
            # the float64 results of the tracks agree to 1e-9, which is a case of its own
            self.runs[EXACT] = case.torch(Setting("float64", setting.device))
            self.moved = self._perturbed(range(case.perturbed_runs))
        elif with_oracle and case.oracle:
            self.runs[EXACT] = case.oracle()
        self.sums: Arrays = {}  # what single numbers may be off, relative to their size

    def verdicts(self, names: Sequence[str]) -> Iterator[Verdict]:
        """On each of these variants."""
        for (variant, inputs), name in zip(self.variants.items(), self.case.names(), strict=True):
            if name != self.case.name_of(variant):
                raise ValueError(f"{name} is made as {self.case.name_of(variant)}")
            if name in names:
                yield self.verdict(name, inputs)

    def verdict(self, name: str, inputs: Arrays) -> Verdict:
        """On one variant."""
        found = {who: self._run(who, name, self.parameters, inputs) for who in self.runs}
        found["jax"] = unrounded(found["jax"])
        exact = unrounded(found.pop(EXACT)) if EXACT in found else None
        scale = Scale(found, exact, self.setting.dtype)
        if self.noisy:
            # the runs of one at a time: a step of a large network returns gigabytes
            scale.spreads = [spread_of(self._moved_runs(who, name, inputs)) for who in self.runs]
            scale.sums = self._floors_of_sums(name, inputs, found)
        rows, added = self._rows(name, inputs, found, scale)
        with_oracle = exact is not None and not self.noisy
        verdict = Verdict(name, self.case.level, self.setting.dtype, rows, with_oracle, added)
        changed = self.case.mutate(self.parameters, inputs)
        broken = {track: self._run(track, f"{name}, broken", *changed) for track in TRACKS}
        look_at_mutation(verdict, scale, found, broken)
        return verdict

    def _rows(
        self, name: str, inputs: Arrays, found: dict[str, Arrays], scale: Scale
    ) -> tuple[list[Row], int]:
        """The verdict on every array, and how many more runs in float64 it took.

        These are made while an array is too far off: few of the first may have crossed the kink of
        a relu that a track has crossed.
        """
        rows, added = scale.rows(found), 0
        while self.noisy and added < ADDED_RUNS and any(row.ratio > row.limit for row in rows):
            number = self.case.perturbed_runs + added
            ((own, changed),) = self._perturbed([number])
            given: Any = own, {**inputs, **changed}
            scale.widen(unrounded(self._run(EXACT, f"{name}, moved {number + 1}", *given)))
            rows, added = scale.rows(found), added + 1
        return rows, added

    def _perturbed(self, seeds: Iterable[int]) -> list[tuple[Arrays, Arrays]]:
        first = next(iter(self.variants.values()))
        return perturbed(self.case, self.setting, self.parameters, first, seeds)

    def _moved_runs(self, who: str, name: str, inputs: Arrays) -> list[Arrays]:
        """What one of ``runs`` finds for moved parameters and inputs."""

        def run(number: int, own: Arrays, changed: Arrays) -> Arrays:
            given: Any = own, {**inputs, **changed}
            return unrounded(self._run(who, f"{name}, moved {number}", *given))

        return [run(number, *moved) for number, moved in enumerate(self.moved, 1)]

    def _floors_of_sums(self, name: str, inputs: Arrays, found: dict[str, Arrays]) -> Arrays:
        """Of single numbers in float32, from the first variant examined: elsewhere they are alike.

        In bfloat16 half a unit of the trunk moves them far enough.
        """
        numbers = [n for n, x in found["jax"].items() if is_number(n, x)]
        if self.setting.dtype != "float32" or not numbers or self.sums:
            return self.sums
        errors: list[list[Arrays]] = [[] for _ in TRACKS]
        for i, (own, changed) in enumerate(redrawn(self.case, self.parameters, inputs), 1):
            given: Any = own, {**inputs, **changed}
            far = {who: self._run(who, f"{name}, redrawn {i}", *given) for who in self.runs}
            exact = {n: np.asarray(far[EXACT][n], np.float64) for n in numbers}
            for track, list_of_errors in zip(TRACKS, errors, strict=True):
                list_of_errors.append({n: relative(far[track][n], exact[n]) for n in numbers})
        self.sums = floors_of_sums(errors)
        return self.sums

    def _run(self, who: str, what: str, parameters: Arrays, inputs: Arrays) -> Arrays:
        start = time.perf_counter()
        found = self.runs[who](parameters, inputs)
        self.say(f"{self.setting.dtype} {what}: {who} took {time.perf_counter() - start:.1f} s")
        return found


def relative(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error in units of the exact value; a value of zero counts as one."""
    return np.asarray((found - exact) / (np.abs(exact) or 1.0))


def look_at_mutation(
    verdict: Verdict, scale: Scale, found: dict[str, Arrays], broken: dict[str, Arrays]
) -> None:
    """Put each track's broken variant in its place: the same comparison must fail."""
    noticed = set()
    for track in TRACKS:
        rows = scale.rows({**found, track: broken[track]})
        failed = {row.name for row in rows if row.ratio > row.limit}
        if not failed:
            verdict.unnoticed.append(track)
        noticed |= failed
    verdict.blind = sorted(row.name for row in verdict.rows if row.name not in noticed)
