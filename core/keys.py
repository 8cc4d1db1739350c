"""Keys and certificates of a consortium: its authority, the server's certificate, each site's key and the request for it.

All keys are on the curve P-384, one of the few that Flower takes. What is private is created for its owner's eyes alone.
"""

import base64
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.data.manifest import SITE_NAME
from core.files import write_atomically

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
_LONGEST_REQUEST = 16_384  # bytes; a request with a P-384 key has about 600


@dataclass(frozen=True)
class Authority:
    """Who vouches for the server: its certificate goes to every site, its key to nobody."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate as `ca.crt` holds it."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class ServerCertificate:
    """What the server shows (`server.pem`) and what it keeps (`server.key`), both PEM."""

    certificate: bytes
    key: bytes


def new_authority(folder: Path, name: str) -> Authority:
    """A new certificate authority in `folder` (0700): `ca.crt` and `ca.key` (0600), for ten years.

    Raises:
        ValueError: There is one already; it is never replaced.
    """
    for path in (folder / "ca.key", folder / "ca.crt"):
        if path.exists():
            raise ValueError(f"authority: {path.name} must not exist yet, got one. Keep it, or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    key = _new_key()
    subject = _name(name, f"{name} authority")
    authority = Authority(
        _certificate(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384()),
        key,
    )
    write_atomically(folder / "ca.key", _pem(key), 0o600)
    write_atomically(folder / "ca.crt", authority.pem, 0o644)
    return authority


def open_authority(folder: Path) -> Authority:
    """The authority that `new_authority` made.

    Raises:
        ValueError: Its files are not there, not readable, or not of one another.
    """
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ValueError(
            f"authority: ca.crt and ca.key must be a certificate and its key, got {reason}. Restore them from your backup."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("authority: ca.key must be the key of ca.crt, got another one. Restore both from your backup.")
    return Authority(certificate, key)


def new_server_certificate(authority: Authority, hosts: Sequence[str], days: int = SERVER_DAYS) -> ServerCertificate:
    """A new key and a certificate for a server that is dialled by these names.

    Args:
        authority: Who signs.
        hosts: DNS names and IP addresses; the first one is also the common name.
        days: How long it is valid.
    """
    key = _new_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.key.public_key())
    certificate = (
        _certificate(authority.certificate.subject, _name(_organisation(authority), hosts[0][:64]), key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority.key, hashes.SHA384())
    )
    return ServerCertificate(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def certificate_hosts(pem: bytes) -> set[str]:
    """The names and addresses that a server certificate is good for."""
    alternative = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*alternative.get_values_for_type(x509.DNSName), *map(str, alternative.get_values_for_type(x509.IPAddress))}


def certificate_end(pem: bytes) -> datetime:
    """When a certificate ends, UTC."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def is_pair(certificate: bytes, key: bytes) -> bool:
    """Whether a server certificate and a private key, both PEM, are of one another."""
    try:
        private = serialization.load_pem_private_key(key, None)
        return private.public_key() == x509.load_pem_x509_certificate(certificate).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def new_site_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A new private key of a site at `path` (0600, as `flower-supernode` reads it); its public half beside it ends in .pub.

    Raises:
        ValueError: There is one already; it is never replaced.
    """
    if path.exists():
        raise ValueError(f"site key: {path.name} must not exist yet, got one. Keep it, or move it away first.")
    key = _new_key()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_atomically(path, private, 0o600)
    write_atomically(path.with_suffix(".pub"), f"{public_line(key.public_key())}\n".encode(), 0o644)
    return key


def read_site_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key at `path`.

    Raises:
        ValueError: It is none, or others than its owner may read it.
    """
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ValueError(f"site key: {path.name} must be readable by its owner alone, got others too. chmod 600 {path.name}.")
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ValueError(f"site key: {path.name} must be a readable file, got {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if str(error).startswith("site key:"):
            raise
        raise ValueError(f"site key: {path.name} must be a private key in OpenSSH's format, got something else.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"site key: {path.name} must be a key on the curve P-384, got another kind. Make a new one.")
    return key


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """The public key as one line of OpenSSH, which `flwr supernode register` reads from a file."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_public_line(line: str) -> ec.EllipticCurvePublicKey:
    """The public key of such a line.

    Raises:
        ValueError: It is none on the curve P-384.
    """
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"public key: the line must be a P-384 key as OpenSSH writes it, got {line[:40]!r}.")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """What two people compare on the phone: ``SHA256:`` and 43 characters, as `ssh-keygen -l` shows it."""
    digest = serialization.ssh_key_fingerprint(key, hashes.SHA256())
    return f"SHA256:{_base64(digest)}"


def new_request(key: ec.EllipticCurvePrivateKey, site: str) -> bytes:
    """A site's request to take part, PEM (PKCS#10): its name and public key, signed to prove that it has the private one."""
    _check_site(site)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)


def read_request(pem: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """The site and the public key of a request, after checking signature, curve and name.

    Raises:
        ValueError: It is no request, was changed on its way, or asks for what no site may have.
    """
    try:
        if len(pem) > _LONGEST_REQUEST:
            raise ValueError("long")
        request = x509.load_pem_x509_csr(pem)
        key, names = request.public_key(), request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        others = len(request.subject) - len(names)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ValueError(
            "request: the file must be what `isocenter site init` wrote, got something else. Ask the site to send it again."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("request: its key must be on the curve P-384, got another kind. Ask for one of `isocenter site init`.")
    try:
        signed = request.is_signature_valid
    except (UnsupportedAlgorithm, ValueError):
        signed = False
    if not signed:
        raise ValueError("request: its signature must be its own key's, got another. It was changed on its way: ask again.")
    if len(names) != 1 or others:
        raise ValueError("request: its subject must be one name, the site's, got another number. Ask for one of `site init`.")
    site = str(names[0].value)
    _check_site(site)
    return site, key


def _check_site(site: str) -> None:
    if not re.fullmatch(SITE_NAME, site):
        raise ValueError(f"request: the site's name must be letters, digits, - or _, at most 64, got {site!r}.")


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _name(organisation: str, common: str) -> x509.Name:
    pairs = ((NameOID.ORGANIZATION_NAME, organisation), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs])


def _organisation(authority: Authority) -> str:
    [attribute] = authority.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(attribute.value)


def _certificate(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of two machines differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
