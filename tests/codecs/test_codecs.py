"""Laws of the codecs and of the channel that uses them."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from feddm_flwr.codecs import base, floating, framing, grid, registry, sparse
from feddm_flwr.config import CODECS, parse
from feddm_flwr.exchange.channel import Channel, channel
from feddm_flwr.vector import Vector

Array = np.ndarray
OPTIONS = {"block_size": 64, "clip_search": 0, "stochastic": 0, "per_million": 50_000, "bits": 2, "ratio": 40}
EVERY = [registry.make(name, **OPTIONS) for name in CODECS] + [
    grid.Int8(8, clip_search=1),
    grid.Int4(64, clip_search=1),
    grid.Int3(256, stochastic=1),
    grid.Sign(64, stochastic=1),
    sparse.TopK(per_million=300_000, bits=4),
    sparse.TopK(per_million=1_000_000, bits=2),
    sparse.Budget(ratio=6),
]
EVEN_GRIDS = [grid.Int8, grid.Int4, grid.Int3]
every = pytest.mark.every_codec


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The laws of `every` codec are those of extensions too, which `--codec` names."""
    if metafunc.definition.get_closest_marker("every_codec"):
        own = [registry.make(name, **OPTIONS) for name in metafunc.config.getoption("--codec")]
        metafunc.parametrize("c", [*EVERY, *own], ids=repr)


vectors = arrays(np.float32, st.integers(0, 700), elements=st.floats(-1e6, 1e6, width=32))


def decoded(c: base.Codec, planes: list[bytes], size: int) -> torch.Tensor:
    """The values of one chunk; what is not written stays NaN."""
    values = torch.full((size,), torch.nan)
    c.decode(planes, values)
    return values


def round_trip(c: base.Codec, values: Array, seed: int = 0) -> Array:
    """Float64 of what comes out of the planes of one chunk."""
    vector = torch.from_numpy(values.astype(np.float32))
    planes = c.encode(vector, c.init(vector, seed))
    limits = c.limits(len(values))
    assert len(planes) == len(limits)
    assert all(len(plane) <= limit for plane, limit in zip(planes, limits, strict=True))
    out = decoded(c, planes, len(values))
    assert bool(out.isfinite().all())
    return out.double().numpy()


def blocks(values: Array, size: int) -> list[Array]:
    return [values[i : i + size].astype(np.float64) for i in range(0, len(values), size)]


@pytest.mark.parametrize("name", ["none", "int8", "int4", "budget"])
def test_coding_of_several_chunks_is_encoding_and_decoding_in_one(name: str) -> None:
    size = 2 * framing.CHUNK + 5
    c, vector = make_channel(name, size), uneven(size)
    frame, coded = c.code(vector, "delta", 3, seed=1)
    assert frame == c.encode(vector, "delta", 3, seed=1)
    assert coded.tobytes() == c.decode(frame, "delta", 3).tobytes()
    assert np.concatenate([*c.decode_chunks(frame, "delta", 3)]).tobytes() == coded.tobytes()
    with pytest.raises(framing.FrameError, match="chunk 2 is truncated"):
        c.decode(frame[:-1], "delta", 3)


def test_the_configuration_offers_every_codec() -> None:
    assert tuple(registry.REGISTRY) == CODECS


@given(vectors)
def test_none_is_the_identity(values: Array) -> None:
    assert round_trip(floating.Identity(), values).astype(np.float32).tobytes() == values.tobytes()


@given(vectors)
def test_bf16_and_fp16_keep_their_precision(values: Array) -> None:
    assert (np.abs(round_trip(floating.BFloat16(), values) - values) <= 2.0**-8 * np.abs(values) + 1e-38).all()
    bound = np.maximum(2.0**-11 * np.abs(values), 2.0**-38 * np.abs(values).max(initial=0)) + 1e-44
    assert (np.abs(round_trip(floating.Float16(), values) - values) <= bound).all()


