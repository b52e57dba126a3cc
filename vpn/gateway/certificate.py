"""The gateway's key and self-signed certificate, and the pin clients know it by."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

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
    """Key and certificate (PEM) kept in ``directory``, so that the pin outlives a restart of the gateway."""
    key, certificate = directory / "server-key.pem", directory / "server-cert.pem"
    if not (key.exists() and certificate.exists()):
        secret, public = make_certificate(name)
        _write_private(key, secret)
        _write_private(certificate, public)
    return key.read_text(), certificate.read_text()


def _write_private(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
