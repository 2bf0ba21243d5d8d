"""Sums of which nobody learns a term: the cryptography of secure aggregation (Bonawitz et al. 2017, CCS, figure 4).

A node adds two kinds of masks to its words: one with each other node, which that one subtracts, and one of its own. It
hands shares of the secrets behind both to the others (Shamir 1979). At the end they give the server the shares of the
own mask of a node that is in the sum, or of the pairwise masks of one that is not, never both.

All masks are derived from what the nodes were asked as well. A server that asks two nodes different things gets words
whose masks do not cancel.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from feddm_flwr.vector import Words

SECRET = 32  # bytes of every key and secret
_SIGNED = "feddm secure aggregation 1"
SEALED = 2 * SECRET + 16  # bytes of two sealed shares
_HALF = SECRET // 2  # which is what the library shares at a time


class SecureSumError(ValueError):
    """A message of another is not what it must be; the text says what is wrong."""


@dataclass(frozen=True)
class Public:
    """What a node tells of itself for one sum."""

    sealing: bytes  # the public key that shares for it are encrypted with
    masking: bytes  # that of its pairwise masks
    signature: bytes = b""  # of both, by the node's own key; empty in a simulation

    def signed(self, session: str, name: str) -> bytes:
        """Returns what is signed; `session` also says of which run and training."""
        return json.dumps([_SIGNED, session, name, self.sealing.hex(), self.masking.hex()]).encode()


def new_key() -> bytes:
    """Returns a new private key, or any other secret."""
    return os.urandom(SECRET)


def public_key(private: bytes) -> bytes:
    """Returns the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Returns a node's signature."""
    return key.sign(content, ec.ECDSA(hashes.SHA384()))


def check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, content: bytes) -> None:
    """Raises a SecureSumError where the signature is not of that key and content."""
    try:
        key.verify(signature, content, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise SecureSumError("its signature is not of the key that this node knows") from None


def context(facts: Mapping[str, Any]) -> bytes:
    """Returns what masks are derived from beside secrets: the same of every node that was told the same."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def threshold(nodes: int, share: float) -> int:
    """Returns how many of so many nodes open a sum: more than that share of them."""
    return min(nodes, int(share * nodes + 1e-9) + 1)


def split(secret: bytes, names: list[str], needed: int) -> dict[str, bytes]:
    """Returns a share of a secret for each name, of which any `needed` ones tell it and fewer tell nothing."""
    halves = [Shamir.split(needed, len(names), secret[start : start + _HALF], False) for start in (0, _HALF)]
    return {name: one[1] + other[1] for name, one, other in zip(sorted(names), *halves, strict=True)}


def join(shares: Mapping[str, bytes], names: list[str], needed: int) -> bytes:
    """Returns the secret that was split among all these names, from the shares of some of them.

    Raises:
        SecureSumError: they are too few.
    """
    place = {name: number for number, name in enumerate(sorted(names), 1)}
    some = sorted((name, share) for name, share in shares.items() if len(share) == SECRET and name in place)[:needed]
    if len(some) < needed:
        raise SecureSumError(f"{len(some)} shares of a secret, {needed} are needed")
    parts = ([(place[name], share[start : start + _HALF]) for name, share in some] for start in (0, _HALF))
    return b"".join(Shamir.combine(part, False) for part in parts)


def from_hex(text: object) -> bytes:
    """Returns the bytes that another says in hexadecimal digits; none where it says something else."""
    try:
        return bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return b""


def seal(private: bytes, public: bytes, about: str, sender: str, receiver: str, content: bytes) -> bytes:
    """Returns a content that only the receiver can read, if `about` is the same for it, and nobody else can have
    written."""
    key = _agreed(private, public, b"seal")
    return AESGCM(key).encrypt(_nonce(sender), content, _label(about, sender, receiver))


def unseal(private: bytes, public: bytes, about: str, sender: str, receiver: str, sealed: bytes) -> bytes:
    """Returns the inverse of `seal`.

    Raises:
        SecureSumError: it is not what that sender sealed.
    """
    key = _agreed(private, public, b"seal")
    try:
        return AESGCM(key).decrypt(_nonce(sender), sealed, _label(about, sender, receiver))
    except (InvalidTag, ValueError):
        raise SecureSumError(f"what is said to be of {sender} cannot be opened") from None


def _nonce(sender: str) -> bytes:
    """Returns a nonce: a key of two nodes in one session seals one content each way."""
    return hashlib.sha256(sender.encode()).digest()[:12]


def _label(about: str, sender: str, receiver: str) -> bytes:
    return json.dumps([about, sender, receiver]).encode()


def _agreed(private: bytes, public: bytes, use: bytes) -> bytes:
    """Returns the key that two nodes have in common for a use.

    Raises:
        SecureSumError: the public key is none.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("a public key that is none") from None
    return _derived(secret, use)


def _derived(secret: bytes, use: bytes) -> bytes:
    return HKDF(hashes.SHA256(), SECRET, None, use).derive(secret)


def _stream(key: bytes, count: int) -> Words:
    """Returns so many words of the key stream of AES-256 in counter mode."""
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * count)), "<u8")


def own_mask(secret: bytes, about: bytes, count: int) -> Words:
    """Returns the words of a node's own mask; `about` is the `context`."""
    return _stream(_derived(secret, b"own" + about), count)


def add_pairwise_masks(words: Words, name: str, private: bytes, others: Mapping[str, bytes], about: bytes) -> None:
    """Adds the masks that a node has with the others, by the public keys of these, in place."""
    for other, public in others.items():
        mask = _stream(_agreed(private, public, b"pair" + about), len(words))
        if name < other:
            words += mask
        else:
            words -= mask


def check_key(private: bytes, public: bytes) -> None:
    """Raises a SecureSumError where a public key is none that a key can be agreed on with."""
    _agreed(private, public, b"check")


def tag(private: bytes, public: bytes, sender: str, receiver: str, content: bytes) -> bytes:
    """Returns what shows the receiver, and nobody else, that a content is the sender's."""
    key = _agreed(private, public, b"tag")
    return hmac.digest(key, json.dumps([sender, receiver]).encode() + content, "sha256")


def is_tag(found: bytes, private: bytes, public: bytes, sender: str, receiver: str, content: bytes) -> bool:
    """Tells whether it is the `tag` that the sender makes; the keys are the receiver's own and the sender's public."""
    return hmac.compare_digest(found, tag(private, public, sender, receiver, content))
