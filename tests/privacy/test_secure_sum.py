"""The cryptography of secure sums: masks cancel exactly, nothing else can be read, and shares tell only together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from feddm_flwr.codecs.sums import pack, per_word, unpack, words_of
from feddm_flwr.privacy.secure_sum import (
    Public,
    SecureSumError,
    add_pairwise_masks,
    check_signature,
    context,
    join,
    new_key,
    own_mask,
    public_key,
    seal,
    sign,
    split,
    threshold,
    unseal,
)
from feddm_flwr.vector import Words

ABOUT = context({"round": 1})


class Node:
    """Keys and a secret of one node."""

    def __init__(self, name: str) -> None:
        self.name, self.private, self.own = name, new_key(), new_key()
        self.public = public_key(self.private)

    def masked(self, words: Words, nodes: list[Node], about: bytes = ABOUT) -> Words:
        found = words + own_mask(self.own, about, len(words))
        publics = {n.name: n.public for n in nodes if n is not self}
        add_pairwise_masks(found, self.name, self.private, publics, about)
        return found


def summed(nodes: list[Node], survivors: list[Node], masked: dict[str, Words]) -> Words:
    """What a server makes of the masked words of some, with the secrets that the nodes would tell it of."""
    total = sum((masked[n.name] for n in survivors), np.zeros_like(masked[survivors[0].name]))
    publics = {n.name: n.public for n in survivors}
    for one in nodes:
        if one in survivors:
            total -= own_mask(one.own, ABOUT, len(total))
        else:
            add_pairwise_masks(total, one.name, one.private, publics, ABOUT)
    return total


@given(base=st.integers(2, 3000), count=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_a_sum_of_packed_words_is_the_packed_sum(base: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    terms = [random.integers(0, 3, count) for _ in range((base - 1) // 2)][:20]
    packed = sum((pack(term, base) for term in terms), np.zeros(words_of(count, base), np.uint64))
    assert unpack(packed, base, count).tolist() == np.sum([*terms, np.zeros(count, int)], 0).tolist()
    assert base ** per_word(base) <= 2**64 < base ** (per_word(base) + 1)


def test_words_that_are_no_sum_of_digits_are_found_out() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no sum"):
        unpack(random.integers(0, 2**64, 100, np.uint64), 21, 1400)


@pytest.mark.parametrize("lost", [(), (0,), (4,), (1, 3)])
def test_the_masks_of_all_nodes_cancel_exactly_whoever_is_left(lost: tuple[int, ...]) -> None:
    nodes = [Node(f"node-{i}") for i in range(5)]
    random = np.random.default_rng(1)
    plain = {n.name: random.integers(0, 2**64, 1001, np.uint64) for n in nodes}
    masked = {n.name: n.masked(plain[n.name], nodes) for n in nodes}
    survivors = [n for i, n in enumerate(nodes) if i not in lost]
    expected = sum((plain[n.name] for n in survivors), np.zeros(1001, np.uint64))
    assert summed(nodes, survivors, masked).tolist() == expected.tolist()


def test_what_a_node_sends_is_uniform_and_tells_nothing_of_its_words() -> None:
    nodes = [Node(f"node-{i}") for i in range(3)]
    zeros, large = np.zeros(1_000_000, np.uint64), np.full(1_000_000, 2**63 + 12345, np.uint64)
    for words in (zeros, large):
        masked = nodes[0].masked(words, nodes)
        for shift in (0, 28, 56):  # bytes of the words
            counts = np.bincount((masked >> np.uint64(shift) & np.uint64(255)).astype(np.int64), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-6
    term = np.random.default_rng(2).integers(0, 21, 1_000_000)
    masked = nodes[0].masked(term.astype(np.uint64), nodes)
    assert abs(np.corrcoef(term, masked.astype(np.float64))[0, 1]) < 5e-3


def test_a_late_reply_of_a_node_whose_pairwise_masks_were_told_stays_masked() -> None:
    nodes = [Node(f"node-{i}") for i in range(4)]
    late = nodes[0].masked(np.zeros(100_000, np.uint64), nodes)
    publics = {n.name: n.public for n in nodes[1:]}
    pairwise = np.zeros_like(late)
    add_pairwise_masks(pairwise, nodes[0].name, nodes[0].private, publics, ABOUT)
    late -= pairwise
    counts = np.bincount((late >> np.uint64(56)).astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-6


def test_masks_of_nodes_that_were_asked_different_things_do_not_cancel() -> None:
    nodes = [Node(f"node-{i}") for i in range(3)]
    words = np.zeros(100, np.uint64)
    masked = {n.name: n.masked(words, nodes) for n in nodes}
    masked[nodes[0].name] = nodes[0].masked(words, nodes, context({"round": 1, "scales": "others"}))
    assert summed(nodes, nodes, masked).any()


def test_enough_shares_tell_the_secret_whichever_they_are_and_fewer_do_not() -> None:
    names, secret = ["a", "b", "c", "d", "e"], new_key()
    shares = split(secret, names, 3)
    for some in itertools.combinations(names, 3):
        assert join({name: shares[name] for name in some}, names, 3) == secret
    assert join(shares, names, 3) == secret
    with pytest.raises(SecureSumError, match="2 shares"):
        join({name: shares[name] for name in "ab"}, names, 3)
    assert join({name: shares[name] for name in "ab"}, names, 2) != secret
    with pytest.raises(SecureSumError):
        join({name: shares[name][:7] for name in names}, names, 3)


@pytest.mark.parametrize(
    ("nodes", "share", "needed"), [(3, 0.5, 2), (4, 0.5, 3), (10, 0.5, 6), (10, 2 / 3, 7), (3, 0.99, 3), (5, 0.6, 4)]
)
def test_more_than_the_share_of_the_nodes_open_a_sum(nodes: int, share: float, needed: int) -> None:
    assert threshold(nodes, share) == needed


def test_what_is_sealed_only_its_receiver_opens_and_only_as_it_was_meant() -> None:
    north, south, east = (Node(name) for name in ("north", "south", "east"))
    sealed = seal(north.private, south.public, "1", "north", "south", b"secret")
    assert unseal(south.private, north.public, "1", "north", "south", sealed) == b"secret"
    for private, public, session, sender, receiver, content in (
        (east.private, north.public, "1", "north", "south", sealed),
        (south.private, east.public, "1", "north", "south", sealed),
        (south.private, north.public, "2", "north", "south", sealed),
        (south.private, north.public, "1", "east", "south", sealed),
        (south.private, north.public, "1", "north", "south", sealed[:-1] + b"x"),
        (south.private, north.public, "1", "north", "south", b""),
    ):
        with pytest.raises(SecureSumError, match="cannot be opened"):
            unseal(private, public, session, sender, receiver, content)
    with pytest.raises(SecureSumError, match="public key"):
        seal(north.private, bytes(32), "1", "north", "south", b"secret")


def test_a_signature_is_of_one_key_one_session_and_one_name() -> None:
    key, other = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    public = Public(b"1" * 32, b"2" * 32)
    signature = sign(key, public.signed("session", "north"))
    check_signature(key.public_key(), signature, public.signed("session", "north"))
    for verifier, content in (
        (other, public.signed("session", "north")),
        (key, public.signed("another", "north")),
        (key, public.signed("session", "south")),
        (key, Public(b"1" * 32, b"3" * 32).signed("session", "north")),
    ):
        with pytest.raises(SecureSumError, match="signature"):
            check_signature(verifier.public_key(), signature, content)
