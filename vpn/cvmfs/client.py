"""cvmfs2: what it is told, and what its end means. Pure text.

Sources: the client parameters in the CernVM-FS documentation, its loader's list of failures, and cvmfsexec, whose
directory is a relocated installation (``dist``). cvmfs2 reads the files of ``-o config=`` in order, each by a shell;
the last value counts, and a file that is not there is passed over.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vpn.cvmfs.log import cause_of
from vpn.cvmfs.settings import Cvmfs
from vpn.errors import TunnelError

TOP = "/cvmfs"
SOCKETS_NAME = ".sockets"
SOCKETS = f"{TOP}/{SOCKETS_NAME}"
"""In memory, of the session alone, and short, as paths of sockets must be; its files have repositories in their names.
"""
MISSING = (
    "cvmfsexec and cvmfs2 were not found: put cvmfsexec on PATH (https://github.com/cvmfs/cvmfsexec), or ask the site "
    "to install the package cvmfs (https://cvmfs.readthedocs.io); --cvmfs-image FILE mounts a squashfs copy instead"
)


@dataclass(frozen=True)
class Installation:
    """A cvmfs2: ``root`` is the directory it is relocated to ("": it is installed where it belongs)."""

    program: str
    root: str = ""
    libraries: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Where it finds its libraries."""
        if not self.libraries:
            return {}
        return {"LD_LIBRARY_PATH": self.libraries, "CVMFS_LIBRARY_PATH": self.libraries}

    def etc(self, *parts: str) -> str:
        """A path in its configuration."""
        return "/".join([f"{self.root}/etc/cvmfs", *parts])


@dataclass(frozen=True)
class Room:
    """Directories on node-local disk: ``own`` of this session, ``cache`` shared with others on the node."""

    own: str
    cache: str

    def log(self, repository: str) -> str:
        """Where cvmfs2 writes what is wrong."""
        return f"{self.own}/{repository}.log"

    def configuration(self, repository: str, part: str) -> str:
        """Our own files: ``first`` before the node's configuration, ``last`` after it."""
        return f"{self.own}/{repository}.{part}.conf"


def domain_of(repository: str) -> str:
    """cern.ch of cms.cern.ch."""
    return repository.partition(".")[2]


def configuration_files(
    installed: Installation, room: Room, repository: str, defaults: Sequence[str], config_repository: str
) -> list[str]:
    """Every file cvmfs2 reads, in the order of its documentation; ``defaults`` are the names in default.d."""
    domain = domain_of(repository)
    files = [room.configuration(repository, "first"), installed.etc("default.conf")]
    files += [installed.etc("default.d", name) for name in sorted(defaults)]
    shared = f"{TOP}/{config_repository}/etc/cvmfs" if config_repository and repository != config_repository else ""
    if shared:
        files.append(f"{shared}/default.conf")
    files.append(installed.etc("default.local"))
    if shared:
        files.append(f"{shared}/domain.d/{domain}.conf")
    files += [installed.etc("domain.d", f"{domain}.{kind}") for kind in ("conf", "local")]
    if shared:
        files.append(f"{shared}/config.d/{repository}.conf")
    files += [installed.etc("config.d", f"{repository}.{kind}") for kind in ("conf", "local")]
    return [*files, room.configuration(repository, "last")]


def config_repository_of(texts: Sequence[str]) -> str:
    """The repository that holds the configuration of the others, named by the last of these files; "" for none."""
    found = ""
    for text in texts:
        for match in re.finditer(r"^\s*(?:export\s+)?CVMFS_CONFIG_REPOSITORY=(\S*)", text, re.MULTILINE):
            found = match[1].strip("'\"")
    return found


def relocated(text: str, path: str, root: str) -> str:
    """A configuration file of an installation below ``root``, to be read from elsewhere: what it names in /etc/cvmfs is
    below ``root`` too, and files it includes are beside its own ``path``.
    """
    directory = shlex.quote(str(PurePosixPath(path).parent))
    return f"cd {directory}\n" + re.sub(r"(?<![\w./-])/etc/cvmfs(?![\w.-])", lambda _: f"{root}/etc/cvmfs", text)


def first_settings() -> dict[str, str]:
    """What holds where the node's configuration says nothing: cvmfs2 ends without a proxy setting, and a soft limit of
    1024 open files is soon reached (it takes the hard one if that is lower than what is asked for).
    """
    return {"CVMFS_HTTP_PROXY": "DIRECT", "CVMFS_NFILES": "131072"}


