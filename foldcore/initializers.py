"""Initial values of parameters: the same start in both tracks.

A parameter is drawn from its name and the seed alone, whatever else the model holds: numpy's Philox
keyed by ``(seed, hash of the name)``. Names are ``scope//leaf`` as in DeepMind's files.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32
from scipy.special import ndtr, ndtri

# standard deviation of a standard normal cut at +-2
_TRUNCATED_STDDEV = 0.87962566103423978
# softplus of this is 1: every point of the invariant point attention starts with equal weight
_SOFTPLUS_INVERSE_OF_ONE = math.log(math.e - 1)


def draw(
    name: str, shape: Sequence[int], kind: str, seed: int, stacked: bool = False
) -> Float32[np.ndarray, "..."]:
    """Initial value of one parameter.

    ``kind`` is a key of :data:`KINDS`. ``stacked``: the first axis counts layers, which are drawn
    independently and do not count as inputs.
    """
    if kind not in KINDS:
        raise ValueError(f"{name}: unknown kind of initial value {kind!r}; one of {sorted(KINDS)}")
    layer = tuple(shape[1:]) if stacked else tuple(shape)
    return KINDS[kind](_Draw(name, tuple(shape), layer, seed)).astype(np.float32)


class _Draw:
    """The random numbers of one parameter, and the sizes that scale them."""

    def __init__(self, name: str, shape: tuple[int, ...], layer: tuple[int, ...], seed: int):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.shape, self.layer = shape, layer
        self.key = np.array([seed % 2**64, int.from_bytes(digest, "little")], np.uint64)

    def uniform(self, low: float, high: float) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=self.key)).random(self.shape)
        return low + (high - low) * random


def _truncated_normal(scale: float) -> Callable[[_Draw], np.ndarray]:
    """Variance ``scale / fan_in``, cut at two standard deviations of the uncut normal."""

    def initial(draw: _Draw) -> np.ndarray:
        stddev = math.sqrt(scale / draw.layer[0]) / _TRUNCATED_STDDEV
        return stddev * ndtri(draw.uniform(ndtr(-2.0), ndtr(2.0)))

    return initial


def _glorot(draw: _Draw) -> np.ndarray:
    """Uniform of variance ``2 / (fan_in + fan_out)``.

    The last two axes count as inputs and outputs, axes before them multiply both: a projection
    [c, heads, d] has fan-in c * heads and fan-out c * d, as in DeepMind's code.
    """
    receptive = math.prod(draw.layer[:-2])
    limit = math.sqrt(6 / (receptive * (draw.layer[-2] + draw.layer[-1])))
    return draw.uniform(-limit, limit)


def _normal(draw: _Draw) -> np.ndarray:
    """Variance 1 / fan_in, not cut."""
    smallest = 2.0**-54  # the generator can return 0, whose quantile is infinite
    return ndtri(draw.uniform(smallest, 1.0)) / math.sqrt(draw.layer[0])


KINDS: dict[str, Callable[[_Draw], np.ndarray]] = {
    "linear": _truncated_normal(1.0),
    "relu": _truncated_normal(2.0),  # before a relu, which halves the variance
    "glorot": _glorot,
    "normal": _normal,
    "zeros": lambda draw: np.zeros(draw.shape),
    "ones": lambda draw: np.ones(draw.shape),
    "point_weights": lambda draw: np.full(draw.shape, _SOFTPLUS_INVERSE_OF_ONE),
}
