"""Processes of a privileged gateway that need no privilege: before they serve anybody they become another user.

What they may still write is the access log: in a directory of its own, that user's, which becomes their working
directory while they may still enter it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from vpn import kernel
from vpn.errors import GatewayError

LOG = "access.log"


def lesser_user() -> str:
    """Whom to become: the user that ocserv's package has made, else nobody."""
    with suppress(KeyError):
        return pwd.getpwnam("ocserv").pw_name
    return "nobody"


def access_log(directory: Path, user: str) -> Path:
    """Where the access log is; with ``user``, who must be able to write it, in a directory made for that."""
    if not user:
        return directory / LOG
    place = directory / "access"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        entry = pwd.getpwnam(user)
        shutil.chown(place, entry.pw_uid, entry.pw_gid)
    except (OSError, KeyError) as error:
        raise GatewayError(f"{place} cannot be given to {user}: {error}") from None
    return place / LOG


def become(user: str, log: Path) -> Path:
    """Be this user from now on ("": stay who we are); the access log as it can be reached then."""
    if not user:
        return log
    entry = pwd.getpwnam(user)
    os.chdir(log.parent)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    kernel.die_with_parent(signal.SIGTERM)  # which a change of user has cleared
    return Path(LOG)
