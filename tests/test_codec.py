"""Laws of the codecs and of the channel that uses them."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from feddm_flwr import codec, wire
from feddm_flwr.config import KEYS
from feddm_flwr.exchange import Channel, channel

CODECS = [codec.Identity(), codec.Int8(), codec.Int8(block_size=8, clip_search=0)]
vectors = arrays(np.float32, st.integers(0, 700), elements=st.floats(-1e6, 1e6, width=32))


def round_trip(c: codec.Codec, values: codec.Values) -> codec.Values:
    raw, _ = c.encode(values, c.init(len(values)))
    assert len(raw) == c.raw_bytes(len(values))
    decoded = c.decode(raw, len(values))
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    return decoded


def test_the_registry_has_what_the_configuration_offers() -> None:
    assert set(KEYS["codec.uplink"].choices) == set(KEYS["codec.downlink"].choices) == set(codec.REGISTRY)


@given(vectors)
def test_none_is_the_identity(values: codec.Values) -> None:
    assert round_trip(codec.Identity(), values).tobytes() == values.tobytes()


@given(vectors, st.sampled_from([8, 64, 256]))
def test_int8_error_is_half_a_step(values: codec.Values, block: int) -> None:
    decoded = round_trip(codec.Int8(block, clip_search=0), values)
    for start in range(0, len(values), block):
        part = values[start : start + block].astype(np.float64)
        # A bfloat16 scale is at most 2^-7 too large; a step below the smallest normal number is 0.
        step = np.abs(part).max() / 127 * (1 + 2**-7)
        bound = step / 2 * (1 + 1e-5) if step > 2e-38 else 127 * 2e-38
        assert np.abs(decoded[start : start + block] - part).max() <= bound


@given(vectors)
def test_clip_search_never_raises_the_squared_error(values: codec.Values) -> None:
    plain, searched = (
        np.square(round_trip(codec.Int8(64, clip_search=c), values).astype(np.float64) - values).sum() for c in (0, 1)
    )
    assert searched <= plain * (1 + 1e-4) + 1e-30


def test_clip_search_helps_heavy_tails() -> None:
    """In long blocks; at 8 bits a block of 256 is best left unclipped."""
    values = np.random.default_rng(0).standard_t(3, 65536 * 4).astype(np.float32)
    plain, searched = (np.square(round_trip(codec.Int8(65536, c), values) - values).sum() for c in (0, 1))
    assert searched < 0.8 * plain


@pytest.mark.parametrize("c", CODECS, ids=repr)
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0),
        np.zeros(300),
        np.full(300, -7.5),
        np.array([1e-45, -1e-40, 1e-38, 3e-38] * 9),
        np.array([1e37, 1e-37, -1e37, 0] * 70),
        np.linspace(-1, 1, 257),
    ],
    ids=["empty", "zeros", "constant", "denormal", "huge range", "odd"],
)
def test_odd_vectors_survive(c: codec.Codec, values: codec.Values) -> None:
    values = values.astype(np.float32)
    decoded = round_trip(c, values)
    largest = np.abs(values).max(initial=0)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - values).max(initial=0) <= largest / 127 * 1.01 + 1e-36


@pytest.mark.parametrize("c", CODECS, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(c: codec.Codec, bad: float) -> None:
    values = np.ones(100, np.float32)
    values[37] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        c.encode(values, None)


def test_int8_refuses_what_would_overflow() -> None:
    with pytest.raises(ValueError, match="cannot be encoded as int8"):
        codec.Int8().encode(np.array([3e38], np.float32), None)


@pytest.mark.parametrize("c", CODECS, ids=repr)
@given(noise=st.binary(min_size=400, max_size=400))
@settings(max_examples=300)
def test_any_bytes_decode_to_finite_values_or_are_refused(c: codec.Codec, noise: bytes) -> None:
    size = max(n for n in range(400) if c.raw_bytes(n) <= 400)
    with contextlib.suppress(wire.FrameError):
        assert np.isfinite(c.decode(noise[: c.raw_bytes(size)], size)).all()


def weights(size: int) -> codec.Values:
    return (np.random.default_rng(1).standard_normal(size) * 0.05).astype(np.float32)


def make_channel(name: str, size: int) -> Channel:
    return channel(name, 256, True, "f" * 32, size)


@pytest.mark.parametrize("name", codec.REGISTRY)
def test_a_channel_decodes_what_it_encodes_over_several_chunks(name: str) -> None:
    vector = weights(2 * wire.CHUNK + 12345)
    c = make_channel(name, len(vector))
    decoded = c.decode(c.encode(vector, 3), 3)
    assert np.linalg.norm(decoded - vector) <= (0 if name == "none" else 0.01) * np.linalg.norm(vector)


@pytest.mark.parametrize("name", codec.REGISTRY)
def test_coding_decoded_values_again_changes_little_and_encoding_is_deterministic(name: str) -> None:
    vector = weights(100_000)
    c = make_channel(name, len(vector))
    frame = c.encode(vector, 1)
    assert frame == c.encode(vector, 1)
    once = c.decode(frame, 1)
    twice = c.decode(c.encode(once, 1), 1)
    assert np.linalg.norm(twice - once) <= 0.01 * np.linalg.norm(once)


def test_int8_frames_are_at_least_3_9_times_smaller() -> None:
    vector = weights(1_000_000)
    frame = make_channel("int8", len(vector)).encode(vector, 1)
    assert 4 * len(vector) / len(frame) >= 3.9


def test_chunks_cover_the_vector() -> None:
    for size in (0, 1, wire.CHUNK - 1, wire.CHUNK, wire.CHUNK + 1, 5 * wire.CHUNK):
        sizes = wire.chunk_sizes(size)
        assert sum(sizes) == size
        assert all(a == wire.CHUNK for a, _ in pairwise(sizes))
