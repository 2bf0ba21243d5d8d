"""The frame: whatever happens to its bytes, it is read exactly or refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from feddm_flwr import wire
from feddm_flwr.exchange import Channel, channel
from feddm_flwr.wire import FrameError

SIZE = 1000
LAYOUT = "0123456789abcdef" * 2
CHANNEL = channel("int8", 64, False, LAYOUT, SIZE)
VECTOR = np.linspace(-1, 1, SIZE, dtype=np.float32)
FRAME = CHANNEL.encode(VECTOR, 7)


def refused(frame: bytes, match: str | None = None, to: Channel = CHANNEL, number: int = 7) -> None:
    with pytest.raises(FrameError, match=match):
        to.decode(frame, number)


def test_a_frame_of_version_1_is_still_read() -> None:
    """A fixed frame: the format may not change without a new version number."""
    frame = bytes.fromhex(
        "4644444d01007a0000007b22636f646563223a22696e7438222c226c61796f7574223a22303132333435363738396162636465663031"
        "3233343536373839616263646566222c226f7074696f6e73223a7b22626c6f636b5f73697a65223a382c22636c69705f736561726368"
        "223a307d2c22726f756e64223a322c2273697a65223a347dcc091cba0f000000900255b828b52ffd20063100007f810100003f"
    )
    small = channel("int8", 8, False, LAYOUT, 4)
    assert small.decode(frame, 2).tolist() == [63.5, -63.5, 0.5, 0.0]


@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
@settings(max_examples=500)
def test_no_changed_byte_goes_unnoticed(position: int, change: int) -> None:
    frame = bytearray(FRAME)
    frame[position] ^= change
    refused(bytes(frame))


@pytest.mark.parametrize("length", [0, 1, 9, 10, 40, len(FRAME) - 1])
def test_truncated_frames_are_refused(length: int) -> None:
    refused(FRAME[:length])


def test_added_bytes_are_refused() -> None:
    refused(FRAME + b"\0", "bytes follow the last chunk")


@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    refused(noise)
    refused(FRAME[:200] + noise)


def test_version_round_layout_codec_and_size_are_checked() -> None:
    refused(FRAME[:4] + b"\2\0" + FRAME[6:], "version 2 is not known; this software reads version 1")
    refused(FRAME, "the frame's round is 7, not 8", number=8)
    refused(FRAME, "the frame's layout is", channel("int8", 64, False, "f" * 32, SIZE))
    refused(FRAME, "the frame's codec is 'int8', not 'none'", channel("none", 64, False, LAYOUT, SIZE))
    refused(FRAME, "the frame's size is 1000, not 999", channel("int8", 64, False, LAYOUT, SIZE - 1))
    refused(FRAME, "the frame's options is", channel("int8", 128, False, LAYOUT, SIZE))


def with_chunk(coded: bytes) -> bytes:
    _, offset = wire.read_header(FRAME)
    return FRAME[:offset] + struct.pack("<II", len(coded), zlib.crc32(coded)) + coded


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    refused(with_chunk(zstandard.compress(bytes(1 << 28))), "does not hold the 1032 bytes")


def test_a_chunk_that_hides_its_length_is_refused() -> None:
    coder = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    refused(with_chunk(coder.compress(bytes(1 << 20)) + coder.flush()), "does not hold the 1032 bytes")


def test_a_header_of_the_wrong_types_is_refused() -> None:
    for text in (b"[]", b"{}", b'{"codec":1,"layout":"","round":1,"size":1,"options":{}}', b"\xff", b"[" * 20000):
        head = struct.pack("<4sHI", b"FDDM", 1, len(text)) + text
        refused(head + struct.pack("<I", zlib.crc32(head)), "header")


def test_a_hostile_scale_is_refused() -> None:
    blocks = -(-SIZE // 64)
    refused(with_chunk(zstandard.compress(bytes([127]) * SIZE + b"\x80\x7f" * blocks)), "not finite or too large")
