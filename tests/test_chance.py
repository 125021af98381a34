"""Streams of chance: numpy's own, bit for bit."""

import numpy as np
import pytest

from foldcore.data.chance import Chance


@pytest.mark.parametrize("key", [(0,), (0, 0, 5, 0), (1, 2, 3, 4, 5, 6), (2**40, 7), (2**100, 0)])
def test_a_stream_is_numpys(key: tuple[int, ...]) -> None:
    for shape, stream in (((8, 4), (0, 0)), ((8, 4), (7, 3)), ((6,), (5,)), ((3, 2, 5), (2, 0, 4))):
        chance = Chance(key, shape)
        chance.generator(*(0 for _ in shape)).integers(20, size=3, dtype=np.uint8)
        seed = np.random.SeedSequence(key, spawn_key=stream)
        expected = np.random.Generator(np.random.Philox(seed))
        ours = chance.generator(*stream)
        assert (ours.random(7) == expected.random(7)).all()
        # 32-bit halves are buffered: the next stream must not begin with this one's rest
        draws = [g.integers(20, size=3, dtype=np.uint8).tolist() for g in (ours, expected)]
        assert draws[0] == draws[1]
        assert (ours.permutation(11) == expected.permutation(11)).all()


def test_a_negative_key_is_refused() -> None:
    with pytest.raises(ValueError, match="not -1"):
        Chance((3, -1), (1,))
