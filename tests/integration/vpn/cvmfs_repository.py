"""A small signed CVMFS repository as plain files, to be served by any web server; made without CVMFS' server tools.

Layout (CernVM-FS documentation, "CernVM-FS repository structure"): compressed objects in ``data/`` named by the SHA-1
of what is stored; one of them a catalog, an SQLite database of paths. The manifest (``.cvmfspublished``) names catalog
and certificate and is signed by the certificate's key; the whitelist (``.cvmfswhitelist``) names the certificate and is
signed by the master key, whose public half is what clients are given.
"""

from __future__ import annotations

import datetime
import hashlib
import http.server
import sqlite3
import stat
import struct
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

_DIRECTORY, _FILE = 1, 4
_COUNTERS = ("regular", "symlink", "special", "dir", "nested", "chunked", "chunks", "file_size", "chunked_size",
             "xattr", "external", "external_file_size")  # fmt: skip
_SCHEMA = """
CREATE TABLE properties (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE catalog (md5path_1 INTEGER, md5path_2 INTEGER, parent_1 INTEGER, parent_2 INTEGER, hardlinks INTEGER,
    hash BLOB, size INTEGER, mode INTEGER, mtime INTEGER, mtimens INTEGER, flags INTEGER, name TEXT, symlink TEXT,
    uid INTEGER, gid INTEGER, xattr BLOB, PRIMARY KEY (md5path_1, md5path_2));
CREATE INDEX idx_catalog_parent ON catalog (parent_1, parent_2);
CREATE TABLE chunks (md5path_1 INTEGER, md5path_2 INTEGER, offset INTEGER, size INTEGER, hash BLOB,
    PRIMARY KEY (md5path_1, md5path_2, offset, size));
CREATE TABLE nested_catalogs (path TEXT PRIMARY KEY, sha1 TEXT, size INTEGER);
CREATE TABLE bind_mountpoints (path TEXT PRIMARY KEY, sha1 TEXT, size INTEGER);
CREATE TABLE statistics (counter TEXT PRIMARY KEY, value INTEGER);
INSERT INTO properties VALUES ('schema', '2.5'), ('schema_revision', '7');
"""