def last_settings(settings: Cvmfs, room: Room, repository: str) -> dict[str, str]:
    """What overrides the node's configuration; raises TunnelError when a path cannot be told.

    The cache is an *alien* one: several cvmfs2 share it without a manager, which would be in one session's namespace
    and end with it. Its size is held by ``vpn.cvmfs.cache`` instead.
    """
    values = {
        "CVMFS_MOUNT_DIR": TOP,
        "CVMFS_CACHE_BASE": f"{room.own}/cache",
        "CVMFS_WORKSPACE": SOCKETS,
        "CVMFS_RELOAD_SOCKETS": SOCKETS,
        "CVMFS_ALIEN_CACHE": room.cache,
        "CVMFS_SHARED_CACHE": "no",
        "CVMFS_QUOTA_LIMIT": "-1",
        "CVMFS_CLAIM_OWNERSHIP": "yes",
        "CVMFS_USYSLOG": room.log(repository),
        "CVMFS_AUTO_UPDATE": "yes",
    }
    if settings.proxy:
        values["CVMFS_HTTP_PROXY"] = settings.proxy
    for key in settings.keys:
        _refuse_unspeakable(key, "--cvmfs-key")
    if settings.servers:
        values["CVMFS_SERVER_URL"] = ";".join(f"{server.rstrip('/')}/{repository}" for server in settings.servers)
        values["CVMFS_PUBLIC_KEY"] = ":".join(settings.keys)
        values["CVMFS_KEYS_DIR"] = ""  # older versions let it count before the key
        values["CVMFS_USE_GEOAPI"] = "no"
    return values


def _refuse_unspeakable(path: str, option: str) -> None:
    if found := re.search(r'[:,"\\`$]', path):
        raise TunnelError("cvmfs", f"{path}: cvmfs2 cannot be told of a path with {found[0]} in it; see {option}")


def configuration(values: Mapping[str, str]) -> str:
    """The text of a configuration file: a shell reads it."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def command(installed: Installation, files: Sequence[str], repository: str) -> list[str]:
    """The argv that mounts a repository and then goes on in the background; raises TunnelError.

    The names of the files are divided by colons in an option that is divided from others by commas, and cvmfs2 puts
    the directory of each between double quotes for its shell, which waits for ever when that breaks them.
    """
    for path in files:
        _refuse_unspeakable(path, "--cvmfs-cache")
    return [installed.program, "-o", f"config={':'.join(files)}", repository, f"{TOP}/{repository}"]


_FAILURES = {
    2: "its options were not understood; is this cvmfs2 older than 2.4?",
    3: "it lacks a permission: of its cache, of the mount point, or of its limit of open files",
    4: "the mount was refused: FUSE is not allowed here (/dev/fuse, or user namespaces older than Linux 4.18)",
    5: "its control socket could not be made: the path of the cache is too long, or its disk is full",
    7: "its library could not be loaded: the installation of cvmfs is incomplete",
    8: "its library does not fit it: the installation of cvmfs is mixed up",
    9: "its cache could not be used: the disk is full, or the directory is not node-local",
    12: "its cache's quota could not be set up",
    15: "the repository's signature could not be checked: a wrong public key, or no answer from server or proxy",
    16: "the repository's catalog could not be loaded: no answer from server or proxy, or one that is no repository",
    20: "another cvmfs2 holds its mount point",
    21: "the repository is mounted there already",
    23: "it found no proxy: give --cvmfs-proxy http://HOST:3128, or DIRECT",
    24: "its workspace is in use by another cvmfs2",
    25: "this revision of the repository is blocked by its own administrators",
}


def explain_end(repository: str, status: int, said: str, log: str) -> TunnelError:
    """Why cvmfs2 did not mount: what its log says, or failing that its output; else what its status means."""
    how = f"signal {-status}" if status < 0 else f"status {status}"
    words, line = cause_of(log)
    if not line:
        words, line = cause_of(said)
    reason = words or _FAILURES.get(status, "for a reason it keeps to itself")
    last = f" (it says: {line[:300]})" if line else ""
    return TunnelError("cvmfs", f"{repository}: cvmfs2 ended with {how}: {reason}{last}")


def explain_loss(what: str, server: str = "cvmfs2") -> TunnelError:
    """When it ended while it was mounted."""
    return TunnelError("cvmfs", f"{what}: its {server} has ended, maybe killed for lack of memory")


def image_command(program: str, image: str, place: str, mark: str) -> list[str]:
    """The argv that mounts a squashfs file and then goes on in the background; by ``mark`` its process is found."""
    return [program, "-o", f"fsname={mark}", image, place]


def explain_image(image: str, status: int, said: str) -> TunnelError:
    """Why an image was not mounted."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    last = lines[-1][:300] if lines else "it said nothing"
    return TunnelError("cvmfs", f"{image} could not be mounted: squashfuse ended with {how}: {last}")
