"""A coded channel for flat vectors; server and node hold the same two, one for each direction.

What travels is set by `codec.target`:

- `weights` (the FedDM paper's scheme): the weights themselves are coded both ways, so neither end
  keeps state. A node trains from the weights it decoded; the server takes as its update
  `decoded - received`, so that under averaging the new model is exactly the mean.
- `delta`: a node sends what its training changed, and starts its next training with what the coding
  lost (error feedback, see `exchange.uplink`). The server sends the difference between its model and the
  *shadow*, which is what the nodes hold; what coding loses stays in that difference by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from feddm_flwr.codecs import framing
from feddm_flwr.codecs.base import Codec
from feddm_flwr.codecs.floating import Identity
from feddm_flwr.codecs.framing import FrameError
from feddm_flwr.codecs.registry import make, options_of
from feddm_flwr.config import Codec as Options
from feddm_flwr.vector import Vector

__all__ = ["Channel", "FrameError", "channel", "exact", "fingerprint"]

_THREADS = 4  # hash at most: beyond that memory is what limits


@dataclass(frozen=True)
class Channel:
    """Both ends of one direction: the codec, and the layout that both sides must share."""

    codec: Codec
    layout: str  # fingerprint
    size: int

    def encode(
        self, vector: Tensor | Vector, content: str, number: int, seed: int = 0, decoded: Tensor | None = None
    ) -> bytes:
        """Returns the frame of a vector of `size` values, on any device, for round `number`; `decoded` takes what
        `decode` makes of it.

        Raises:
            ValueError: a value is NaN, infinite or too large.
        """
        values = torch.as_tensor(vector)
        assert values.shape == (self.size,), (values.shape, self.size)
        state = self.codec.init(values, seed)

        def chunks() -> Iterator[list[bytes]]:
            for start in range(0, self.size, framing.CHUNK):
                piece = slice(start, start + framing.CHUNK)
                planes = self.codec.encode(values[piece], state)
                if decoded is not None:
                    self.codec.decode(planes, decoded[piece])
                yield planes

        return framing.write(self._header(content, number), chunks())

    def code(self, vector: Tensor | Vector, content: str, number: int, seed: int = 0) -> tuple[bytes, Vector]:
        """Returns the frame of a vector, as `encode`, and what `decode` makes of it, for less than both cost.

        Raises:
            ValueError: as `encode`.
        """
        decoded = torch.empty(self.size)
        return self.encode(vector, content, number, seed, decoded), decoded.numpy()

    def decode(self, frame: bytes, content: str, number: int) -> Vector:
        """Returns the vector in a frame of round `number`.

        Raises:
            FrameError: the frame is corrupt, of another content, round, layout or codec, or not finite.
        """
        vector = torch.empty(self.size)
        parts = iter(vector.split(framing.CHUNK))
        for planes in framing.ahead(self._chunks(frame, content, number), self.size):
            self.codec.decode(planes, next(parts))
        return vector.numpy()

    def decode_chunks(self, frame: framing.Frame, content: str, number: int) -> Iterator[Vector]:
        """Yields the same, one chunk after the other."""
        for size, planes in zip(framing.chunk_sizes(self.size), self._chunks(frame, content, number), strict=True):
            part = torch.empty(size)
            self.codec.decode(planes, part)
            yield part.numpy()

    def _chunks(self, frame: framing.Frame, content: str, number: int) -> Iterator[list[bytes]]:
        """Yields the planes of each chunk."""
        header, offset = framing.read_header(frame)
        for name, value in asdict(self._header(content, number)).items():
            if getattr(header, name) != value:
                raise FrameError(f"the frame's {name} is {getattr(header, name)!r}, not {value!r}")
        return framing.read_chunks(frame, offset, self.size, self.codec.limits)

    def _header(self, content: str, number: int) -> framing.Header:
        return framing.Header(content, self.codec.name, self.layout, number, self.size, options_of(self.codec))


def channel(name: str, c: Options, layout: str, size: int) -> Channel:
    """Returns the channel of the codec of that name, with the options of the configuration."""
    codec = make(
        name,
        block_size=c.block_size,
        clip_search=int(c.clip_search),
        stochastic=int(c.stochastic_rounding),
        per_million=round(1e6 * c.topk_share),
        bits=c.topk_bits,
        ratio=c.budget_ratio,
    )
    return Channel(codec, layout, size)


def exact(layout: str, size: int) -> Channel:
    """Returns a channel that loses nothing: for files, and for nodes that need the whole shadow."""
    return Channel(Identity(), layout, size)


def fingerprint(vector: Vector) -> str:
    """Returns 32 hex digits that two vectors share only if they agree bit for bit: SHA-256 of the SHA-256 of their
    chunks."""
    flat = np.ascontiguousarray(vector, "<f4")
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = (flat[start : start + framing.CHUNK].data for start in range(0, len(flat), framing.CHUNK))
        digests = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]
