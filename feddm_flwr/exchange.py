"""A coded channel for flat vectors; server and node hold the same two, one for each direction.

`codec.target = weights` (the FedDM paper's scheme): the weights themselves are coded both ways, so
neither end keeps state. A node trains from the weights it decoded; the server takes as its update
`decoded - received`, so that under averaging the new model is exactly the mean of what nodes sent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np

from feddm_flwr import wire
from feddm_flwr.codec import Codec, Values, make
from feddm_flwr.wire import FrameError

__all__ = ["Channel", "FrameError", "Values", "channel"]


@dataclass(frozen=True)
class Channel:
    """Both ends of one direction: the codec, and the layout that both sides must share."""

    codec: Codec
    layout: str  # fingerprint
    size: int

    def encode(self, vector: Values, number: int) -> bytes:
        """The frame of a vector of `size` values, for round `number`.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        assert vector.shape == (self.size,), (vector.shape, self.size)
        header = wire.Header(self.codec.name, self.layout, number, self.size, self._options())
        state = self.codec.init(self.size)
        chunks: list[bytes] = []
        for part in _parts(vector):
            raw, state = self.codec.encode(part, state)
            chunks.append(raw)
        return wire.write(header, chunks)

    def decode(self, frame: bytes, number: int) -> Values:
        """The vector in a frame of round `number`.

        Raises:
            FrameError: the frame is corrupt, of another round, layout or codec, or not finite.
        """
        header, offset = wire.read_header(frame)
        expected = wire.Header(self.codec.name, self.layout, number, self.size, self._options())
        for name, value in asdict(expected).items():
            if getattr(header, name) != value:
                raise FrameError(f"the frame's {name} is {getattr(header, name)!r}, not {value!r}")
        vector = np.empty(self.size, np.float32)
        chunks = wire.read_chunks(frame, offset, self.size, self.codec.raw_bytes)
        for part, raw in zip(_parts(vector), chunks, strict=True):
            part[:] = self.codec.decode(raw, len(part))
        return vector

    def _options(self) -> dict[str, int]:
        return {field.name: getattr(self.codec, field.name) for field in fields(self.codec)}  # type: ignore[arg-type]


def channel(codec: str, block_size: int, clip_search: bool, layout: str, size: int) -> Channel:
    """The channel that a codec's configuration asks for."""
    return Channel(make(codec, block_size=block_size, clip_search=int(clip_search)), layout, size)


def _parts(vector: Values) -> list[Values]:
    """Views of the vector, one for each chunk."""
    return np.split(vector, np.cumsum(wire.chunk_sizes(len(vector)))[:-1])
