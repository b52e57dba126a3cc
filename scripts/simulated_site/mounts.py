"""What the site sees of the machine's file system, and what it sees of its own.

The machine's files stay visible. Private are /run, /tmp, /var/tmp, /dev/shm, /proc, the user and group files, the
name service files and the two device nodes rootless networking needs. /tmp and /var/tmp are per host, as node-local
scratch is on a cluster; directories there that the caller needs (`kept`) are bound back.
"""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from simulated_site import kernel, plan
from simulated_site.errors import SiteError, SiteRefusedError
from simulated_site.plan import Host

HIDDEN = tuple(Path(path) for path in ("/run", "/tmp", "/var/tmp", "/dev/shm"))
PER_HOST = tuple(Path(path) for path in ("/tmp", "/var/tmp"))
KEPT = plan.ROOT / "kept"
DEVICES = {"/dev/net/tun": os.makedev(10, 200), "/dev/fuse": os.makedev(10, 229)}


@dataclasses.dataclass(frozen=True)
class User:
    """The ordinary user of the site."""

    name: str
    uid: int
    gid: int
    home: str


def hidden_by_site(path: Path) -> bool:
    """Whether a private mount of the site would cover `path`."""
    return any(path.is_relative_to(directory) for directory in HIDDEN)


def prepare(kept: Iterable[Path]) -> list[Path]:
    """Mount what all hosts share; returns the directories to bind back on each host."""
    wanted = sorted({path.resolve() for path in kept if hidden_by_site(path.resolve())})
    handles = [_open_kept(path) for path in wanted]
    _mount_proc()
    kernel.tmpfs(Path("/run"))
    kernel.tmpfs(Path("/dev/shm"), "1777")
    _make_layout()
    for index, handle in enumerate(handles):
        _stage(handle, KEPT / str(index))
    bind_kept(wanted, within=(Path("/run"), Path("/dev/shm")))
    return wanted


def _open_kept(path: Path) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise SiteError(f"cannot show {path} inside the site: {error.strerror}; it must be a directory") from error


def _stage(handle: int, target: Path) -> None:
    target.mkdir(parents=True)
    kernel.bind(f"/proc/self/fd/{handle}", target)
    os.close(handle)


def bind_kept(kept: list[Path], within: tuple[Path, ...]) -> None:
    """Bind the kept directories that lie under `within` from where they are staged."""
    for index, path in enumerate(kept):
        if any(path.is_relative_to(directory) for directory in within):
            path.mkdir(parents=True, exist_ok=True)
            kernel.bind(KEPT / str(index), path)


def _mount_proc() -> None:
    try:
        kernel.mount("proc", Path("/proc"), "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except OSError as error:
        raise SiteRefusedError(
            f"cannot mount /proc for the simulated site: {error.strerror}; in a container, parts of /proc are"
            " masked: start it with --security-opt systempaths=unconfined (docker) or unmask=ALL (podman)"
        ) from error


def _make_layout() -> None:
    directories = (plan.ROOT, plan.LOGS, plan.HOME.parent, plan.SLURM_CONF.parent, plan.STORE, KEPT)
    for directory in (*directories, plan.ROOT / "etc", plan.ROOT / "dev"):
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    for shared in (plan.SCRATCH, Path("/run/lock")):
        shared.mkdir(exist_ok=True)
        shared.chmod(0o1777)


def copy_scripts(source: Path) -> None:
    """A copy of scripts/ every user of the site can read, wherever the clone lies."""
    shutil.copytree(source, plan.SCRIPTS, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (plan.SCRIPTS, *plan.SCRIPTS.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)


def free_user(root: bool) -> User:
    """An ordinary user whose ids nobody on this machine has."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    number = next(uid for uid in range(plan.FIRST_FREE_UID, 60000) if uid not in taken)
    user = User(plan.USER, number, number, str(plan.HOME))
    plan.HOME.mkdir(mode=0o700, exist_ok=True)
    if root:
        os.chown(plan.HOME, number, number)
    return user


def add_user(user: User) -> None:
    """Private user and group files with one user more."""
    passwd = f"{user.name}:x:{user.uid}:{user.gid}::{user.home}:/bin/bash\n"
    for name, line in (("passwd", passwd), ("group", f"{user.name}:x:{user.gid}:\n")):
        present = Path("/etc", name).read_text()
        kept = [entry for entry in present.splitlines(keepends=True) if not entry.startswith(f"{user.name}:")]
        replace_file(Path("/etc", name), "".join(kept) + line, plan.ROOT / "etc" / name)


def replace_file(target: Path, content: str, private: Path) -> None:
    """Show `content` at `target`, within this mount namespace only."""
    private.write_text(content)
    private.chmod(0o644)
    real = target.resolve()
    if not real.exists() and hidden_by_site(real):  # such as resolv.conf -> /run/systemd/resolve/…
        real.parent.mkdir(parents=True, exist_ok=True)
        real.touch()
    try:
        kernel.bind(private, real)
    except OSError as error:
        raise SiteError(f"cannot replace {target} inside the site: {error.strerror} ({real})") from error


def prepare_devices() -> list[str]:
    """Private device nodes with the modes udev gives them; what could not be had, and why."""
    return [reason for path, number in DEVICES.items() if (reason := _device(Path(path), number))]


def _device(path: Path, number: int) -> str:
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o666 == 0o666:
        return ""
    private = plan.ROOT / "dev" / path.name
    try:
        os.mknod(private, stat.S_IFCHR | 0o666, number)
        private.chmod(0o666)
        if not path.exists():
            return _new_device(path, number)
        kernel.bind(private, path)
    except OSError as error:
        return f"{path} cannot be opened by ordinary users here, and a private one cannot be made: {error.strerror}"
    return ""


def _new_device(path: Path, number: int) -> str:
    """`path` does not exist; its directory may be covered, the machine's /dev not changed."""
    if path.parent == Path("/dev") or not path.parent.is_dir():
        return f"{path} does not exist on this machine"
    kernel.tmpfs(path.parent)
    os.mknod(path, stat.S_IFCHR | 0o666, number)
    path.chmod(0o666)
    return ""


def prepare_host(host: Host, kept: list[Path]) -> None:
    """In the host's own mount namespace: node-local scratch, names, and no way to leave cgroups behind."""
    for directory in PER_HOST:
        kernel.tmpfs(directory, "1777")
    bind_kept(kept, within=PER_HOST)
    etc = plan.ROOT / "etc"
    replace_file(Path("/etc/hosts"), plan.hosts_file(host), etc / f"hosts.{host.name}")
    replace_file(Path("/etc/resolv.conf"), plan.resolv_conf(host), etc / f"resolv.conf.{host.name}")
    if host.compute:
        _cover_cgroups()


def _cover_cgroups() -> None:
    """slurmd makes control groups where it finds a hierarchy; here it finds an empty directory."""
    if Path("/sys/fs/cgroup").is_dir():
        kernel.tmpfs(Path("/sys/fs/cgroup"))
