"""What cvmfs2 writes to the file of CVMFS_USYSLOG, for people: pure text, as version 2.12 was seen to write it.

A line is ``Mon Nov 23 21:27:56 2026 (cms.cern.ch) whitelist verification failed (6): invalid whitelist signature``.
When it cannot mount, the last line repeats its status in words; the cause stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_HEAD = re.compile(r"^\w{3} \w{3} +\d+ [\d:]{8} \d{4} (\([\w.-]+\) )?")
_CHATTER = re.compile(
    r"switching (proxy|host) from|Cache directory structure created|: linking /|CVMFS_MOUNT_DIR missing"
)
_UNFETCHED = re.compile(r"failed to fetch (.+?) \(hash: \w+(?:-\w+)?, error \d+ \[(.+?)\]\)")
_OFFLINE = "entering offline mode"

_CAUSES = (
    ("invalid whitelist signature", "the public key is not this repository's: see --cvmfs-key"),
    ("expired whitelist", "its whitelist has ended: its owners must sign it anew, or the clock of this node is wrong"),
    ("name mismatch", "the server has another repository under this name"),
    ("open public key", "its public key cannot be read"),
    ("verify repository", "it is not signed by whom its owners say: the server is wrong, or somebody's in between"),
    (
        "proxy (connection|returned|serving|data|address)|all proxies",
        "the proxy does not serve it: give --cvmfs-proxy http://HOST:3128, or DIRECT",
    ),
    ("host returned HTTP error", "the server does not have it, or refuses it"),
    ("host (connection|data|serving)|resolve host", "no server answers"),
    ("no space left|local I/O failure", "its cache cannot be written: the disk is full, or not node-local"),
)


def cause_of(log: str) -> tuple[str, str]:
    """Why it failed, in our words ("": not known) and in its own, the line that tells most ("": none does)."""
    lines = [_HEAD.sub("", line.strip()) for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if not _CHATTER.search(line)]
    for line in reversed(telling):
        if words := _words_for(line):
            return words, line
    return "", telling[-1] if telling else ""


def troubles_in(log: str) -> Iterator[str]:
    """What could not be read, one line each, in order, each once."""
    found: dict[str, None] = {}
    for line in log.splitlines():
        if unfetched := _UNFETCHED.search(line):
            words = _words_for(unfetched[2])
            found[f"{unfetched[1]} could not be fetched: {unfetched[2]}" + (f" ({words})" if words else "")] = None
        elif _OFFLINE in line:
            found["its servers cannot be reached: only what is in the cache can be read"] = None
    yield from found


def _words_for(text: str) -> str:
    return next((words for pattern, words in _CAUSES if re.search(pattern, text, re.IGNORECASE)), "")
