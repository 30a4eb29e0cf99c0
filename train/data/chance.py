"""Random numbers that belong to what they are for: each purpose and its numbers have a generator of their own, so that
neither threads nor interruptions change what is drawn."""

from __future__ import annotations

import hashlib
import random


def generator_of(purpose: str, *numbers: int) -> random.Random:
    """A generator of its own for each purpose and numbers: the same on every platform. What `random()` draws stays the same in
    every Python version, by its promise; `randint` has so far."""
    text = "|".join([purpose, *map(str, numbers)])
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))


def permutation(length: int, source: random.Random) -> list[int]:
    """A uniform permutation. `random()` alone is drawn: of Python's generator, only its stream is promised to stay."""
    keys = [source.random() for _ in range(length)]
    return sorted(range(length), key=keys.__getitem__)