class Repository:
    """``directory``/NAME, and its public key at ``key``."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.top = directory / name
        self.key = directory / f"{name}.pub"
        self.revision = 0
        self._master = rsa.generate_private_key(65537, 2048)
        self._private = rsa.generate_private_key(65537, 2048)
        self._certificate = self._make_certificate()
        self.top.mkdir(parents=True)
        public = self._master.public_key()
        self.key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        self.write_whitelist()

    def publish(self, files: Mapping[str, bytes]) -> dict[str, Path]:
        """Replace the contents by ``files`` (path: bytes); the object each is stored in."""
        self.revision += 1
        objects = {path: self._store(contents) for path, contents in files.items()}
        database = self._catalog(files, objects)
        catalog = self._store(database, "C")
        certificate = self._store(self._certificate.public_bytes(Encoding.PEM), "X")
        lines = [
            f"C{catalog}", f"B{len(database)}", f"R{hashlib.md5(b'').hexdigest()}",
            "D60", f"S{self.revision}", "Gno", "Ano", f"N{self.name}", f"X{certificate}", f"T{int(time.time())}",
        ]  # fmt: skip
        signed = _hashed(lines)
        digest = signed.rpartition(b"--\n")[2].strip()
        signature = self._private.sign(digest, padding.PKCS1v15(), hashes.SHA1())
        _replace(self.top / ".cvmfspublished", signed + signature)
        return {path: self._object(name) for path, name in objects.items()}

    def write_whitelist(self, days: float = 30) -> None:
        """Sign a whitelist that ends after so many days (negative: it has)."""
        now = datetime.datetime.now(datetime.UTC)
        fingerprint = self._certificate.fingerprint(hashes.SHA1()).hex(":").upper()
        ends = now + datetime.timedelta(days)
        signed = _hashed([f"{now:%Y%m%d%H%M%S}", f"E{ends:%Y%m%d%H%M%S}", f"N{self.name}", fingerprint])
        digest = signed.rpartition(b"--\n")[2].strip()
        _replace(self.top / ".cvmfswhitelist", signed + _raw_signature(self._master, digest))

    def _object(self, name: str) -> Path:
        return self.top / "data" / name[:2] / name[2:]

    def _store(self, contents: bytes, suffix: str = "") -> str:
        packed = zlib.compress(contents)
        name = hashlib.sha1(packed).hexdigest()
        path = self._object(name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed)
        return name

    def _catalog(self, files: Mapping[str, bytes], objects: Mapping[str, str]) -> bytes:
        directories = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        with sqlite3.connect(":memory:") as base:
            base.executescript(_SCHEMA)
            now = int(time.time())
            base.executemany(
                "INSERT INTO properties VALUES (?, ?)", [("revision", self.revision), ("last_modified", now)]
            )
            rows = [_row(path, None, 4096, now) for path in ["", *sorted(directories)]]
            rows += [_row(path, objects[path], len(contents), now) for path, contents in sorted(files.items())]
            base.executemany(f"INSERT INTO catalog VALUES ({','.join('?' * 16)})", rows)
            counts = {
                "self_regular": len(files),
                "self_dir": 1 + len(directories),
                "self_file_size": sum(map(len, files.values())),
            }
            names = [f"{part}_{counter}" for part in ("self", "subtree") for counter in _COUNTERS]
            base.executemany("INSERT INTO statistics VALUES (?, ?)", [(name, counts.get(name, 0)) for name in names])
            base.commit()
            return base.serialize()

    def _make_certificate(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(name, name, self._private.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(365))
        return builder.sign(self._private, hashes.SHA256())


class Server:
    """A web server of one directory, on loopback; ``asked`` has the paths it was asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []
        self.port = 0
        self._httpd: http.server.ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cvmfs"

    def start(self) -> None:
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(server.directory))

            def translate_path(self, path):
                return super().translate_path(path.removeprefix("/cvmfs"))

            def log_message(self, *_):
                server.asked.append(self.path)

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._httpd.server_address[1]
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._httpd is not None:
            self._httpd.shutdown()
            self._httpd.server_close()
            self._httpd = None


def _row(path: str, stored: str | None, size: int, now: int) -> tuple[object, ...]:
    kind, flags = (stat.S_IFDIR | 0o755, _DIRECTORY) if stored is None else (stat.S_IFREG | 0o644, _FILE)
    above, _, name = f"/{path}".rpartition("/") if path else ("", "", "")
    digest = bytes.fromhex(stored) if stored else None
    parent = _path_hash(above) if path else (0, 0)
    return (
        *_path_hash(f"/{path}" if path else ""),
        *parent,
        1,
        digest,
        size,
        kind,
        now,
        None,
        flags,
        name,
        "",
        0,
        0,
        None,
    )


def _path_hash(path: str) -> tuple[int, int]:
    first, second = struct.unpack("<qq", hashlib.md5(path.encode()).digest())
    return first, second


def _hashed(lines: list[str]) -> bytes:
    letter = "".join(f"{line}\n" for line in lines).encode()
    return letter + b"--\n" + hashlib.sha1(letter).hexdigest().encode() + b"\n"


def _raw_signature(key: rsa.RSAPrivateKey, message: bytes) -> bytes:
    """PKCS #1 v1.5 of the message itself (RFC 8017, 9.2, without a DigestInfo), which ``sign`` does not offer."""
    numbers = key.private_numbers()
    length = key.key_size // 8
    padded = b"\0\1" + b"\xff" * (length - 3 - len(message)) + b"\0" + message
    return pow(int.from_bytes(padded), numbers.d, numbers.public_numbers.n).to_bytes(length)


def _replace(path: Path, contents: bytes) -> None:
    """Whole or not at all: a client may be reading."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(contents)
    new.replace(path)
