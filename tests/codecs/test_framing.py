"""The frame: whatever happens to its bytes, it is read exactly or refused."""

from __future__ import annotations

import random
import resource
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from feddm_flwr.codecs import framing
from feddm_flwr.codecs.framing import FrameError
from feddm_flwr.config import CODECS, parse
from feddm_flwr.exchange.channel import Channel, channel

SIZE = 1000
LAYOUT = "0123456789abcdef" * 2
BLOCKS = -(-SIZE // 64)


def make(name: str, layout: str = LAYOUT, size: int = SIZE, block: int = 64) -> Channel:
    return channel(name, replace(parse({}).codec, block_size=block), layout, size)


CHANNEL = make("int8")
VECTOR = np.linspace(-1, 1, SIZE, dtype=np.float32)
FRAME = CHANNEL.encode(VECTOR, "delta", 7)


def refused(frame: bytes, match: str | None = None, to: Channel = CHANNEL, number: int = 7) -> None:
    with pytest.raises(FrameError, match=match):
        to.decode(frame, "delta", number)


#: Fixed frames of 40 values: the format may not change without a new version number.
FIXED: dict[str, str] = {
    "none": (
        "4644444d02006f0000007b22636f646563223a226e6f6e65222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b7d"
        "2c22726f756e64223a322c2273697a65223a34307de4a737a2d4000000359a75d43100000028b52ffd20284101000091cbbe"
        "68ddf21b09b4eb4ba95e1d139bd14d5349a177de0b882c75fb4f9ebf7c030adaa3b183733100000028b52ffd202841010000"
        "04a75c327793946fc1830b39288fbaf728280c84c4caf98e092260c83cf6e4dea172c8d9a9ea3d3100000028b52ffd202841"
        "010000174e69158c8c8bd75a10c22fa34298450b364b1182b09953a897aa2b9f8585b13dd5aeec04f4243100000028b52ffd"
        "2028410100003ebdbe3e3ebebe3e3ebfbd3fbdbf3e3fbfbf3f3fbfbe3f3dbf3e3fbfbf3f3fbfbf3f3ebf3e3fbf"
    ),
    "fp16": (
        "4644444d02006f0000007b22636f646563223a2266703136222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b7d"
        "2c22726f756e64223a322c2273697a65223a34307dbb66ebca78000000f8e00b6b3100000028b52ffd202841010000b8754b"
        "aa64655dbbd684107a1914c63059b1588c1686d09c40b9535efa302f8fedac766725a7223100000028b52ffd202841010000"
        "68e2eb686cecec6e6af0e671e5f26c72f0f17270f4ed7462f56c75f1f47474f5f1766df76877f10a00000028b52ffd200109"
        "00000e"
    ),
    "bf16": (
        "4644444d02006f0000007b22636f646563223a2262663136222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b7d"
        "2c22726f756e64223a322c2273697a65223a34307d5f4d5c4e6a000000821ad3853100000028b52ffd202841010000174f69"
        "158c8d8cd75b11c22fa34399460b364b1283b19a54a897aa2c9f8686b23ed5afed05f5243100000028b52ffd202841010000"
        "3ebdbe3e3ebebe3e3ebfbd3fbdbf3e3fbfbf3f3fbfbe3f3dbf3e3fbfbf3f3fbfbf3f3ebf3e3fbf"
    ),
    "int8": (
        "4644444d02009d0000007b22636f646563223a22696e7438222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "626c6f636b5f73697a65223a31362c22636c69705f736561726368223a302c2273746f63686173746963223a307d2c22726f"
        "756e64223a322c2273697a65223a34307df8ac9dda550000000ad6135d3100000028b52ffd20284101007f98775997ad5152"
        "c5a3216ff17201b1c94b3bcbb51e5ef284029bfe3f08e3e3234eee960488fe540c00000028b52ffd2003190000c52c770c00"
        "000028b52ffd20031900003b3c3c"
    ),
    "int4": (
        "4644444d02009d0000007b22636f646563223a22696e7434222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "626c6f636b5f73697a65223a31362c22636c69705f736561726368223a302c2273746f63686173746963223a307d2c22726f"
        "756e64223a322c2273697a65223a34307da5fb88ae41000000c4e5387a1d00000028b52ffd2014a100007f529e40925c6796"
        "47a828c807db03c03e8569590c00000028b52ffd2003190000df438c0c00000028b52ffd20031900003d3e3e"
    ),
    "int3": (
        "4644444d02009d0000007b22636f646563223a22696e7433222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "626c6f636b5f73697a65223a31362c22636c69705f736561726368223a302c2273746f63686173746963223a307d2c22726f"
        "756e64223a322c2273697a65223a34307d16df8d5f41000000fed5c2381d00000028b52ffd2014a100001f11201021161b1c"
        "13240b2c032e01280f2215140c00000028b52ffd200319000082e4240c00000028b52ffd20031900003e3e3f"
    ),
    "int2": (
        "4644444d02009d0000007b22636f646563223a22696e7432222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "626c6f636b5f73697a65223a31362c22636c69705f736561726368223a302c2273746f63686173746963223a307d2c22726f"
        "756e64223a322c2273697a65223a34307d2bd33a79350000003de39c891100000028b52ffd20084100007994307a9130c591"
        "0c00000028b52ffd20031900000c96da0c00000028b52ffd20031900003f3f3f"
    ),
    "sign": (
        "4644444d02009d0000007b22636f646563223a227369676e222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "626c6f636b5f73697a65223a31362c22636c69705f736561726368223a302c2273746f63686173746963223a307d2c22726f"
        "756e64223a322c2273697a65223a34307de43442dd3200000045915bfb0e00000028b52ffd2005290000339399cd6c0c0000"
        "0028b52ffd200319000010cf0b0c00000028b52ffd20031900003f3f40"
    ),
    "topk": (
        "4644444d02009b0000007b22636f646563223a22746f706b222c22636f6e74656e74223a2264656c7461222c226c61796f75"
        "74223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a7b22"
        "62697473223a322c22626c6f636b5f73697a65223a31362c227065725f6d696c6c696f6e223a35303030307d2c22726f756e"
        "64223a322c2273697a65223a34307df22389e85500000084cc3a6b0a00000028b52ffd2001090000020a00000028b52ffd20"
        "01090000000b00000028b52ffd200211000024010a00000028b52ffd20010900000c0a00000028b52ffd2001090000a10a00"
        "000028b52ffd20010900003f"
    ),
    "budget": (
        "4644444d02007b0000007b22636f646563223a22627564676574222c22636f6e74656e74223a2264656c7461222c226c6179"
        "6f7574223a223031323334353637383961626364656630313233343536373839616263646566222c226f7074696f6e73223a"
        "7b22726174696f223a38327d2c22726f756e64223a322c2273697a65223a34307df60743a69c000000feca63060a00000028"
        "b52ffd2001090000010a00000028b52ffd2001090000000a00000028b52ffd2001090000260a00000028b52ffd2001090000"
        "000a00000028b52ffd2001090000000900000028b52ffd20000100000900000028b52ffd20000100000b00000028b52ffd20"
        "02110000d6940b00000028b52ffd2002110000afaa0b00000028b52ffd200211000037aa0b00000028b52ffd200211000040"
        "3e"
    ),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_frame_of_version_2_is_still_read(name: str) -> None:
    vector = np.float32(np.sin(np.arange(40) * 1.7) * np.linspace(0.1, 2, 40))
    fixed = make(name, size=40, block=16)
    decoded = fixed.decode(bytes.fromhex(FIXED[name]), "delta", 2)
    np.testing.assert_array_equal(decoded, fixed.decode(fixed.encode(vector, "delta", 2), "delta", 2))


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


def test_version_round_content_layout_codec_and_size_are_checked() -> None:
    refused(FRAME[:4] + b"\1\0" + FRAME[6:], "version 1 is not known; this software reads version 2")
    refused(FRAME, "the frame's round is 7, not 8", number=8)
    refused(FRAME, "the frame's layout is", make("int8", layout="f" * 32))
    refused(FRAME, "the frame's codec is 'int8', not 'none'", make("none"))
    refused(FRAME, "the frame's size is 1000, not 999", make("int8", size=SIZE - 1))
    refused(FRAME, "the frame's options is", make("int8", block=128))
    with pytest.raises(FrameError, match="the frame's content is 'delta', not 'weights'"):
        CHANNEL.decode(FRAME, "weights", 7)


def with_planes(*planes: bytes) -> bytes:
    """The frame with other planes, each coded already."""
    _, offset = framing.read_header(FRAME)
    body = b"".join(struct.pack("<I", len(plane)) + plane for plane in planes)
    return FRAME[:offset] + struct.pack("<II", len(body), zlib.crc32(body)) + body


def test_planes_that_are_as_they_should_be_are_read() -> None:
    plane = zstandard.compress
    frame = with_planes(plane(bytes([254]) * SIZE), plane(bytes(BLOCKS)), plane(b"\x3f" * BLOCKS))
    assert (CHANNEL.decode(frame, "delta", 7) == 127 * 0.5).all()


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    refused(with_planes(zstandard.compress(bytes(1 << 28))), "above its 1000 bytes")


def test_a_plane_that_hides_its_length_is_refused() -> None:
    coder = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    refused(with_planes(coder.compress(bytes(1 << 20)) + coder.flush()), "above its 1000 bytes")


def test_too_few_and_too_many_planes_are_refused() -> None:
    plane = zstandard.compress
    planes = [plane(bytes(SIZE)), plane(bytes(BLOCKS)), plane(bytes(BLOCKS))]
    refused(with_planes(*planes[:2]), "too few planes")
    refused(with_planes(*planes, planes[2]), "too many planes")
    refused(with_planes(plane(bytes(SIZE - 1)), *planes[1:]), "do not hold 1000 digits")


def test_a_header_of_the_wrong_types_is_refused() -> None:
    for text in (b"[]", b"{}", b'{"codec":1,"layout":"","round":1,"size":1,"options":{}}', b"\xff", b"[" * 20000):
        head = struct.pack("<4sHI", b"FDDM", 2, len(text)) + text
        refused(head + struct.pack("<I", zlib.crc32(head)), "header")


def test_a_hostile_scale_is_refused() -> None:
    plane = zstandard.compress
    frame = with_planes(plane(bytes([254]) * SIZE), plane(b"\x80" * BLOCKS), plane(b"\x7f" * BLOCKS))
    refused(frame, "not finite or too large")


def sealed(frame: bytes) -> bytes:
    """The frame with its checksums made right, as far as it can be followed: past the outer defence."""
    result = bytearray(frame)
    offset = 10 + struct.unpack_from("<I", frame, 6)[0] if len(frame) >= 10 else len(frame)
    if offset + 4 > len(frame):
        return frame
    struct.pack_into("<I", result, offset, zlib.crc32(result[:offset]))
    offset += 4
    while offset + 8 <= len(result):
        (length,) = struct.unpack_from("<I", result, offset)
        struct.pack_into("<I", result, offset + 4, zlib.crc32(result[offset + 8 : offset + 8 + length]))
        offset += 8 + length
    return bytes(result)


def mutated(frame: bytes, other: bytes, draw: random.Random) -> bytes:
    """The frame after a few accidents, or the work of somebody who knows the format."""
    changed = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed)) if changed else 0
        match draw.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del changed[at : at + draw.randint(1, 40)]
            case 2:
                changed[at:at] = draw.randbytes(draw.randint(1, 40))
            case 3:
                changed[at : at + 4] = struct.pack("<I", draw.choice([0, 1, 255, 1 << 20, 1 << 31, (1 << 32) - 1]))
            case 4:
                changed[at:] = other[draw.randrange(len(other)) :]
            case 5:
                changed[at : at + 30] = bytes(30)
    return sealed(bytes(changed)) if draw.random() < 0.7 else bytes(changed)


def test_a_hundred_thousand_mutated_frames_are_decoded_to_finite_values_or_refused_in_bounded_memory() -> None:
    draw = random.Random(0)
    channels = [make(name, size=300) for name in CODECS]
    vector = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    frames = [c.encode(vector, "delta", 7) for c in channels]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = 0
    for i in range(100_000):
        c, frame = channels[i % len(channels)], frames[i % len(channels)]
        try:
            values = c.decode(mutated(frame, draw.choice(frames), draw), "delta", 7)
        except FrameError:
            continue
        decoded += 1
        assert values.shape == (300,)
        assert np.isfinite(values).all()
    assert decoded > 1000  # the sealed ones got past the checksums
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
