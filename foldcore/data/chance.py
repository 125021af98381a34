"""The named streams of chance of an example, as fast as its many short draws need.

A stream is numpy's ``Philox(SeedSequence(key, spawn_key=stream))``, bit for bit. Building these two
objects takes longer than most draws, so the seed's hash (O'Neill's seed_seq, which numpy keeps
stable) is computed here, its part for the key once, and one bit generator is set anew for each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = 0xFFFFFFFF
_POOL = 4  # words of a seed's state
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875  # of the hash that takes words in
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED  # of the hash that gives words out
_MIX_L, _MIX_R = 0xCA01F9DD, 0x4973F715


class Chance:
    """``generator(stream)`` for one key; a generator is valid until the next one is asked for."""

    def __init__(self, key: Sequence[int]) -> None:
        words = [word for number in key for word in _words(number)]
        words += [0] * (_POOL - len(words))
        self._constant = _INIT_A
        self._pool = [self._hash(word) for word in words[:_POOL]]
        for source in range(_POOL):
            for target in range(_POOL):
                if source != target:
                    mixed = self._hash(self._pool[source])
                    self._pool[target] = _mix(self._pool[target], mixed)
        for word in words[_POOL:]:
            self._pool = [_mix(state, self._hash(word)) for state in self._pool]
        self._start = (self._constant, self._pool)
        self._philox = np.random.Philox(0)
        self._state: Any = self._philox.state
        self._state["buffer_pos"] = _POOL  # nothing is left of a block that was drawn before

    def generator(self, *stream: int) -> np.random.Generator:
        """The generator of a stream, from its beginning."""
        constant, pool = self._start
        for number in stream:
            for word in _words(number):
                mixed = []  # written out: this runs twenty times an example
                for state in pool:
                    value = word ^ constant
                    constant = constant * _MULT_A & _WORD
                    value = value * constant & _WORD
                    state = _MIX_L * state - _MIX_R * (value ^ value >> 16) & _WORD
                    mixed.append(state ^ state >> 16)
                pool = mixed
        out, constant = [], _INIT_B
        for word in pool:
            word ^= constant
            constant = constant * _MULT_B & _WORD
            word = word * constant & _WORD
            out.append(word ^ word >> 16)
        self._state["state"]["key"][:] = (out[0] | out[1] << 32, out[2] | out[3] << 32)
        self._philox.state = self._state
        return np.random.Generator(self._philox)

    def _hash(self, word: int) -> int:
        word ^= self._constant
        self._constant = self._constant * _MULT_A & _WORD
        word = word * self._constant & _WORD
        return word ^ word >> 16


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
