"""The yardsticks: what two results may differ by, measured rather than chosen.

In float64 the algebra has to agree: 1e-9 of an array's largest value. In lower precisions a track
may be off the float64 result by four times the noise floor of that array: how far results spread
when every parameter moves by half a unit in the last place, and at least half a unit in the last
place of the result, which is rounded itself.
"""

from collections.abc import Callable, Sequence

import numpy as np

from parity.case import Case, Setting
from parity.tracks import Arrays

FLOAT64 = 1e-9
FLOORS = 4.0  # how many noise floors a result may be off
FEW = 8  # the spread of fewer numbers than this is known badly from few runs
BITS_LESS = {"float32": 0, "bfloat16": 16}  # of the significand, than float32
# half a unit in the last place of 1, the most that rounding a result changes it
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}


def perturb(array: np.ndarray, dtype: str, random: np.random.Generator) -> np.ndarray:
    """Move every value by half a unit in its last place, up or down, and round to that precision.

    A value half way between two others goes to either: half of the values move by a whole unit.
    """
    if dtype == "float64":
        unit = np.spacing(np.abs(np.asarray(array, np.float64)))
    else:
        narrow = np.spacing(np.abs(np.asarray(array, np.float32))).astype(np.float64)
        unit = narrow * 2.0 ** BITS_LESS[dtype]
    moved = array + unit * random.choice([-1.0, 0.0, 0.0, 1.0], array.shape)
    return moved.astype(array.dtype)


def perturbed(
    case: Case, setting: Setting, parameters: Arrays, inputs: Arrays
) -> list[tuple[Arrays, Arrays]]:
    """Moved parameters, and moved inputs, of the runs that measure noise."""

    chosen = {name: inputs[name] for name in case.perturbed_inputs}
    narrow = {name for name in parameters if case.narrow_parameters(name)} | {*case.narrow_inputs}
    moved = []
    for seed in range(case.perturbed_runs):
        random = np.random.default_rng(seed)
        own, changed = (
            {
                name: perturb(
                    arrays[name], setting.dtype if name in narrow else setting.wide, random
                )
                for name in sorted(arrays)
            }
            for arrays in (parameters, chosen)
        )
        moved.append((own, changed))
    return moved


def spread(runs: Sequence[Arrays], distance: Callable[[np.ndarray, np.ndarray], float]) -> Arrays:
    """For every array, the largest distance between two of the runs."""
    pairs = [(a, b) for i, a in enumerate(runs) for b in runs[:i]]
    return {name: np.array(max(distance(a[name], b[name]) for a, b in pairs)) for name in runs[0]}


def norm_of_difference(one: np.ndarray, two: np.ndarray) -> float:
    """Euclidean; infinite where a value is not finite."""
    found = float(np.linalg.norm(np.asarray(one, np.float64) - np.asarray(two, np.float64)))
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
    *tracks, exact = (float(each[name]) for each in spreads)
    return max(exact, min(tracks) if size >= FEW else max(tracks))