@given(
    vectors,
    st.sampled_from([8, 64, 256]),
    st.sampled_from(EVEN_GRIDS),
    st.booleans(),
)
def test_the_error_on_a_grid_is_half_a_step_or_a_step_where_rounding_is_random(
    values: Array, size: int, kind: type[grid.Grid], stochastic: bool
) -> None:
    decoded = round_trip(kind(size, stochastic=int(stochastic)), values)
    for part, result in zip(blocks(values, size), blocks(decoded, size), strict=True):
        # A bfloat16 step is at most 2^-7 too large; one below the smallest normal number is 0.
        step = np.abs(part).max() * 2 / (kind.levels - 1) * (1 + 2**-7)
        bound = step * (1 if stochastic else 0.5) * (1 + 1e-4) if step > 4e-38 else kind.levels * 4e-38
        assert np.abs(result - part).max() <= bound


@given(vectors)
def test_what_int2_and_sign_lose_is_what_their_fit_says(values: Array) -> None:
    """|v - decoded|^2 = |v|^2 - |decoded|^2 for a least-squares fit, up to the step's rounding."""
    for c in (grid.Int2(64), grid.Sign(64)):
        for part, result in zip(blocks(values, 64), blocks(round_trip(c, values), 64), strict=True):
            if np.abs(part).max() > 1e-30:
                expected = np.square(part).sum() - np.square(result).sum()
                assert np.square(part - result).sum() == pytest.approx(expected, abs=0.02 * np.square(part).sum())


@every
@given(values=vectors)
@settings(max_examples=50)
def test_no_codec_adds_to_the_energy_of_a_block_by_more_than_rounding(c: base.Codec, values: Array) -> None:
    """The contraction that error feedback needs: |v - decoded| <= |v| (Karimireddy et al. 2019)."""
    if getattr(c, "stochastic", 0):
        return  # unbiased instead
    lost = np.linalg.norm(round_trip(c, values) - values)
    assert lost <= np.linalg.norm(values.astype(np.float64)) * (1 + 1e-2) + 1e-35


@pytest.mark.parametrize("kind", [grid.Int8, grid.Int4, grid.Int3, grid.Int2, grid.Sign])
def test_random_rounding_is_unbiased(kind: type[grid.Grid]) -> None:
    values = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    results = np.stack([round_trip(kind(64, stochastic=1), values, seed) for seed in range(2000)])
    deviation = results.std(0) / np.sqrt(len(results))
    assert (np.abs(results.mean(0) - values) <= 5 * deviation + 2**-16).all()
    assert round_trip(kind(64, stochastic=1), values, 7).tobytes() == results[7].tobytes()


@given(vectors, st.sampled_from(EVEN_GRIDS))
def test_clip_search_never_raises_the_squared_error(values: Array, kind: type[grid.Grid]) -> None:
    plain, searched = (np.square(round_trip(kind(64, clip_search=c), values) - values).sum() for c in (0, 1))
    assert searched <= plain * (1 + 1e-4) + 1e-30


def test_clip_search_helps_heavy_tails() -> None:
    """In long blocks; at 8 bits a block of 256 is best left unclipped."""
    values = np.random.default_rng(0).standard_t(3, 65536 * 4)
    for kind in EVEN_GRIDS:
        plain, searched = (np.square(round_trip(kind(65536, c), values) - values).sum() for c in (0, 1))
        assert searched < 0.8 * plain


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 1])
def test_topk_sends_the_largest(share: float) -> None:
    values = np.random.default_rng(0).standard_normal(10_001)
    decoded = round_trip(sparse.TopK(per_million=round(1e6 * share), bits=4), values)
    sent = decoded != 0
    assert sent.sum() == np.ceil(10_001 * share)
    assert np.abs(values[~sent]).max(initial=0) <= np.abs(values[sent]).min()
    assert (np.sign(decoded[sent]) == np.sign(values[sent])).all()


