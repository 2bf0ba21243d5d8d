"""What `feddm certs` makes fits together, keeps what is there, and is readable by the right people only."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from feddm_flwr.cli.certificates import make
from feddm_flwr.config import ConfigError


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(folder: Path, ca: Path, host: str) -> None:
    policy = PolicyBuilder().store(Store([certificate(ca / "ca.crt")]))
    policy.build_server_verifier(x509.DNSName(host)).verify(certificate(folder / "server.pem"), [])


def test_the_server_is_who_the_nodes_and_its_own_processes_expect(tmp_path: Path) -> None:
    make(tmp_path / "a", ["federation.example.org", "10.1.2.3"], ["north"], 30)
    make(tmp_path / "b", ["federation.example.org"], [], 30)
    for host in ("federation.example.org", "localhost", "superlink"):
        verify(tmp_path / "a", tmp_path / "a", host)
    names = certificate(tmp_path / "a" / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert {*map(str, names.value.get_values_for_type(x509.IPAddress))} == {"10.1.2.3", "127.0.0.1"}
    with pytest.raises(VerificationError):
        verify(tmp_path / "a", tmp_path / "a", "elsewhere.example.org")
    with pytest.raises(VerificationError):
        verify(tmp_path / "a", tmp_path / "b", "localhost")


def test_what_is_there_is_kept_and_more_is_added(tmp_path: Path) -> None:
    make(tmp_path, ["one.example.org"], ["north"], 30)
    kept = {
        path: path.read_bytes() for path in (tmp_path / "ca.key", tmp_path / "ca.crt", tmp_path / "nodes" / "north")
    }
    written = make(tmp_path, ["two.example.org"], ["north", "south"], 30)
    assert {path.name for path in written} == {"server.key", "server.pem", "south", "south.pub", "peers.pub"}
    assert {path: path.read_bytes() for path in kept} == kept
    for host in ("one.example.org", "two.example.org"):
        verify(tmp_path, tmp_path, host)
    assert make(tmp_path, [], ["north", "south"], 30) == []
    assert [line.split()[-1] for line in (tmp_path / "peers.pub").read_text().splitlines()] == ["north", "south"]
    (tmp_path / "nodes" / "north.pub").unlink()
    with pytest.raises(ConfigError, match=r"north is there but .*north\.pub is not"):
        make(tmp_path, [], ["north"], 30)


def test_private_keys_are_private_and_belong_to_the_public_ones(tmp_path: Path) -> None:
    make(tmp_path / "keys", ["localhost"], ["north"], 30)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "keys").rglob("*"):
        if path.is_file() and path.name != ".gitignore":
            assert path.stat().st_mode & 0o777 == (0o644 if path.suffix in (".crt", ".pem", ".pub") else 0o600), path
    private = load_ssh_private_key((tmp_path / "keys" / "nodes" / "north").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "keys" / "nodes" / "north.pub").read_bytes())
    assert private.public_key() == public
