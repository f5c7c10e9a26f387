"""Certificates and keys: that TLS accepts them, refuses what it must, and that what is wrong with the files is said."""

import argparse
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from server.certs import (
    CA,
    CA_DAYS,
    CA_KEY,
    SERVER,
    SERVER_KEY,
    create,
    ending,
    faults_of,
    hosts_of,
    make_client,
    read_certificate,
    read_private_key,
    read_public_key,
    renew,
)

pytestmark = pytest.mark.fast
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a server that clients find as fl.example.org or 10.0.0.5."""
    create(tmp_path / "certs", ["FL.example.org", "10.0.0.5"], now=NOW)
    return tmp_path / "certs"


def shaken(folder: Path, host: str, ca: Path | None = None) -> str:
    """The TLS version that client and server agree on, in memory: a whole handshake of Python's ssl, strict about certificates."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / SERVER, folder / SERVER_KEY)
    client = ssl.create_default_context(cafile=str(ca or folder / CA))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):  # flights of TLS 1.3
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return str(ends[0].version())


@pytest.mark.parametrize("host", ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"])
def test_a_client_with_the_authoritys_certificate_trusts_the_server_under_each_of_its_names(folder: Path, host: str) -> None:
    assert shaken(folder, host) == "TLSv1.3"
    assert hosts_of(read_certificate(folder / SERVER)) == ("fl.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1")


@pytest.mark.parametrize("host", ["other.example.org", "example.org", "10.0.0.6"])
def test_another_host_is_refused(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shaken(folder, host)


def test_another_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    create(tmp_path / "stranger", ["fl.example.org"], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"issuer certificate|self.signed"):
        shaken(folder, "fl.example.org", tmp_path / "stranger" / CA)


def test_a_certificate_that_has_ended_is_refused_and_renewing_heals_it(tmp_path: Path) -> None:
    create(tmp_path, ["fl.example.org"], now=NOW - 40 * DAY, days=39)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shaken(tmp_path, "fl.example.org")
    (fault,) = faults_of(tmp_path / SERVER, NOW)
    assert f"ended on {NOW - DAY:%Y-%m-%d}" in fault
    assert "certs renew" in fault
    renew(tmp_path, now=NOW)
    assert shaken(tmp_path, "fl.example.org") == "TLSv1.3"
    assert faults_of(tmp_path / SERVER, NOW) == []


def test_a_server_certificate_signs_no_others(folder: Path) -> None:
    """Its holder could otherwise be any server."""
    (folder / "server").mkdir()
    (folder / "server" / CA).write_bytes((folder / SERVER).read_bytes())
    (folder / "server" / CA_KEY).write_bytes((folder / SERVER_KEY).read_bytes())
    (folder / "server" / CA_KEY).chmod(0o600)
    renew(folder / "server", ["evil.example.org"], now=NOW, days=10)
    chain = (folder / "server" / SERVER).read_bytes() + (folder / SERVER).read_bytes()
    (folder / "server" / SERVER).write_bytes(chain)
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA"):
        shaken(folder / "server", "evil.example.org", folder / CA)


def test_renewing_keeps_authority_key_and_hosts_and_clients_go_on_trusting(folder: Path, tmp_path: Path) -> None:
    held = tmp_path / "ca-of-a-client.crt"
    held.write_bytes((folder / CA).read_bytes())
    before = {name: (folder / name).read_bytes() for name in (CA, CA_KEY, SERVER, SERVER_KEY)}
    renew(folder, now=NOW + 100 * DAY)
    after = {name: (folder / name).read_bytes() for name in before}
    assert [name for name in before if before[name] != after[name]] == [SERVER]
    renew(folder, now=NOW)  # what was renewed 100 days from now is not valid yet
    assert shaken(folder, "10.0.0.5", held) == "TLSv1.3"


def test_renewing_for_other_hosts_and_a_new_key(folder: Path) -> None:
    old = (folder / SERVER_KEY).read_bytes()
    (folder / SERVER_KEY).unlink()
    renew(folder, ["new.example.org"], now=NOW)
    assert (folder / SERVER_KEY).read_bytes() != old
    assert mode(folder / SERVER_KEY) == 0o600
    assert shaken(folder, "new.example.org") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shaken(folder, "fl.example.org")


def test_clients_whose_clock_is_behind_trust_it(folder: Path) -> None:
    for name in (CA, SERVER):
        assert read_certificate(folder / name).not_valid_before_utc == NOW - timedelta(hours=1)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_the_owner_reads_private_keys_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create(tmp_path / "certs", ["localhost"], now=NOW)
        make_client(tmp_path / "certs", "north")
    finally:
        os.umask(before)
    modes = {path.name: mode(path) for path in (tmp_path / "certs").iterdir()}
    private, public = dict.fromkeys((CA_KEY, SERVER_KEY, "north"), 0o600), dict.fromkeys((CA, SERVER, "north.pub"), 0o644)
    assert modes == private | public
    assert mode(tmp_path / "certs") == 0o700


def test_nothing_is_overwritten_unless_forced(folder: Path) -> None:
    make_client(folder, "north")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"ca\.crt, .*server\.key are there already.*certs renew.*--force"):
        create(folder, ["localhost"], now=NOW)
    with pytest.raises(ValueError, match=r"north, .*north\.pub are there already.*registered"):
        make_client(folder, "north")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    create(folder, ["localhost"], now=NOW, force=True)
    make_client(folder, "north", force=True)
    assert [name for name, old in before.items() if (folder / name).read_bytes() == old] == []


def test_flower_takes_the_keys_of_a_client(tmp_path: Path) -> None:
    """By the code of `flower-supernode --auth-supernode-private-key` and of `flwr supernode register`."""
    make_client(tmp_path, "north")
    given = argparse.Namespace(auth_supernode_private_key=str(tmp_path / "north"), auth_supernode_public_key=None)
    keys = _try_setup_client_authentication(given)
    assert keys is not None
    private, public = keys
    assert isinstance(private.curve, ec.SECP384R1)
    assert uses_nist_ec_curve(public)
    assert try_load_public_key(tmp_path / "north.pub") == public_key_to_bytes(public)
    assert (tmp_path / "north.pub").read_text().endswith(" north\n")
    assert read_public_key(tmp_path / "north.pub") == read_private_key(tmp_path / "north").public_key()


@pytest.mark.parametrize(
    "host", ["https://fl.example.org", "fl.example.org:9092", "*.example.org", "", "10.0.0.256", "-a.org", "münchen.de", "a..b", "[::1]"]
)  # fmt: skip
def test_a_host_that_is_none_is_said(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match=r"neither a name nor an address.*10\.0\.0\.5"):
        create(tmp_path, [host], now=NOW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0"])
def test_an_address_that_nobody_connects_to_is_said(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="no address that a client could connect to"):
        create(tmp_path, [host], now=NOW)


def test_a_server_without_hosts_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a host"):
        create(tmp_path, [], now=NOW)


@pytest.mark.parametrize("name", ["", "../north", "ca.key", "-north", "a b", "n" * 65])
def test_a_client_name_that_names_no_file_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="names no file"):
        make_client(tmp_path, name)


@pytest.mark.parametrize("days", [0, -1, CA_DAYS + 1])
def test_a_certificate_cannot_outlive_its_authority(tmp_path: Path, days: int) -> None:
    with pytest.raises(ValueError, match=f"days={days}: the authority ends on .* 1 to {CA_DAYS}"):
        create(tmp_path, ["localhost"], now=NOW, days=days)


def test_an_authority_that_has_ended_renews_nothing(tmp_path: Path) -> None:
    create(tmp_path, ["localhost"], now=NOW - (CA_DAYS + 1) * DAY)
    with pytest.raises(ValueError, match=r"ca\.crt ended on .*certs init --force.*every client"):
        renew(tmp_path, now=NOW)
    (fault,) = faults_of(tmp_path / CA, NOW)
    assert "init --force" in fault


def test_a_certificate_is_warned_of_for_its_last_thirty_days(tmp_path: Path) -> None:
    create(tmp_path, ["localhost"], now=NOW, days=100)
    assert faults_of(tmp_path / SERVER, NOW + 69 * DAY) == []
    (fault,) = ending(tmp_path / SERVER, NOW + 71 * DAY)
    assert f"ends in 29 days, on {NOW + 100 * DAY:%Y-%m-%d}: `fedpeft certs renew`" in fault


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_a_private_key_that_others_can_read_is_not_used(folder: Path, bits: int) -> None:
    (folder / CA_KEY).chmod(bits)
    with pytest.raises(ValueError, match=rf"by others than its owner \(mode {bits:03o}\): `chmod 600"):
        renew(folder, now=NOW)
    assert len(faults_of(folder / CA_KEY, NOW)) == 1
    assert faults_of(folder / CA, NOW) == []  # one fault is said once


def test_a_key_that_is_not_the_certificates_is_said(folder: Path, tmp_path: Path) -> None:
    create(tmp_path / "stranger", ["fl.example.org"], now=NOW)
    make_client(folder, "north")
    make_client(tmp_path / "stranger", "north")
    for name in (SERVER_KEY, "north"):
        (folder / name).write_bytes((tmp_path / "stranger" / name).read_bytes())
    assert "server.key is not the key of" in faults_of(folder / SERVER, NOW)[0]
    assert "north is not the key of" in faults_of(folder / "north.pub", NOW)[0]
    renew(folder, now=NOW)
    assert faults_of(folder / SERVER, NOW) == []
    (folder / CA_KEY).write_bytes((tmp_path / "stranger" / CA_KEY).read_bytes())
    with pytest.raises(ValueError, match=r"ca\.key is not the key of .*ca\.crt.*backup"):
        renew(folder, now=NOW)
    assert "ca.key is not the key of" in faults_of(folder / CA, NOW)[0]


def test_a_certificate_of_another_authority_is_said(folder: Path, tmp_path: Path) -> None:
    create(tmp_path / "stranger", ["fl.example.org"], now=NOW)
    for name in (SERVER, SERVER_KEY):
        (folder / name).write_bytes((tmp_path / "stranger" / name).read_bytes())
    (fault,) = faults_of(folder / SERVER, NOW)
    assert "was not signed by" in fault


def test_files_that_are_not_there_are_said_with_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ca\.crt is not there: `fedpeft certs init`"):
        renew(tmp_path, now=NOW)
    create(tmp_path, ["localhost"], now=NOW)
    (tmp_path / SERVER).unlink()
    with pytest.raises(ValueError, match="name them with --host"):
        renew(tmp_path, now=NOW)
    (tmp_path / CA_KEY).unlink()
    with pytest.raises(ValueError, match=r"ca\.key is not there: bring it back"):
        renew(tmp_path, now=NOW)
    with pytest.raises(ValueError, match=r"north\.pub is not there: .*client's host"):
        read_public_key(tmp_path / "north.pub")


def test_files_that_hold_something_else_are_said(folder: Path) -> None:
    key = Ed25519PrivateKey.generate()
    (folder / "odd").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / "odd").chmod(0o600)
    (folder / "odd.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    (folder / SERVER).write_text("nothing")
    (folder / SERVER_KEY).write_text("nothing")
    (folder / "north.pub").write_text("nothing")
    assert "NIST curve" in faults_of(folder / "odd", NOW)[0]
    assert "NIST curve" in faults_of(folder / "odd.pub", NOW)[0]
    assert "no certificate in PEM" in faults_of(folder / SERVER, NOW)[0]
    assert "no private key" in faults_of(folder / SERVER_KEY, NOW)[0]
    assert "no public key in OpenSSH's format" in faults_of(folder / "north.pub", NOW)[0]
