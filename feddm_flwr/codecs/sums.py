"""Small whole numbers packed so that the sum of packed words is the packed sum: what secure sums are of.

A word of 64 bits holds as many digits of a base as fit in. Where the base is above any sum of the digits in one place,
words are added modulo 2^64 without a carry from place to place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddm_flwr.vector import Words

WORD = 64  # bits


def per_word(base: int) -> int:
    """Returns how many digits of a base fit into a word."""
    count = 1
    while base ** (count + 1) <= 1 << WORD:
        count += 1
    return count


def words_of(count: int, base: int) -> int:
    """Returns how many words hold so many digits."""
    return -(-count // per_word(base))


def pack(digits: NDArray[Any], base: int) -> Words:
    """Returns digits 0..base-1, shape (n,), as words, shape (`words_of(n, base)`,)."""
    size = words_of(len(digits), base)
    words = np.zeros(size, np.uint64)
    for place in range(per_word(base)):
        some = digits[place * size : (place + 1) * size]  # neighbours are in neighbouring words: no strides
        words[: len(some)] += some.astype(np.uint64) * np.uint64(base**place)
    return words


def unpack(words: Words, base: int, count: int) -> NDArray[np.int64]:
    """Returns the inverse of `pack`, or the sums of what was packed, shape (count,).

    Raises:
        ValueError: the words are no sum of packed digits.
    """
    left, found = words.copy(), np.empty((per_word(base), len(words)), np.int64)
    for place in range(len(found)):
        left, found[place] = np.divmod(left, np.uint64(base))
    flat = found.reshape(-1)
    if left.any() or flat[count:].any():
        raise ValueError("the words are no sum of packed digits")
    return flat[:count]
