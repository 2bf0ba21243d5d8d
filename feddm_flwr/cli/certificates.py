"""Keys and certificates of a federation: a certificate authority, the SuperLink's certificate, a key per node.

Everything lies in one folder of the administrator's. The CA's key never leaves it; the SuperLink gets
`ca.crt`, `server.pem` and `server.key`, a node `ca.crt`, its own key, and for secure
sums `peers.pub`, which has the public keys of all nodes.
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from feddm_flwr.config import NODE_NAME, ConfigError
from feddm_flwr.storage.atomic import whole_file

Key = ec.EllipticCurvePrivateKey


def make(folder: Path, hosts: list[str], nodes: list[str], days: int) -> list[Path]:
    """Makes what is not there yet; returns the new files.

    The CA and the keys of nodes are kept, so that more can be added later. Where there are `hosts` (names or
    addresses that nodes reach the SuperLink by), its certificate is made anew, valid for `days`, for them, for those
    that it had, and for what the SuperLink's own processes and the gateway call it.
    A node's key is made anew once its two files are removed.

    Raises:
        ConfigError: a name is not one, or the folder holds half of a pair.
    """
    for node in nodes:
        if not re.fullmatch(NODE_NAME, node):
            raise ConfigError(f"--node {node!r} is not allowed: must be 1 to 64 letters, digits, '.', '_' or '-'")
    names = {_host(host) for host in hosts}
    if names and days > _CA_DAYS:
        raise ConfigError(f"--days {days} is not allowed: must be at most {_CA_DAYS}, as long as the CA is valid")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "nodes").mkdir(exist_ok=True, mode=0o700)
    (folder / ".gitignore").write_text("*\n")
    written: list[Path] = []
    if not _have(folder / "ca.key", folder / "ca.crt"):
        key = ec.generate_private_key(ec.SECP384R1())
        authority = _authority(key)
        written += [_secret(folder / "ca.key", key), _public(folder / "ca.crt", _pem(authority))]
    if names:
        key = ec.generate_private_key(ec.SECP256R1())
        names |= {_host(host) for host in _OWN_HOSTS} | _names_of(folder / "server.pem")
        certificate = _server(key, sorted(names, key=str), days, folder)
        written += [_secret(folder / "server.key", key), _public(folder / "server.pem", _pem(certificate))]
    for node in nodes:
        path = folder / "nodes" / node
        if _have(path, path.with_name(f"{node}.pub")):
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        written += [
            _secret(path, key, serialization.PrivateFormat.OpenSSH),
            _public(path.with_name(f"{node}.pub"), public + f" {node}\n".encode()),
        ]
    keys = b"".join(path.read_bytes() for path in sorted((folder / "nodes").glob("*.pub")))
    peers = folder / "peers.pub"
    if keys and (not peers.exists() or peers.read_bytes() != keys):
        written.append(_public(peers, keys))
    return written


_CA_DAYS = 3650
_OWN_HOSTS = ("127.0.0.1", "localhost", "superlink")


def _names_of(path: Path) -> set[x509.GeneralName]:
    """Returns the names in a certificate, none where there is no such file."""
    if not path.exists():
        return set()
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return {*certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value}


def _have(*paths: Path) -> bool:
    there = [path for path in paths if path.exists()]
    if there and len(there) < len(paths):
        missing = ", ".join(str(path) for path in paths if path not in there)
        raise ConfigError(f"{there[0]} is there but {missing} is not: put it back, or remove both to make new ones")
    return bool(there)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", host) or len(host) > 253:
            raise ConfigError(f"--host {host!r} is not allowed: must be a host name or an IP address") from None
        return x509.DNSName(host)


def _authority(key: Key) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    name = _name("feddm federation CA")
    builder = _builder(name, name, key, _CA_DAYS)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def _server(key: Key, names: list[x509.GeneralName], days: int, folder: Path) -> x509.Certificate:
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        _builder(_name("feddm SuperLink"), authority.subject, key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA384())
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of other machines are a little behind
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _secret(
    path: Path, key: Key, form: serialization.PrivateFormat = serialization.PrivateFormat.TraditionalOpenSSL
) -> Path:
    """Writes a private key that only its owner can read."""
    with whole_file(path, secret=True) as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return path


def _public(path: Path, content: bytes) -> Path:
    with whole_file(path) as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)
    return path
