"""The named streams of chance of an example, as fast as its many short draws need.

A stream is numpy's ``Philox(SeedSequence(key, spawn_key=stream))``, bit for bit. Building these two
objects takes longer than most draws, so the seed's hash (O'Neill's seed_seq, which numpy keeps
stable) is computed here, for all streams at once, and one bit generator is set anew for each.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt32, UInt64

_WORD = 0xFFFFFFFF
_POOL = 4  # words of a seed's state
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875  # of the hash that takes words in
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED  # of the hash that gives words out
_MIX_L, _MIX_R = 0xCA01F9DD, 0x4973F715
_OUT = np.array([_INIT_B * _MULT_B**n & _WORD for n in range(_POOL + 1)], np.uint32)


class Chance:
    """``generator(*cell)`` for one key: the streams are the cells of a grid of this shape.

    A generator is valid until the next one is asked for.
    """

    def __init__(self, key: Sequence[int], shape: Sequence[int]) -> None:
        self._keys = _keys(*_take_in(key), shape)
        self._philox = np.random.Philox(0)
        self._state: Any = self._philox.state
        self._state["buffer_pos"] = _POOL  # nothing is left of a block that was drawn before

    def generator(self, *cell: int) -> np.random.Generator:
        """The generator of a stream, from its beginning."""
        self._state["state"]["key"] = self._keys[cell]
        self._philox.state = self._state
        return np.random.Generator(self._philox)


def _take_in(key: Sequence[int]) -> tuple[list[int], int]:
    """State of the hash when it has taken the key in, and the constant that comes next."""
    words = [word for number in key for word in _words(number)]
    words += [0] * (_POOL - len(words))
    constant = _INIT_A

    def hashed(word: int) -> int:
        nonlocal constant
        word ^= constant
        constant = constant * _MULT_A & _WORD
        word = word * constant & _WORD
        return word ^ word >> 16

    pool = [hashed(word) for word in words[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashed(pool[source]))
    for word in words[_POOL:]:
        pool = [_mix(state, hashed(word)) for state in pool]
    return pool, constant


def _keys(pool: list[int], constant: int, shape: Sequence[int]) -> UInt64[np.ndarray, "*shape 2"]:
    """Philox's key of each cell: the cell's numbers are taken in as well, then words given out."""
    states: UInt32[np.ndarray, "*grid 4"] = np.array(pool, np.uint32)
    for size in shape:
        words, constant = _taken(size, constant)
        states = np.uint32(_MIX_L) * states[..., None, :] - words
        states ^= states >> np.uint32(16)
    states = (states ^ _OUT[:-1]) * _OUT[1:]
    states ^= states >> np.uint32(16)
    low, high = states[..., ::2].astype(np.uint64), states[..., 1::2].astype(np.uint64)
    return low | high << np.uint64(32)


@lru_cache
def _taken(size: int, constant: int) -> tuple[UInt32[np.ndarray, "size 4"], int]:
    """What taking in each number below a size subtracts from a state; the constant after it."""
    powers = [constant * _MULT_A**n & _WORD for n in range(_POOL + 1)]
    constants = np.array(powers, np.uint32)
    words = (np.arange(size, dtype=np.uint32)[:, None] ^ constants[:-1]) * constants[1:]
    words ^= words >> np.uint32(16)
    return np.uint32(_MIX_R) * words, powers[-1]


def _mix(state: int, word: int) -> int:
    mixed = _MIX_L * state - _MIX_R * word & _WORD
    return mixed ^ mixed >> 16


def _words(number: int) -> list[int]:
    """A number of any size in words of 32 bits, the low one first."""
    if number < 0:
        raise ValueError(f"a key of chance is made of numbers from 0 on, not {number}")
    words = [number & _WORD]
    while number := number >> 32:
        words.append(number & _WORD)
    return words
