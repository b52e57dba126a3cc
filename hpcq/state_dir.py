"""Where hpcq keeps its files, and how a private one is written.

``<root>/<queue>/`` holds a queue's connection file, its keys and its batch jobs. The root is that of the queue, if it
is one of this process and has its own (``Queue(state_dir=…)``: see `place`); else what the command line was given
(`use`); else ``$HPCQ_STATE_DIR``, else ``$XDG_STATE_HOME/hpcq``, else ``~/.local/state/hpcq``. Here are the paths only:
what is in the files belongs to the modules that write them. Nothing is created by asking for a path; ``ensure_*`` make
directories with mode 0700, ``write_private`` makes files with 0600.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from hpcq.errors import StateError, UsageError

MAX_NAME_LENGTH = 64
_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)


_used: Path | None = None
_placed: dict[str, Path] = {}
"""Where queues of this process are that were told where; also after their end, when their jobs are asked about."""
_open: set[str] = set()
"""Queues that this process serves."""


def use(root: Path | None) -> None:
    """Have every queue under ``root`` from now on, unless it was told where; None: where it is by itself."""
    global _used  # noqa: PLW0603 - one place for the whole process, as with a working directory
    _used = None if root is None else absolute(root)


def absolute(root: object) -> Path:
    """A directory that the user named: absolute, ``~`` filled in.

    Raises:
        UsageError: it is not a path, or there is no such home directory.
    """
    if not isinstance(root, str | os.PathLike) or not isinstance(text := os.fspath(root), str) or not text:
        raise UsageError(f"the state directory must be a path, not {root!r}")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"state directory {text}: there is no such home directory") from None


def place(name: str, root: Path | None) -> None:
    """Note that this process serves queue ``name`` with its files under ``root`` (None: `state_root`), until `leave`.

    Raises:
        UsageError: it serves another queue of that name, elsewhere.
    """
    if name in _open:
        raise UsageError(f"this program serves a queue {name!r} already, in {queue_dir(name)}; use another name")
    _open.add(name)
    if root is None:
        _placed.pop(name, None)
    else:
        _placed[name] = root


def leave(name: str) -> None:
    """Note that this process does not serve queue ``name`` any more."""
    _open.discard(name)


def state_root() -> Path:
    """Return the directory that holds every queue's directory, but of those that were told where."""
    if _used is not None:
        return _used
    if given := os.environ.get("HPCQ_STATE_DIR", ""):
        return absolute(given)
    return _own_root()


def _own_root() -> Path:
    configured = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules say that a relative value is to be ignored: it would mean another place in every
    # directory.
    base = Path(configured) if Path(configured).is_absolute() else home() / ".local" / "state"
    return base / "hpcq"


def _is_own(root: Path) -> bool:
    try:
        return root == _own_root()
    except UsageError:  # no home
        return False


def home() -> Path:
    """Return the user's home directory.

    Raises:
        UsageError: there is none.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise UsageError("this user has no home directory: set HOME, or XDG_STATE_HOME and XDG_CONFIG_HOME") from None


def check_queue_name(name: str) -> str:
    """Return ``name`` if a queue may be called so: it becomes a directory, a job name and part of messages.

    Raises:
        UsageError: anything but letters, digits and ``._-``; a leading dot; empty; over 64 characters.
    """
    if len(name) > MAX_NAME_LENGTH or _QUEUE_NAME.fullmatch(name) is None:
        shown = name if len(name) <= MAX_NAME_LENGTH else name[:MAX_NAME_LENGTH] + "..."
        raise UsageError(
            f"queue name {shown!r} cannot be used: use letters, digits and ._- (at most {MAX_NAME_LENGTH}, "
            "not starting with a dot)"
        )
    return name


def queue_dir(name: str) -> Path:
    """Return the directory of a queue's files; the name is checked."""
    return (_placed.get(name) or state_root()) / check_queue_name(name)


def connection_file(name: str) -> Path:
    """Return the path of the file by which pilots and the command line find and trust a queue's manager."""
    return queue_dir(name) / "connection.json"


def identity_file(name: str) -> Path:
    """Return the path of the file that makes a program the manager of a queue: its keys."""
    return queue_dir(name) / "identity.json"


def lock_file(name: str) -> Path:
    """Return the path of the file that is locked while a program serves a queue."""
    return lock_in(queue_dir(name))


def lock_in(directory: Path) -> Path:
    """Return the same of a queue whose directory this is."""
    return directory / "manager.lock"


def jobs_dir(name: str) -> Path:
    """Return the directory with one subdirectory for each batch submission of a queue."""
    return queue_dir(name) / "jobs"


def known_queues() -> list[str]:
    """Return the names of the queues that have a directory, sorted; an unreadable root counts as empty."""
    try:
        entries = list(state_root().iterdir())
    except OSError:
        return []
    return sorted(e.name for e in entries if _QUEUE_NAME.fullmatch(e.name) and len(e.name) <= 64 and e.is_dir())


def ensure_queue_dir(name: str, root: Path | None = None) -> Path:
    """Make and return ``queue_dir(name)``, or its like under ``root``; mode 0700.

    The directory above it is made private only if it is hpcq's own: one that the user named may be for others too.

    Raises:
        UsageError: the name or the place cannot be used, or somebody else's directory is there.
    """
    check_queue_name(name)
    above = root or _placed.get(name) or state_root()
    is_own = _is_own(above)
    if is_own:
        ensure_private_dir(above)
    made = ensure_private_dir(above / name)
    if not is_own and made.stat().st_uid != os.geteuid():
        raise UsageError(f"{made} belongs to another user: use another name or another state directory")
    return made


def ensure_jobs_dir(name: str) -> Path:
    """Make and return ``jobs_dir(name)``, mode 0700."""
    ensure_queue_dir(name)
    return ensure_private_dir(jobs_dir(name))


def ensure_private_dir(path: Path) -> Path:
    """Make ``path`` with mode 0700 and the directories above it as the umask says; an existing one is made
    private.

    Raises:
        UsageError: the place cannot be written to, or is something other than a directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise UsageError(
            f"cannot make the directory {path}: {error.strerror}; "
            "give another state directory (HPCQ_STATE_DIR), which you can write to and the compute nodes see"
        ) from error
    return path


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part.

    The file has mode 0600 from its first moment, and the content is on disk before it gets its name. Without
    ``replace`` the first of several writers wins.

    Raises:
        StateError: it cannot be written; nothing is left behind.
        FileExistsError: the file is there and ``replace`` is not set.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _name(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise StateError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_directory(path.parent)


def _name(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is one of that name."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


def _sync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut; file systems that cannot (some network ones) are left
    be.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
