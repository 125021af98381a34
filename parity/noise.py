"""The yardsticks: what two results may differ by, measured rather than chosen.

In float64 the algebra has to agree: 1e-9 of an array's largest value. In lower precisions a track
may be off the float64 result by four times the noise floor of that array: how far results spread
when every parameter moves by half a unit in the last place, and at least half a unit in the last
place of the result, which is rounded itself. A single number, a sum of many, hardly feels half a
unit: ``redrawn`` moves the parameters further for it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from parity.case import Case, Setting
from parity.tracks import Arrays

Result = TypeVar("Result")
FLOAT64 = 1e-9
FLOORS = 4.0  # how many noise floors a result may be off
FEW = 8  # the spread of fewer numbers than this is known badly from few runs
REDRAWN_RUNS = 3
ADDED_RUNS = 16  # in float64, where an array is too far off
MANY = 10_000_000  # numbers, for which threads are worth while
BITS_LESS = {"float32": 0, "bfloat16": 16}  # of the significand, than float32
# half a unit in the last place of 1, the most that rounding a result changes it
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


def perturb(array: np.ndarray, dtype: str, random: np.random.Generator) -> np.ndarray:
    """Move every value by half a unit in its last place, up or down, and round to that precision.

    A value half way between two others goes to either: half of the values move by a whole unit.
    """
    step = random.integers(0, 4, array.shape, np.int8)
    up_or_down = (step == 3).astype(np.int8) - (step == 0)
    return (array + unit(array, dtype) * up_or_down).astype(array.dtype)


def unit(array: np.ndarray, dtype: str) -> np.ndarray:
    """That of the last place of every value in a precision."""
    if dtype == "float64":
        return np.spacing(np.abs(np.asarray(array, np.float64)))
    narrow = np.spacing(np.abs(np.asarray(array, np.float32)))
    return narrow * np.float32(2.0 ** BITS_LESS[dtype])


def scatter(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Move every value by any part of half a unit of bfloat16, so that no digit stays as it is."""
    share = random.random(array.shape, np.float32) - np.float32(0.5)
    return (array + unit(array, "bfloat16") * share).astype(array.dtype)


def perturbed(
    case: Case, setting: Setting, parameters: Arrays, inputs: Arrays, seeds: Iterable[int]
) -> list[tuple[Arrays, Arrays]]:
    """Moved parameters, and moved inputs, of runs that measure noise: one for each seed."""
    narrow = {name for name in parameters if case.narrow_parameters(name)} | {*case.narrow_inputs}

    def move(name: str, array: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return perturb(array, setting.dtype if name in narrow else setting.wide, random)

    return _moved(case, parameters, inputs, move, seeds)


def redrawn(case: Case, parameters: Arrays, inputs: Arrays) -> list[tuple[Arrays, Arrays]]:
    """The same, moved so far that all rounding is drawn anew.

    Half a unit of float32 moves the terms of a long sum by less than its partial sums are rounded
    by: they are rounded to the same numbers in every run, and no spread shows how far that is off.
    """
    seeds = range(REDRAWN_RUNS)
    return _moved(case, parameters, inputs, lambda _, x, random: scatter(x, random), seeds)


def _moved(
    case: Case,
    parameters: Arrays,
    inputs: Arrays,
    move: Callable[..., np.ndarray],
    seeds: Iterable[int],
) -> list[tuple[Arrays, Arrays]]:
    def all_of(arrays: Arrays, random: np.random.Generator) -> Arrays:
        names = sorted(arrays)
        of_one = dict(zip(names, random.spawn(len(names)), strict=True))
        moved = each(lambda name: move(name, arrays[name], of_one[name]), names, count(arrays))
        return dict(zip(names, moved, strict=True))

    chosen = {name: inputs[name] for name in case.perturbed_inputs}
    draws = (np.random.default_rng(seed) for seed in seeds)
    return [(all_of(parameters, draw), all_of(chosen, draw)) for draw in draws]


def spread(runs: Sequence[Arrays], distance: Callable[[np.ndarray, np.ndarray], float]) -> Arrays:
    """For every array, the largest distance between two of the runs."""
    pairs = [(a, b) for i, a in enumerate(runs) for b in runs[:i]]

    def largest(name: str) -> np.ndarray:
        return np.array(max(distance(a[name], b[name]) for a, b in pairs))

    return dict(zip(runs[0], each(largest, runs[0], count(runs[0])), strict=True))


def each(work: Callable[[str], Result], names: Iterable[str], numbers: int) -> list[Result]:
    """``work`` for every name, in threads if there are many numbers: numpy lets others compute."""
    if numbers < MANY:
        return [work(name) for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, names))


def count(arrays: Arrays) -> int:
    """Of all their numbers."""
    return sum(array.size for array in arrays.values())


def norm_of_difference(one: np.ndarray, two: np.ndarray) -> float:
    """Euclidean; infinite where a value is not finite."""
    if one.dtype.kind != "f":  # of bfloat16, which numpy does not know
        one, two = one.astype(np.float64), two.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite in both
        apart = np.ravel(np.subtract(one, two, dtype=np.float64))
    found = float(np.sqrt(np.dot(apart, apart)))
    return found if np.isfinite(found) else np.inf


def count_of_differences(one: np.ndarray, two: np.ndarray) -> float:
    """How many elements differ."""
    return float(np.sum(one != two))


def noise_floor(spreads: Sequence[Arrays], name: str, size: int) -> float:
    """Of one array, from the spread in float64, which comes last, and in each track.

    Of the tracks the quieter counts, so that noise of one cannot excuse it; of a few numbers the
    louder. In float64 only the parameters move: that shows what the case itself makes of it, a relu
    close to its kink above all, whose derivative is one or zero.
    """
    # runs that are not finite excuse nothing
    found = [float(each[name]) for each in spreads]
    *tracks, exact = (x if np.isfinite(x) else 0.0 for x in found)
    return max(exact, min(tracks) if size >= FEW else max(tracks))


def floors_of_sums(errors: Sequence[Sequence[Arrays]]) -> Arrays:
    """Of single numbers, from their relative errors in the redrawn runs of each track.

    How far the errors of a number lie apart, or those of a typical number of the case if that is
    more: three runs say little about one alone. The louder track counts, as of all few numbers.
    """
    floors = []
    for runs in errors:
        apart = spread(runs, norm_of_difference)
        typical = np.median([float(x) for x in apart.values() if x] or [0.0])
        floors.append({name: np.maximum(x, typical) for name, x in apart.items()})
    return {name: np.max([floor[name] for floor in floors]) for name in floors[0]}