def uneven(size: int) -> Array:
    """Heavy tails, and parts of the vector that vary up to 30 times as much as others."""
    random = np.random.default_rng(0)
    scale = np.repeat(np.exp(random.uniform(-1.7, 1.7, -(-size // 1000))), 1000)[:size]
    return (random.standard_t(4, size) * scale * 1e-3).astype(np.float32)


def coded_size(c: base.Codec, values: Array) -> int:
    vector = torch.from_numpy(values.astype(np.float32))
    state = c.init(vector, 0)
    return sum(len(framing.compress(c.encode(part, state))) for part in vector.split(framing.CHUNK))


@pytest.mark.parametrize("ratio", [6, 20, 80, 300])
@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_budget_spends_its_budget_and_no_more(ratio: int, size: int) -> None:
    size_coded = coded_size(sparse.Budget(ratio), uneven(size))
    assert 0.95 <= size_coded / (4 * size / ratio) <= 1.02


def test_budget_keeps_to_its_budget_where_many_values_are_nearly_the_largest() -> None:
    """What error feedback left over is cut off at the size from which on values are sent."""
    values = np.random.default_rng(0).uniform(-1, 1, 200_000)
    assert 0.5 <= coded_size(sparse.Budget(82), values) / (4 * len(values) / 82) <= 1.02


def test_budget_loses_less_than_the_fixed_codecs_at_the_same_size() -> None:
    values = uneven(1_000_000)
    for fixed in (grid.Int4(), grid.Int3(), grid.Int2(), grid.Sign(), sparse.TopK()):
        budget = sparse.Budget(round(4 * len(values) / coded_size(fixed, values)))
        loss, adaptive_loss = (
            np.square(round_trip(c, values[:200_000]) - values[:200_000]).sum() for c in (fixed, budget)
        )
        assert adaptive_loss < loss, fixed


def test_budget_gives_bits_where_the_vector_varies() -> None:
    random = np.random.default_rng(0)
    quiet, loud = random.standard_normal(100_000) * 1e-5, random.standard_normal(100_000) * 1e-3
    decoded = round_trip(sparse.Budget(ratio=40), np.concatenate([quiet, loud]))
    assert (decoded[:100_000] == 0).all()
    assert (decoded[100_000:] != 0).mean() > 0.1


@every
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0),
        np.ones(1),
        np.zeros(300),
        np.full(300, -7.5),
        np.array([1e-45, -1e-40, 1e-38, 3e-38] * 9),
        np.array([1e29, 1e-37, -1e29, 0] * 70),
        np.linspace(-1, 1, 257),
        np.full(300, 9.9e29),
    ],
    ids=["empty", "one", "zeros", "constant", "denormal", "huge range", "odd", "largest"],
)
def test_odd_vectors_survive(c: base.Codec, values: Array) -> None:
    decoded = round_trip(c, values)
    assert np.abs(decoded - values).max(initial=0) <= 2.02 * np.abs(values).max(initial=0) + 1e-36


@pytest.mark.parametrize("name", sorted({*CODECS} - {"topk", "budget"}))
def test_a_constant_is_kept(name: str) -> None:
    decoded = round_trip(registry.make(name, **OPTIONS), np.full(300, -0.37))
    assert decoded == pytest.approx(-0.37 * np.ones(300), rel=0.01)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e30])
def test_not_finite_or_too_large_is_refused(c: base.Codec, bad: float) -> None:
    values = torch.ones(100)
    values[37] = bad
    with pytest.raises(ValueError, match="cannot be encoded"):
        c.init(values, 0)


