"""Making a queue's identity: an authority for it alone, and the certificates of its manager and its pilots.

See `hpcq.connection` for what they are for; this is apart because what it imports takes a tenth of a pilot's start.
Times are set a day back: clocks of login and compute nodes differ.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hpcq.connection import MANAGER_NAME, PILOT_NAME, Identity, KeyPair

LIFETIME = datetime.timedelta(days=365)
SKEW = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + LIFETIME)
    )


def make_identity(queue: str, now: datetime.datetime | None = None) -> Identity:
    """A new identity for ``queue``; the authority's key exists only during this call."""
    now = now or datetime.datetime.now(datetime.UTC)
    issuer = f"hpcq queue {queue}"
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = (
        _certificate(issuer, authority_key, issuer, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )

    def issue(subject: str, *usages: x509.ObjectIdentifier) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(subject, key, issuer, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        return KeyPair(certificate.public_bytes(serialization.Encoding.PEM).decode(), _pem(key))

    return Identity(
        authority.public_bytes(serialization.Encoding.PEM).decode(),
        issue(MANAGER_NAME, ExtendedKeyUsageOID.SERVER_AUTH),
        issue(PILOT_NAME, ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH),
        (now + LIFETIME).timestamp(),
        pilots_serve=True,
    )
