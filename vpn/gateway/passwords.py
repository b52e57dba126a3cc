"""Passwords as ocserv's password file has them: ``user:*:hash``, hashed with SHA-crypt. Pure.

Source: Ulrich Drepper, "Unix crypt using SHA-256 and SHA-512", version 0.6. The C library's own is not in Python's
any more (3.13). These passwords are random, 192 bits: the fewest rounds suffice, and five hundred pilots that log in
at once cost a login node nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

ROUNDS = 1000  # the fewest that crypt(5) takes
_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SALT_LENGTH = 16


def hash_password(password: str, salt: str = "", rounds: int = ROUNDS) -> str:
    """``$5$rounds=…$salt$…`` of a password; a random salt when none is given."""
    salt = salt or "".join(secrets.choice(_ALPHABET) for _ in range(_SALT_LENGTH))
    digest = _digest(password.encode(), salt.encode(), rounds)
    return f"$5$rounds={rounds}${salt}${_encode(digest)}"


def file_text(hashes: Iterable[tuple[str, str]]) -> str:
    """The password file for these users and hashes; the star says that they are in no group."""
    return "".join(f"{username}:*:{hashed}\n" for username, hashed in hashes)


def _digest(password: bytes, salt: bytes, rounds: int) -> bytes:
    length = len(password)
    other = hashlib.sha256(password + salt + password).digest()
    first = hashlib.sha256(password + salt + _repeated(other, length))
    bits = length
    while bits:
        first.update(other if bits & 1 else password)
        bits >>= 1
    digest = first.digest()
    long_password = _repeated(hashlib.sha256(password * length).digest(), length)
    long_salt = _repeated(hashlib.sha256(salt * (16 + digest[0])).digest(), len(salt))
    for number in range(rounds):
        parts = [long_password if number & 1 else digest]
        parts += [long_salt] if number % 3 else []
        parts += [long_password] if number % 7 else []
        parts += [digest if number & 1 else long_password]
        digest = hashlib.sha256(b"".join(parts)).digest()
    return digest


def _repeated(data: bytes, length: int) -> bytes:
    return (data * (length // len(data) + 1))[:length]


def _encode(digest: bytes) -> str:
    """The digest's bytes in the order and the base 64 of crypt(5), of each group the low bits first."""
    text, (one, two, three) = "", (0, 10, 20)
    for _ in range(10):
        text += _group(digest[one] << 16 | digest[two] << 8 | digest[three], 4)
        one, two, three = three + 1, one + 1, two + 1
    return text + _group(digest[31] << 8 | digest[30], 3)


def _group(value: int, count: int) -> str:
    return "".join(_ALPHABET[value >> 6 * index & 63] for index in range(count))
