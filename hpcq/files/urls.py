"""Fetches one URL to a descriptor: ``python -m hpcq.files.urls FD``, run by a pilot inside its tunnel. The URL comes on
standard input: arguments are for all users of a node to see, and a signed URL is as good as a password.

``http`` and ``https`` by the standard library (certificates are verified; ``http_proxy`` and its kin count), ``root``
by XRootD's Python client if it is installed, else ``xrdcp``. Failures of the network and of busy servers are tried
`ATTEMPTS` times in all; what the server refuses is not. Exits 1 with one line on standard error.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

ATTEMPTS = 3
PAUSE = 1.0
"""Seconds before the second attempt; four times as long before the third: a server that restarts needs a moment."""

SILENCE = 60.0
"""Seconds without a byte after which an attempt is given up."""

XROOTD = {"XRD_CONNECTIONWINDOW": "30", "XRD_CONNECTIONRETRY": "2", "XRD_STREAMTIMEOUT": "60"}
"""Seconds that XRootD's clients try to connect, how often, and their SILENCE; by themselves they take minutes to say
that a server is not there. What the pilot's environment says counts instead."""

CHUNK = 1 << 20


class FetchError(Exception):
    """Why it could not be fetched; ``final`` when trying again is useless."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def fetch(url: str, descriptor: int) -> None:
    """Write what ``url`` names to an empty file.

    Raises:
        FetchError: all attempts failed; says how the last did.
    """
    get = _http if urlsplit(url).scheme in ("http", "https") else _xrootd
    for attempt in range(1, ATTEMPTS + 1):
        try:
            get(url, descriptor)
            return
        except FetchError as error:
            if error.final or attempt == ATTEMPTS:
                raise
        time.sleep(PAUSE * 4 ** (attempt - 1))
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)


def _http(url: str, descriptor: int) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "hpcq"})  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as answer:  # noqa: S310 - as above
            expected = answer.length
            size = _copy(answer, descriptor)
    except urllib.error.HTTPError as error:
        again = error.code in (408, 425, 429) or error.code >= 500
        raise FetchError(f"the server answers {error.code} {error.reason}", final=not again) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise FetchError(str(getattr(error, "reason", "") or error or type(error).__name__)) from error
    if expected is not None and size != expected:
        raise FetchError(f"it broke off after {size} of {expected} bytes")


def _copy(answer: http.client.HTTPResponse, descriptor: int) -> int:
    size = 0
    while piece := answer.read(CHUNK):
        size += len(piece)
        view = memoryview(piece)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except OSError as error:
                raise FetchError(f"it cannot be written here: {error.strerror}", final=True) from error
    return size


def _xrootd(url: str, descriptor: int) -> None:
    for name, value in XROOTD.items():
        os.environ.setdefault(name, value)
    target = f"/proc/{os.getpid()}/fd/{descriptor}"
    if importlib.util.find_spec("XRootD") is not None:
        _xrootd_python(url, os.readlink(target))
    elif shutil.which("xrdcp"):
        _xrdcp(url, os.readlink(target))
    else:
        raise FetchError("a root:// URL needs XRootD's Python client or xrdcp on the pilots; neither is there", True)


def _xrootd_python(url: str, target: str) -> None:
    from XRootD import client  # noqa: PLC0415 - not everywhere

    process = client.CopyProcess()
    process.add_job(url, target, force=True)
    for step in (process.prepare, process.run):
        answer = step()
        status = answer[0] if isinstance(answer, tuple) else answer
        if not status.ok:
            raise FetchError(status.message.strip(), final="3011" in status.message or "3010" in status.message)


def _xrdcp(url: str, target: str) -> None:
    done = subprocess.run(
        ["xrdcp", "--force", "--silent", "--nopbar", url, target], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        message = said[-1] if said else f"xrdcp ended with status {done.returncode}"
        raise FetchError(message, final="3011" in message or "3010" in message)


def main() -> int:
    """Entry of the process."""
    try:
        fetch(sys.stdin.read(), int(sys.argv[1]))
    except FetchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
