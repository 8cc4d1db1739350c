import base64
import hashlib
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.keys import (
    certificate_end,
    certificate_hosts,
    fingerprint,
    is_pair,
    new_authority,
    new_request,
    new_server_certificate,
    new_site_key,
    open_authority,
    public_line,
    read_public_line,
    read_request,
    read_site_key,
)

HOSTS = ["fl.example.org", "192.0.2.7", "2001:db8::7", "localhost"]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(params=[0, 0o022, 0o077], ids=["umask-000", "umask-022", "umask-077"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_private_files_are_for_their_owner_whatever_the_umask(tmp_path: Path):
    new_authority(tmp_path / "authority", "hills")
    new_site_key(tmp_path / "site.key")
    assert mode(tmp_path / "authority") == 0o700
    assert mode(tmp_path / "authority/ca.key") == mode(tmp_path / "site.key") == 0o600
    assert mode(tmp_path / "authority/ca.crt") in (0o644, 0o600)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["authority", "ca.crt", "ca.key", "site.key", "site.pub"]


def test_an_authority_lasts_ten_years_and_is_read_back(tmp_path: Path):
    authority = new_authority(tmp_path, "hills")
    assert open_authority(tmp_path).pem == authority.pem == (tmp_path / "ca.crt").read_bytes()
    assert authority.certificate.subject.rfc4514_string() == "CN=hills authority,O=hills"
    assert authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert isinstance(authority.key.curve, ec.SECP384R1)
    assert abs(certificate_end(authority.pem) - datetime.now(UTC) - timedelta(days=3650)) < timedelta(days=1)


def test_an_authority_is_never_replaced(tmp_path: Path):
    new_authority(tmp_path, "hills")
    before = (tmp_path / "ca.key").read_bytes()
    with pytest.raises(ValueError, match=r"^authority: ca\.key must not exist yet, got one\."):
        new_authority(tmp_path, "hills")
    assert (tmp_path / "ca.key").read_bytes() == before


def test_an_authority_of_others_or_none_is_refused(tmp_path: Path):
    new_authority(tmp_path / "a", "hills")
    new_authority(tmp_path / "b", "hills")
    (tmp_path / "b/ca.key").replace(tmp_path / "a/ca.key")
    with pytest.raises(ValueError, match=r"^authority: ca\.key must be the key of ca\.crt"):
        open_authority(tmp_path / "a")
    with pytest.raises(ValueError, match=r"^authority: .* got No such file or directory\. Restore"):
        open_authority(tmp_path / "b")


def shake_hands(tmp_path: Path, ca: bytes, certificate: bytes, key: bytes, host: str) -> None:
    """A TLS connection in memory; raises as the client of a site would."""
    (tmp_path / "server.pem").write_bytes(certificate)
    (tmp_path / "server.key").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = ssl.create_default_context(cadata=ca.decode()).wrap_bio(to_client, to_server, server_hostname=host)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


@pytest.mark.parametrize("host", HOSTS)
def test_a_site_believes_the_server_under_each_of_its_names(tmp_path: Path, host: str):
    authority = new_authority(tmp_path / "authority", "hills")
    server = new_server_certificate(authority, HOSTS)
    shake_hands(tmp_path, authority.pem, server.certificate, server.key, host)


def test_a_site_does_not_believe_another_name_or_authority(tmp_path: Path):
    authority, other = new_authority(tmp_path / "a", "hills"), new_authority(tmp_path / "b", "hills")
    server = new_server_certificate(authority, HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(tmp_path, authority.pem, server.certificate, server.key, "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, other.pem, server.certificate, server.key, HOSTS[0])
    ended = new_server_certificate(authority, HOSTS, days=0)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(tmp_path, authority.pem, ended.certificate, ended.key, HOSTS[0])


def test_a_server_certificate_is_one_and_no_authority(tmp_path: Path):
    server = new_server_certificate(new_authority(tmp_path, "hills"), HOSTS)
    extensions = x509.load_pem_x509_certificate(server.certificate).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate_hosts(server.certificate) == set(HOSTS)
    assert abs(certificate_end(server.certificate) - datetime.now(UTC) - timedelta(days=825)) < timedelta(days=1)


def test_a_certificate_and_its_key_are_told_from_others(tmp_path: Path):
    authority = new_authority(tmp_path, "hills")
    one, other = (new_server_certificate(authority, HOSTS) for _ in range(2))
    assert is_pair(one.certificate, one.key)
    assert not is_pair(one.certificate, other.key)
    assert not is_pair(one.certificate, b"nothing")


def test_a_site_key_is_what_flower_reads(tmp_path: Path):
    """As flower-supernode and flwr supernode register read theirs."""
    key = new_site_key(tmp_path / "south")
    private = serialization.load_ssh_private_key((tmp_path / "south").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "south.pub").read_bytes())
    assert private.public_key() == public == key.public_key() == read_site_key(tmp_path / "south").public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"
    assert read_public_line(public_line(public)) == public
    with pytest.raises(ValueError, match=r"^site key: south must not exist yet, got one\."):
        new_site_key(tmp_path / "south")


def test_a_fingerprint_is_the_hash_of_the_public_line(tmp_path: Path):
    key = new_site_key(tmp_path / "south").public_key()
    # RFC 4253 6.6: the second word of the line is the key as it goes over the wire.
    wire = base64.b64decode(public_line(key).split()[1])
    assert fingerprint(key) == "SHA256:" + base64.b64encode(hashlib.sha256(wire).digest()).decode().rstrip("=")
    assert len(fingerprint(key)) == len("SHA256:") + 43


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_fingerprint_is_what_ssh_keygen_shows(tmp_path: Path):
    key = new_site_key(tmp_path / "south").public_key()
    for name in ("south", "south.pub"):
        shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / name], capture_output=True, text=True, check=True).stdout
        assert shown.split()[:2] == ["384", fingerprint(key)]


def test_a_site_key_that_others_read_or_that_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "site.key"
    key = new_site_key(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"^site key: site\.key must be readable by its owner alone.* chmod 600 site\.key\.$"):
        read_site_key(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"^site key: site\.key must be a readable file, got No such file or directory\.$"):
        read_site_key(path)
    pkcs8 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for text in (b"", b"nothing", pkcs8):
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(ValueError, match=r"^site key: site\.key must be a private key in OpenSSH's format"):
            read_site_key(path)
    other = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    with pytest.raises(ValueError, match=r"^site key: site\.key must be a key on the curve P-384"):
        read_site_key(path)


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", "ecdsa-sha2-nistp384 AAAA"])
def test_a_line_that_is_no_key_is_refused(line: str):
    with pytest.raises(ValueError, match=r"^public key: the line must be a P-384 key"):
        read_public_line(line)


def test_a_request_tells_site_and_key(tmp_path: Path):
    key = new_site_key(tmp_path / "site.key")
    site, public = read_request(new_request(key, "hill-2"))
    assert (site, public) == ("hill-2", key.public_key())


def test_a_request_changed_in_any_byte_tells_nothing_else(tmp_path: Path):
    """Refused wherever name and key stand; what surrounds the signature has a bit or two without meaning."""
    key = new_site_key(tmp_path / "site.key")
    request = x509.load_pem_x509_csr(new_request(key, "hill"))
    der = request.public_bytes(serialization.Encoding.DER)
    first = der.index(request.tbs_certrequest_bytes)
    signed = range(first, first + len(request.tbs_certrequest_bytes))
    refused = set()
    for position in range(len(der)):
        changed = bytearray(der)
        changed[position] ^= 1
        pem = b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(changed)
        try:
            told = read_request(pem)
        except ValueError:
            refused.add(position)
        else:
            assert told == ("hill", key.public_key())
    assert set(signed) <= refused
    assert len(der) - len(refused) <= 1


def request_with(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *pairs: tuple[x509.ObjectIdentifier, str]) -> bytes:
    name = x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("site", ["../south", "a b", "-x", "a.b", "a/b", "süd", "a\nb", "x" * 64 + "\n"])
def test_a_name_that_no_site_may_have_is_refused_on_both_sides(tmp_path: Path, site: str):
    key = new_site_key(tmp_path / "site.key")
    with pytest.raises(ValueError, match=r"^request: the site's name must be letters"):
        new_request(key, site)
    if len(site) <= 64:
        with pytest.raises(ValueError, match=r"^request: the site's name must be letters"):
            read_request(request_with(key, (NameOID.COMMON_NAME, site)))


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ((NameOID.COMMON_NAME, "south"), (NameOID.COMMON_NAME, "hill")),
        ((NameOID.COMMON_NAME, "south"), (NameOID.ORGANIZATION_NAME, "hills")),
        ((NameOID.ORGANIZATION_NAME, "hills"),),
    ],
    ids=["none", "two", "more", "other"],
)
def test_a_subject_that_is_not_one_name_is_refused(tmp_path: Path, pairs: tuple[tuple[x509.ObjectIdentifier, str], ...]):
    with pytest.raises(ValueError, match=r"^request: its subject must be one name"):
        read_request(request_with(new_site_key(tmp_path / "site.key"), *pairs))


def test_a_request_with_another_kind_of_key_is_refused():
    keys = (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65_537, 2048))
    for key in keys:
        with pytest.raises(ValueError, match=r"^request: its key must be on the curve P-384"):
            read_request(request_with(key, (NameOID.COMMON_NAME, "south")))


def test_what_is_no_request_is_refused(tmp_path: Path):
    authority = new_authority(tmp_path, "hills")
    request = new_request(authority.key, "south")
    for pem in (b"", b"nothing", b"\xff\x00", authority.pem, request[:-200], request + b" " * 20_000):
        with pytest.raises(ValueError, match=r"^request: the file must be what `isocenter site init` wrote"):
            read_request(pem)