@every
@given(data=st.data())
@settings(max_examples=200)
def test_any_planes_decode_to_finite_values_or_are_refused(c: base.Codec, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 300))
    planes = [
        data.draw(st.binary(min_size=length, max_size=length))
        for length in (data.draw(st.sampled_from([limit, limit, limit // 3, 0])) for limit in c.limits(size))
    ]
    with contextlib.suppress(framing.FrameError):
        assert bool(decoded(c, planes, size).isfinite().all())


@every
@pytest.mark.parametrize("place", range(9))
def test_a_damaged_plane_is_refused_or_decodes_to_finite_values(c: base.Codec, place: int) -> None:
    values = torch.from_numpy(uneven(1000))
    planes = c.encode(values, c.init(values, 0))
    if place < len(planes):
        for damaged in (planes[place][:-1], planes[place] + b"\1", b"", bytes(255 - b for b in planes[place])):
            with contextlib.suppress(framing.FrameError):
                assert bool(decoded(c, [*planes[:place], damaged, *planes[place + 1 :]], 1000).isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_a_gpu_encodes_as_well_and_what_it_encodes_decodes_to_the_same_bits(c: base.Codec) -> None:
    values = torch.from_numpy(uneven(100_000))
    here, there = (c.encode(v, c.init(v, 0)) for v in (values, values.cuda()))
    errors = [float((decoded(c, planes, len(values)) - values).norm()) for planes in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def make_channel(name: str, size: int, **keys: object) -> Channel:
    uplink = {"codec.uplink": name, "codec.downlink": name} if name != "none" else {}
    keys = {"strategy": "feddm-quant" if uplink else "feddm-vanilla", **uplink, **keys}
    return channel(name, parse(keys).codec, "f" * 32, size)


#: The most that is lost of normally distributed values, as a share of their norm, and the least ratio.
PROMISES = {
    "none": (0, 1.15),
    "fp16": (0.0003, 2.2),
    "bf16": (0.002, 2.8),
    "int8": (0.0072, 4.1),
    "int4": (0.13, 9),
    "int3": (0.3, 14),
    "int2": (0.46, 22),
    "sign": (0.61, 31),
    "topk": (0.86, 90),
    "budget": (0.85, 79),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_channel_decodes_what_it_encodes_over_several_chunks(name: str) -> None:
    vector = (np.random.default_rng(1).standard_normal(2 * framing.CHUNK + 12345) * 0.05).astype(np.float32)
    c = make_channel(name, len(vector))
    frame = c.encode(vector, "delta", 3)
    assert frame == c.encode(vector, "delta", 3)
    lost, ratio = PROMISES[name]
    assert np.linalg.norm(c.decode(frame, "delta", 3) - vector) <= lost * np.linalg.norm(vector)
    assert 4 * len(vector) / len(frame) >= ratio


def feed(c: Channel, deltas: list[Vector], decay: float = 1.0) -> tuple[Vector, Vector]:
    """Sum of what arrives under error feedback, and the last residual."""
    residual = arrived = np.zeros(c.size, np.float32)
    for number, delta in enumerate(deltas):
        wanted = delta + np.float32(decay) * residual
        decoded = c.decode(c.encode(wanted, "delta", number), "delta", number)
        residual, arrived = wanted - decoded, arrived + decoded
    return arrived, residual


@pytest.mark.parametrize(
    ("name", "at_random"),
    [(name, False) for name in CODECS if name != "none"] + [(name, True) for name in ("int8", "int4", "int3")],
)
def test_error_feedback_loses_nothing_but_the_last_residual_which_stops_growing(name: str, at_random: bool) -> None:
    random = np.random.default_rng(0)
    deltas = [random.standard_normal(20_000).astype(np.float32) for _ in range(40)]
    c = make_channel(name, 20_000, **{"codec.stochastic-rounding": at_random})
    arrived, residual = feed(c, deltas)
    np.testing.assert_allclose(arrived + residual, np.sum(deltas, 0), atol=1e-3)
    assert np.linalg.norm(residual) < 1.1 * np.linalg.norm(feed(c, deltas[:20])[1])  # else sqrt(2) at least


def test_chunks_cover_the_vector() -> None:
    for size in (0, 1, framing.CHUNK - 1, framing.CHUNK, framing.CHUNK + 1, 5 * framing.CHUNK):
        sizes = framing.chunk_sizes(size)
        assert sum(sizes) == size
        assert all(a == framing.CHUNK for a, _ in pairwise(sizes))
