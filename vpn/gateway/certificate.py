"""The gateway's key and self-signed certificate, and the pin clients know it by."""

from __future__ import annotations

import base64
import datetime
import hashlib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vpn.errors import GatewayError
from vpn.gateway.state import write_private

LIFETIME = datetime.timedelta(days=3650)  # clients check the pin, not the date; a gateway is restarted more often


def make_certificate(name: str) -> tuple[bytes, bytes]:
    """A fresh P-256 key and certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"hpcq gateway {name}"[:64])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return secret, certificate.public_bytes(serialization.Encoding.PEM)


def pin_of(certificate_pem: bytes) -> str:
    """``pin-sha256:`` of a certificate's public key (RFC 7469, section 2.4)."""
    public = x509.load_pem_x509_certificate(certificate_pem).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "pin-sha256:" + base64.b64encode(hashlib.sha256(der).digest()).decode()


def load_or_make(directory: Path, name: str) -> tuple[str, str]:
    """Key and certificate (PEM) kept in ``directory``, so that the pin outlives a restart of the gateway.

    Raises:
        GatewayError: they cannot be read or written, or are damaged.
    """
    key, certificate = directory / "server-key.pem", directory / "server-cert.pem"
    try:
        if not (key.exists() and certificate.exists()):
            secret, public = make_certificate(name)
            write_private(key, secret)
            write_private(certificate, public)
        found = key.read_text(), certificate.read_text()
        _check_pair(*found)
    except OSError as error:
        problem = f"{error.filename or directory}: {error.strerror}"
        raise GatewayError(f"the gateway's key and certificate cannot be kept: {problem}") from None
    except (ValueError, TypeError):
        raise GatewayError(
            f"{key.name} and {certificate.name} in {directory} are damaged, or do not belong together: remove both; "
            "the gateway then gets a new key, and credentials that were given out are worthless"
        ) from None
    return found


def _check_pair(key_pem: str, certificate_pem: str) -> None:
    """Raises ValueError, or TypeError for a key with a password."""
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    if key.public_key() != certificate.public_key():
        raise ValueError("another key's certificate")
