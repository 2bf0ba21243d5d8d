"""Random numbers that nobody can foretell, for what differential privacy hides behind.

What derives from a run's seed, the server can compute itself and take away again.
"""

from __future__ import annotations

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_WORD = 8  # bytes of a number
_BITS = 53  # of these, which a double holds
_PIECE = 1 << 20  # numbers that are made at a time


class SecretRandom:
    """The key stream of AES-256 in counter mode, whose key is of the operating system, and nowhere else."""

    def __init__(self, key: bytes | None = None) -> None:
        """Takes a key of 32 bytes; without one (anywhere but in tests) it is new."""
        cipher = Cipher(algorithms.AES256(key or os.urandom(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def uniform(self, size: int) -> Tensor:
        """Returns so many numbers, each of (0, 1] alike, shape (size,), float64."""
        if not size:  # which torch takes no bytes for
            return torch.empty(0, dtype=torch.float64)
        words = torch.frombuffer(bytearray(self._stream.update(bytes(_WORD * size))), dtype=torch.int64)
        return ((words & ((1 << _BITS) - 1)).double() + 1) * 2.0**-_BITS

    def normal(self, size: int, device: torch.device) -> Tensor:
        """Returns so many numbers of a standard normal distribution (Box and Muller 1958), shape (size,), float64."""
        found = torch.empty(size, device=device, dtype=torch.float64)
        for start in range(0, size, _PIECE):
            count = min(_PIECE, size - start)
            pairs = (count + 1) // 2
            distance, angle = self.uniform(2 * pairs).to(device).split(pairs)
            distance, angle = distance.log_().mul_(-2).sqrt_(), angle.mul_(2 * math.pi)
            both = torch.cat([distance * angle.cos(), distance * angle.sin()])
            found[start : start + count] = both[:count]
        return found

    def seed(self) -> int:
        """Returns a seed of 63 bits for a generator of which nothing secret hangs."""
        return int.from_bytes(self._stream.update(bytes(_WORD)), "little") >> 1
