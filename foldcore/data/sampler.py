"""The order of examples: one infinite seeded plan, and the recycling count of each step.

Everything here is a pure function of the seed and a position, so a run resumes from one integer,
every rank computes the same plan, and neither the number of loader processes nor their timing
changes what is trained. Only raw Philox words are used: numpy keeps those stable between versions,
unlike its shuffles.
"""

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float, UInt64

from foldcore.config import ConfigError

MIXING_BLOCK = 64  # positions; each block holds its exact share of the second source
_ORDER, _ACCEPT, _MIXING, _REPLACEMENT, _RECYCLING = range(5)  # names of the streams of chance


@dataclass(frozen=True, slots=True)
class Source:
    """One data set in the plan: its chains and the probability that an epoch accepts each."""

    chains: tuple[str, ...]
    weights: Float[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if len(self.chains) != len(self.weights):
            raise ValueError(f"{len(self.chains)} chains but {len(self.weights)} weights")
        if not self.chains:
            raise ConfigError(
                "no chains to sample from: every chain is held out for validation; lower "
                "data.validation_fraction, or give split.tsv, where there is one, training chains"
            )
        if not ((self.weights > 0) & (self.weights <= 1)).all():
            raise ValueError("sampling weights must lie in (0, 1]")


@dataclass(frozen=True, slots=True)
class ExampleKey:
    """One position of the plan; its content is drawn from (seed, epoch, index, source)."""

    source: int
    epoch: int
    index: int  # place of the example within its epoch
    chain_id: str


class Plan:
    """The infinite seeded order of examples: ``plan[position] -> ExampleKey``.

    An epoch of a source is a shuffle of its chains, each kept with its weight as probability. Two
    sources are mixed in shuffled blocks, with an exact share of ``distillation_probability`` for
    the second.
    """

    def __init__(
        self, sources: Sequence[Source], seed: int, distillation_probability: float = 0.0
    ) -> None:
        if len(sources) not in (1, 2):
            raise ValueError(f"a plan mixes one or two sources, got {len(sources)}")
        self.sources = tuple(sources)
        self.seed = seed
        share = distillation_probability if len(sources) == 2 else 0.0
        self._share = Fraction(share).limit_denominator(10**6)
        self._epochs = [_Epochs(s, seed, i) for i, s in enumerate(self.sources)]

    def __getitem__(self, position: int) -> ExampleKey:
        """The example at a position, by random access."""
        source, ordinal = self._mix(position)
        epoch, index = self._epochs[source].locate(ordinal)
        chain = self._epochs[source].order(epoch)[index]
        return ExampleKey(source, epoch, index, self.sources[source].chains[chain])

    def replacement(self, position: int, attempt: int) -> ExampleKey:
        """Stand-in for a position whose chain cannot be used: same key, another chain by weight.

        Attempt 0 is the plan's own chain.
        """
        key = self[position]
        if attempt == 0:
            return key
        source = self.sources[key.source]
        draw = _uniform(1, _REPLACEMENT, self.seed, position, attempt)[0]
        chain = np.searchsorted(self._epochs[key.source].cumulative_weights, draw, side="right")
        return ExampleKey(key.source, key.epoch, key.index, source.chains[int(chain)])

    def fingerprint(self) -> int:
        """Identifies seed, chains, weights and mixing; a resumed run must find the same."""
        digest = hashlib.blake2b(f"{self.seed} {self._share}".encode(), digest_size=6)
        for source in self.sources:
            digest.update("\n".join(source.chains).encode())
            # rounded, so that the last bit of another machine's arithmetic does not count
            digest.update(np.rint(source.weights * 2.0**32).astype("<i8").tobytes())
        return int.from_bytes(digest.digest(), "little")

    def _mix(self, position: int) -> tuple[int, int]:
        """Source of a position, and how many earlier positions drew from that source."""
        block, offset = divmod(position, MIXING_BLOCK)
        before = math.floor(self._share * MIXING_BLOCK * block)
        count = math.floor(self._share * MIXING_BLOCK * (block + 1)) - before
        chosen = _shuffle(MIXING_BLOCK, _MIXING, self.seed, block) < count
        earlier = int(chosen[:offset].sum())
        if chosen[offset]:
            return 1, before + earlier
        return 0, block * MIXING_BLOCK - before + offset - earlier


class _Epochs:
    """The shuffled, thinned epochs of one source, found by counting accepted chains."""

    def __init__(self, source: Source, seed: int, number: int) -> None:
        self._weights = np.asarray(source.weights, np.float64)
        self._key = (seed, number)
        self._starts = [0]  # accepted chains before each epoch
        total = np.cumsum(self._weights)
        self.cumulative_weights = total / total[-1]
        self._cached: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Epoch of the source's ordinal-th example, and its place within it."""
        while self._starts[-1] <= ordinal:
            accepted = self._accepted(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + int(accepted.sum()))
        epoch = bisect.bisect_right(self._starts, ordinal) - 1
        return epoch, ordinal - self._starts[epoch]

    def order(self, epoch: int) -> np.ndarray:
        """Chains of an epoch, in order, as numbers."""
        if self._cached[0] != epoch:
            shuffled = _shuffle(len(self._weights), _ORDER, *self._key, epoch)
            self._cached = (epoch, shuffled[self._accepted(epoch)[shuffled]])
        return self._cached[1]

    def _accepted(self, epoch: int) -> np.ndarray:
        return _uniform(len(self._weights), _ACCEPT, *self._key, epoch) < self._weights


def recycling_iters(seed: int, step: int, maximum: int) -> int:
    """Extra recycling passes of a step (Alg. 31): shuffled blocks of 0..maximum on every rank."""
    block, offset = divmod(step, maximum + 1)
    return int(_shuffle(maximum + 1, _RECYCLING, seed, block)[offset])


def example_id(source: int, epoch: int, index: int) -> int:
    """Stable name of an example, 0 <= id < 2**31; it selects the example's dropout masks."""
    digest = hashlib.blake2b(f"{source} {epoch} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def _words(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _uniform(count: int, *key: int) -> Float[np.ndarray, " count"]:
    return (_words(count, *key) >> np.uint64(11)) * 2.0**-53


def _shuffle(count: int, *key: int) -> np.ndarray:
    return np.argsort(_words(count, *key), kind="stable")
