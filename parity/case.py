"""What one comparison is: a part of the network, its weights and inputs, and how to run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.tracks import DTYPES, TRUNK, WIDE, Arrays

Run = Callable[[Arrays, Arrays], Arrays]  # parameters and inputs -> everything compared, by name
Change = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]


@dataclass(frozen=True)
class Setting:
    """How a track computes."""

    dtype: Any = "float64"  # of the trunk; everything else is in at least float32
    device: str = "cpu"
    implementation: Any = "reference"  # of the operations

    @property
    def wide(self) -> str:
        """The precision of everything but the trunk."""
        return WIDE[self.dtype]


@dataclass(frozen=True)
class Case:
    """One rung of the ladder; both tracks get the same weights and inputs.

    ``make`` gives the parameters, and inputs for each of the ``variants``: all run in one compiled
    program. ``mutate`` breaks one thing, to see whether the case can fail.
    """

    name: str
    level: int
    make: Callable[[], tuple[Arrays, Mapping[str, Arrays]]]
    jax: Callable[[Setting], Run]
    torch: Callable[[Setting], Run]
    mutate: Change
    oracle: Callable[[], Run] | None = None
    dtypes: tuple[str, ...] = DTYPES
    narrow_parameters: Callable[[str], bool] = field(default=lambda name: name.startswith(TRUNK))
    perturbed_runs: int = 4  # in each track, to measure noise
    perturbed_inputs: tuple[str, ...] = ()  # moved to measure noise, beside the parameters
    narrow_inputs: tuple[str, ...] = ()  # in the precision of the trunk
    variants: tuple[str, ...] = ("",)

    def names(self) -> list[str]:
        """Of its variants, as the report has them."""
        return [self.name_of(variant) for variant in self.variants]

    def name_of(self, variant: str) -> str:
        """What the report calls it."""
        return f"{self.name}: {variant}" if variant else self.name


def rounded(array: np.ndarray) -> np.ndarray:
    """The nearest values that bfloat16 has, as float32: then every precision starts equal."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    even = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + even) & np.uint32(0xFFFF0000)).view(np.float32)


def draw(name: str, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    """Normal random numbers that depend on a name alone."""
    random = np.random.default_rng(list(name.encode()))
    return rounded(size * random.standard_normal(shape))


# Mutations ----------------------------------------------------------------------------------------


def flip(*names: str) -> Change:
    """Another sign for these parameters; without names, for the largest."""

    def change(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        chosen = names or (max(parameters, key=lambda name: parameters[name].size),)
        return {**parameters, **{name: -parameters[name] for name in chosen}}, inputs

    return change


def scale(factor: float, *names: str) -> Change:
    """Another scale for these parameters; without names, for all of them."""

    def change(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        chosen = names or tuple(parameters)
        return {**parameters, **{n: rounded(factor * parameters[n]) for n in chosen}}, inputs

    return change


def swap_axes(*names: str) -> Change:
    """Rows for columns in these inputs."""

    def change(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        return parameters, {**inputs, **{name: inputs[name].swapaxes(1, 2) for name in names}}

    return change


def unmask(*names: str) -> Change:
    """Nothing is masked in these inputs."""

    def change(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        return parameters, {**inputs, **{name: np.ones_like(inputs[name]) for name in names}}

    return change


def disturb(*names: str) -> Change:
    """Noise on these inputs."""

    def change(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
        noisy = {name: rounded(inputs[name] + draw(name, inputs[name].shape)) for name in names}
        return parameters, {**inputs, **noisy}

    return change
