"""Who is who in a deployment: a certificate authority, the server's certificate, and a key pair for each client.

The server proves itself by a certificate that the federation's own authority signed, and clients hold `ca.crt`. A client proves itself by
signing with a key whose public half is registered at the server: nobody signs it, so it is made where it is used and only the `.pub`
travels. `ca.key` is not encrypted: `renew` would need the password, and whoever reads it as its owner could read the password, too.
Only `renew` needs it: it can lie on a stick in a drawer.
"""

import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"
CA_DAYS = 3650  # of the authority: a new one has to be carried to every client by hand
DAYS = 365  # of the server's certificate, which is renewed on the server alone
SOON = 30  # days before its end that a certificate is warned of: time to find an hour between two runs
BACKDATED = timedelta(hours=1)  # certificates begin before they are made: clocks of clients may be behind
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # in every certificate: `flwr` on the server's own host connects by these
NEW_AUTHORITY = "make a new authority with `fedpeft certs init --force` and give every client its ca.crt"
HEADER = b"-----BEGIN OPENSSH PRIVATE KEY-----"
PRIVATE, PUBLIC = 0o600, 0o644


def create(folder: Path, hosts: Sequence[str], *, now: datetime, days: int = DAYS, force: bool = False) -> None:
    """Writes an authority and a certificate of it for a server that clients find under `hosts`, names or addresses."""
    names = subject_names(hosts)
    ends = _end(now, days, now + timedelta(days=CA_DAYS))
    _check_free(
        [folder / name for name in (CA, CA_KEY, SERVER, SERVER_KEY)], force,
        "`fedpeft certs renew` makes a new certificate under the authority that clients trust; --force makes a new authority too, "
        "whose ca.crt every client then needs",
    )  # fmt: skip
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = _authority(ca_key, now)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / CA_KEY, _pem(ca_key), PRIVATE)
    _write(folder / CA, ca.public_bytes(Encoding.PEM), PUBLIC)
    _write(folder / SERVER_KEY, _pem(key), PRIVATE)
    _write(folder / SERVER, _server(key, names, ca, ca_key, now, ends).public_bytes(Encoding.PEM), PUBLIC)


def renew(folder: Path, hosts: Sequence[str] = (), *, now: datetime, days: int = DAYS) -> None:
    """Writes a new server certificate, for the same hosts unless others are given. Clients need nothing new.

    The server's key stays, so that one file changes and no moment is bad; where there is none, a new one is made.
    """
    ca, ca_key = read_certificate(folder / CA), read_private_key(folder / CA_KEY)
    if ca.public_key() != ca_key.public_key():
        raise ValueError(
            f"{folder / CA_KEY} is not the key of {folder / CA}: clients would refuse what it signs; take both from one backup"
        )
    if ca.not_valid_after_utc <= now:
        raise ValueError(f"{folder / CA} ended on {ca.not_valid_after_utc:%Y-%m-%d}, what it signs is refused: {NEW_AUTHORITY}")
    if not hosts and not (folder / SERVER).exists():
        raise ValueError(f"{folder / SERVER} is not there to take the hosts from: name them with --host")
    names = subject_names(hosts) if hosts else list(_alternative_names(read_certificate(folder / SERVER)))
    ends = _end(now, days, ca.not_valid_after_utc)
    if (folder / SERVER_KEY).exists():
        key = read_private_key(folder / SERVER_KEY)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        _write(folder / SERVER_KEY, _pem(key), PRIVATE)
    _write(folder / SERVER, _server(key, names, ca, ca_key, now, ends).public_bytes(Encoding.PEM), PUBLIC)


def make_client(folder: Path, name: str, *, force: bool = False) -> None:
    """Writes a client's key pair as OpenSSH has them: the private one in `name`, the public one in `name.pub`."""
    private, public = folder / _client_name(name), folder / f"{name}.pub"
    _check_free([private, public], force, "--force replaces them, and the new key has to be registered before the client is let in again")
    key = ec.generate_private_key(ec.SECP384R1())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), PRIVATE)
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode(), PUBLIC)


def subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The hosts as a certificate names them, loopback's names at the end."""
    if not hosts:
        raise ValueError("a server certificate needs a host: the name or the address that clients connect to, such as fl.example.org")
    return [_subject_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that the certificate holds for."""
    return tuple(str(name.value) for name in _alternative_names(certificate))


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in the file; one that has ended is read as well."""
    try:
        return x509.load_pem_x509_certificate(_bytes(path))
    except ValueError as fault:
        raise ValueError(f"{path} holds no certificate in PEM: {fault}; take it from a backup or make it again") from fault


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in the file, PEM or OpenSSH, if none but its owner can read it."""
    content = _bytes(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(
            f"{path} can be read by others than its owner (mode {stat.S_IMODE(path.stat().st_mode):03o}): `chmod 600 {path}`, and make "
            "a new key if somebody may have read it"
        )
    try:
        key = load_ssh_private_key(content, None) if content.startswith(HEADER) else load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:  # TypeError: it is encrypted
        raise ValueError(f"{path} holds no private key that can be read without a password: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds a {type(key).__name__}, Flower needs a key on a NIST curve: make one with `fedpeft certs`")
    return key


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key, in OpenSSH's format and on a NIST curve, as Flower registers it."""
    content = _bytes(path)
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as fault:
        raise ValueError(f"{path} holds no public key in OpenSSH's format: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{path} holds a {type(key).__name__}, Flower needs a key on a NIST curve: make one with `fedpeft certs client`")
    return key


def faults_of(path: Path, now: datetime) -> list[str]:
    """What is wrong with one of our files, and what to do: unreadable, readable by others, ended or ending, or not of its fellows."""
    try:
        if path.suffix == ".pub":
            redo = "`fedpeft certs client --force` makes a new pair"
            return _strangers(path, read_public_key(path), path.with_suffix(""), redo)
        if path.name in (CA, SERVER):
            return certificate_faults(path, now) + ending(path, now)
        read_private_key(path)
    except ValueError as fault:
        return [str(fault)]
    return []


def certificate_faults(path: Path, now: datetime) -> list[str]:
    """What is wrong with a certificate: that it has ended, that its key or its authority, which lie beside it, are others."""
    certificate = read_certificate(path)
    ends, authority = certificate.not_valid_after_utc, path.with_name(CA)
    signs_itself = certificate.issuer == certificate.subject
    redo = _redo(certificate)
    found = _strangers(path, certificate.public_key(), path.with_suffix(".key"), redo)
    if ends <= now:
        found.append(f"{path} ended on {ends:%Y-%m-%d}, connections are refused: {redo}")
    if not signs_itself and authority.exists():
        try:
            certificate.verify_directly_issued_by(read_certificate(authority))
        except (ValueError, TypeError, InvalidSignature):
            found.append(f"{path} was not signed by {authority}: clients that hold this ca.crt refuse the server; {redo}")
    return found


def ending(path: Path, now: datetime) -> list[str]:
    """That a certificate which still holds will end soon."""
    certificate = read_certificate(path)
    ends = certificate.not_valid_after_utc
    if not now < ends < now + timedelta(days=SOON):
        return []
    return [f"{path} ends in {(ends - now).days} days, on {ends:%Y-%m-%d}: {_redo(certificate)}"]


def _redo(certificate: x509.Certificate) -> str:
    return NEW_AUTHORITY if certificate.issuer == certificate.subject else "`fedpeft certs renew` makes a new one"


def _strangers(path: Path, public: object, private: Path, redo: str) -> list[str]:
    """The fault that `private` is there and is not the other half of `public`. What is wrong with it alone is its own fault."""
    try:
        same = not private.exists() or read_private_key(private).public_key() == public
    except ValueError:
        return []
    return [] if same else [f"{private} is not the key of {path}: take both from one backup, or {redo}"]


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # A name of its own: where two authorities are trusted in one file, they are told apart by it.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedpeft authority {secrets.token_hex(4)}")])
    return (
        _begun(name, name, key, now, now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName], ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey,
    now: datetime, ends: datetime,
) -> x509.Certificate:  # fmt: skip
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft server")])
    return (
        _begun(name, ca.subject, key, now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:  # fmt: skip
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return built.serial_number(x509.random_serial_number()).not_valid_before(now - BACKDATED).not_valid_after(ends)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _end(now: datetime, days: int, authority: datetime) -> datetime:
    most = (authority - now).days
    if not 1 <= days <= most:
        raise ValueError(f"days={days}: the authority ends on {authority:%Y-%m-%d}, so it can be 1 to {most}")
    return now + timedelta(days=days)


def _subject_name(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.lower().split(".")
        whole = all(re.fullmatch(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", label) for label in labels)
        if not whole or labels[-1].isdigit() or len(host) > 253:
            raise ValueError(
                f"host {host!r} is neither a name nor an address: write what clients connect to, without scheme, port and wildcard, "
                "such as fl.example.org or 10.0.0.5; a name beyond ASCII in its xn-- form"
            ) from None
        return x509.DNSName(host.lower())
    if address.is_unspecified or address.is_multicast or "%" in host:
        raise ValueError(f"host {host!r} is no address that a client could connect to; write the one that it uses, such as 10.0.0.5")
    return x509.IPAddress(address)


def _client_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ValueError(f"client {name!r} names no file: use up to 64 letters, digits, - and _, such as hospital-north")
    return name


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | tuple[()]:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        advice = "`fedpeft certs init` makes it: name the folder in which that was done"
        if path.name == CA_KEY:
            advice = "bring it back, for as long as this takes, from where it is kept"
        if path.suffix == ".pub":
            advice = "`fedpeft certs client` makes it on the client's host: copy it here"
        raise ValueError(f"{path} is not there: {advice}") from None


def _check_free(paths: Sequence[Path], force: bool, advice: str) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise ValueError(f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} there already. {advice}")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """In one atomic step: what others may not read they cannot read at any moment."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # the umask may have taken more away than was meant
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
