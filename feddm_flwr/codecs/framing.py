"""The frame that carries a coded vector: versioned, checksummed, in chunks decodable one by one.

    magic "FDDM" | u16 version | u32 length of header | header | u32 CRC of all before
    then per chunk: u32 length | u32 CRC of the body | body
    a body, per plane: u32 length | the plane, coded by zstd

All integers are little-endian. The header is JSON, see `Header`. A chunk covers `CHUNK` values (the
last one fewer), which the codec turned into planes of bytes. The receiver's codec limits how many bytes a
plane can hold before zstd, so nothing is allocated on a sender's word.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeVar

import zstandard

#: A frame in memory, or in a file.
Frame = bytes | memoryview

T = TypeVar("T")

MAGIC = b"FDDM"
VERSION = 2
CHUNK = 1 << 20  # values; large enough for zstd's statistics, small enough to decode one at a time
_MAX_HEADER = 1 << 16
_PREFIX = struct.Struct("<4sHI")
_CRC = struct.Struct("<I")
_CHUNK_PREFIX = struct.Struct("<II")
_PLANE_PREFIX = struct.Struct("<I")
#: The entropy coder does the work: in packed codes, matches of a few bytes are chance and cost more than they save.
_ZSTD = zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=14)


class FrameError(ValueError):
    """The bytes are not a frame that can be trusted."""


@dataclass(frozen=True)
class Header:
    """What a frame says of itself."""

    content: str  # "weights", "delta", …: what the values are
    codec: str
    layout: str  # fingerprint of the names and shapes of the parameters
    round: int
    size: int  # values in the vector
    options: dict[str, int]  # of the codec


def chunk_sizes(size: int) -> list[int]:
    """Returns how many values each chunk of a vector holds."""
    return [min(CHUNK, size - start) for start in range(0, size, CHUNK)]


def compress(planes: Iterable[bytes]) -> bytes:
    """Returns the body of a chunk."""
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    coded = [compressor.compress(plane) for plane in planes]
    return b"".join(part for plane in coded for part in (_PLANE_PREFIX.pack(len(plane)), plane))


def ahead(chunks: Iterable[T], size: int) -> Iterator[T]:
    """Yields the chunks of a vector of `size` values, each made in a thread while the one before is used."""
    iterator = iter(chunks)
    if size <= CHUNK:
        yield from iterator
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(list, islice(iterator, 1))
        while item := coming.result():
            coming = pool.submit(list, islice(iterator, 1))
            yield item[0]


def write(header: Header, chunks: Iterable[Iterable[bytes]]) -> bytes:
    """Returns the frame of a header and its chunks, each as the planes that the codec made."""
    text = json.dumps(asdict(header), sort_keys=True, separators=(",", ":")).encode()
    head = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
    parts = [head, _CRC.pack(zlib.crc32(head))]
    for planes in ahead(chunks, header.size):
        body = compress(planes)
        parts += [_CHUNK_PREFIX.pack(len(body), zlib.crc32(body)), body]
    return b"".join(parts)


def read_header(frame: Frame) -> tuple[Header, int]:
    """Returns the header and the offset of the first chunk.

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
        header = Header(**json.loads(bytes(frame[_PREFIX.size : end])))
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(f"the header cannot be read: {error}") from error
    texts = all(isinstance(text, str) for text in (header.content, header.codec, header.layout))
    counts = type(header.round) is int and type(header.size) is int and header.size >= 0
    options = isinstance(header.options, dict) and all(type(v) is int for v in header.options.values())
    if not (texts and counts and options):
        raise FrameError("the header has a field of the wrong type")
    return header, end + _CRC.size


def read_chunks(frame: Frame, offset: int, size: int, limits: Callable[[int], list[int]]) -> Iterator[list[bytes]]:
    """Yields the planes of each chunk of a vector of `size` values, one chunk at a time.

    `limits(n)` has the most bytes that each plane of n values can have. `size` must have been checked
    against what the receiver expects.

    Raises:
        FrameError: a chunk is truncated, corrupt or too long, or bytes follow the last one.
    """
    view = memoryview(frame)  # slices that copy nothing
    decompressor = zstandard.ZstdDecompressor()
    for index, count in enumerate(chunk_sizes(size)):
        if offset + _CHUNK_PREFIX.size > len(frame):
            raise FrameError(f"the frame ends before chunk {index}")
        length, checksum = _CHUNK_PREFIX.unpack_from(frame, offset)
        offset += _CHUNK_PREFIX.size
        body = view[offset : offset + length]
        offset += length
        if len(body) < length or zlib.crc32(body) != checksum:
            raise FrameError(f"chunk {index} is truncated or its checksum is wrong")
        yield _decompress(decompressor, body, limits(count), index)
    if offset != len(frame):
        raise FrameError(f"{len(frame) - offset} bytes follow the last chunk")


def _decompress(
    decompressor: zstandard.ZstdDecompressor, body: memoryview, limits: list[int], index: int
) -> list[bytes]:
    """Returns the planes in the body of a chunk."""
    planes, offset = [], 0
    for limit in limits:
        if offset + _PLANE_PREFIX.size > len(body):
            raise FrameError(f"chunk {index} has too few planes")
        (length,) = _PLANE_PREFIX.unpack_from(body, offset)
        offset += _PLANE_PREFIX.size
        coded = body[offset : offset + length]
        offset += length
        try:
            if len(coded) < length or not 0 <= zstandard.frame_content_size(coded) <= limit:
                raise FrameError(f"chunk {index} has a plane that is truncated or above its {limit} bytes")
            planes.append(decompressor.decompress(coded, max_output_size=max(limit, 1), allow_extra_data=False))
        except zstandard.ZstdError as error:
            raise FrameError(f"chunk {index} cannot be decompressed: {error}") from error
    if offset != len(body):
        raise FrameError(f"chunk {index} has too many planes")
    return planes
