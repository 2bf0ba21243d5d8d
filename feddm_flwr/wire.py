"""The frame that carries a coded vector: versioned, checksummed, in chunks decodable one by one.

    magic "FDDM" | u16 version | u32 length of header | header | u32 CRC of all before
    then per chunk: u32 length | u32 CRC of the coded bytes | coded bytes

All integers are little-endian. The header is JSON: `codec` (text), `layout` (fingerprint of the
parameters' names and shapes), `round`, `size` (values in the vector), `options` (of the codec).
A chunk covers `CHUNK` values (the last one fewer), coded by the codec and then by zstd. How many
bytes a chunk holds before zstd follows from the header, so nothing is allocated on a sender's word.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import zstandard

MAGIC = b"FDDM"
VERSION = 1
CHUNK = 1 << 20  # values; large enough for zstd's statistics, small enough to decode one at a time
_MAX_HEADER = 1 << 16
_PREFIX = struct.Struct("<4sHI")
_CRC = struct.Struct("<I")
_CHUNK_PREFIX = struct.Struct("<II")


class FrameError(ValueError):
    """The bytes are not a frame that can be trusted."""


@dataclass(frozen=True)
class Header:
    """What a frame says of itself."""

    codec: str
    layout: str
    round: int
    size: int
    options: dict[str, int]


def chunk_sizes(size: int) -> list[int]:
    """How many values each chunk of a vector holds."""
    return [min(CHUNK, size - start) for start in range(0, size, CHUNK)]


def write(header: Header, chunks: Iterable[bytes]) -> bytes:
    """The frame of a header and its chunks, each as the codec made it."""
    text = json.dumps(asdict(header), sort_keys=True, separators=(",", ":")).encode()
    head = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
    parts = [head, _CRC.pack(zlib.crc32(head))]
    compressor = zstandard.ZstdCompressor(level=3)
    for chunk in chunks:
        coded = compressor.compress(chunk)
        parts += [_CHUNK_PREFIX.pack(len(coded), zlib.crc32(coded)), coded]
    return b"".join(parts)


def read_header(frame: bytes) -> tuple[Header, int]:
    """The header and the offset of the first chunk.

    Raises:
        FrameError: the magic, version, length, checksum or a field of the header is wrong.
    """
    if len(frame) < _PREFIX.size:
        raise FrameError(f"the frame has {len(frame)} bytes: too short to have a header")
    magic, version, length = _PREFIX.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError(f"the frame begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version {version} is not known; this software reads version {VERSION}")
    end = _PREFIX.size + length
    if length > _MAX_HEADER or end + _CRC.size > len(frame):
        raise FrameError(f"the header is said to have {length} bytes; the frame is truncated or corrupt")
    if zlib.crc32(frame[:end]) != _CRC.unpack_from(frame, end)[0]:
        raise FrameError("the header's checksum is wrong")
    try:
        header = Header(**json.loads(frame[_PREFIX.size : end]))
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(f"the header cannot be read: {error}") from error
    texts = isinstance(header.codec, str) and isinstance(header.layout, str)
    counts = type(header.round) is int and type(header.size) is int and header.size >= 0
    options = isinstance(header.options, dict) and all(type(v) is int for v in header.options.values())
    if not (texts and counts and options):
        raise FrameError("the header has a field of the wrong type")
    return header, end + _CRC.size


def read_chunks(frame: bytes, offset: int, size: int, raw_bytes: Callable[[int], int]) -> Iterator[bytes]:
    """The chunks of a vector of `size` values as the codec made them, one by one.

    `raw_bytes(n)` is the exact number of bytes that the codec makes of n values. `size` must have
    been checked against what the receiver expects.

    Raises:
        FrameError: a chunk is truncated, corrupt or of another length, or bytes follow the last one.
    """
    decompressor = zstandard.ZstdDecompressor()
    for index, count in enumerate(chunk_sizes(size)):
        if offset + _CHUNK_PREFIX.size > len(frame):
            raise FrameError(f"the frame ends before chunk {index}")
        length, checksum = _CHUNK_PREFIX.unpack_from(frame, offset)
        offset += _CHUNK_PREFIX.size
        coded = frame[offset : offset + length]
        offset += length
        if len(coded) < length or zlib.crc32(coded) != checksum:
            raise FrameError(f"chunk {index} is truncated or its checksum is wrong")
        expected = raw_bytes(count)
        try:
            if zstandard.frame_content_size(coded) != expected:
                raise FrameError(f"chunk {index} does not hold the {expected} bytes that it should")
            raw = decompressor.decompress(coded, max_output_size=expected)
        except zstandard.ZstdError as error:
            raise FrameError(f"chunk {index} cannot be decompressed: {error}") from error
        if len(raw) != expected:
            raise FrameError(f"chunk {index} does not hold the {expected} bytes that it should")
        yield raw
    if offset != len(frame):
        raise FrameError(f"{len(frame) - offset} bytes follow the last chunk")
