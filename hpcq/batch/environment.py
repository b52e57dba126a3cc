"""The Python environment pilots run in: the program's own, a directory, or an archive unpacked once on each node.

An archive (a virtual environment or a conda-pack one) is read from where it lies, which the compute nodes must see,
and unpacked below node-local scratch by the first pilot that comes; others on the node wait for it and use the same
tree. Its directory is named after the archive's path, size and time, so a new archive gets a new tree. A pilot that is
killed while unpacking leaves no `ready` mark, and the next one starts over.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from pathlib import Path

from hpcq.errors import UsageError

# One line, since it travels as a single argument of the batch script. $1 archive, $2 place, then Python's arguments.
_UNPACK = (
    "; ".join(
        [
            "set -eu",
            "archive=$1 place=$2",
            "shift 2",
            # A link of somebody else's in a directory that all may write to could lead to any place of ours.
            'mkdir -m 700 "$place" 2>/dev/null || { [ ! -L "$place" ] && [ -O "$place" ]; } || '
            '{ echo "hpcq: cannot use $place on $(hostname): it is not ours; give another --scratch" >&2; exit 1; }',
            'exec 9>"$place/lock"',
            "flock 9",
            'if [ ! -e "$place/ready" ]',
            'then rm -rf "$place/tree"',
            'mkdir "$place/tree"',
            'tar -xf "$archive" -C "$place/tree"',
            'for unpack in "$place"/tree/bin/conda-unpack "$place"/tree/*/bin/conda-unpack',
            'do [ ! -x "$unpack" ] || "$unpack"',
            "done",
            ': >"$place/ready"',
            "fi",
            "exec 9>&-",
            'for python in "$place"/tree/bin/python "$place"/tree/*/bin/python',
            'do [ ! -x "$python" ] || exec "$python" "$@"',
            "done",
            'echo "hpcq: $archive holds no bin/python that runs on $(hostname)" >&2',
            "exit 1",
        ]
    )
    .replace("then; ", "then ")
    .replace("do; ", "do ")
)


def python_command(environment: Path | None, scratch: Path | None) -> tuple[str, ...]:
    """What starts Python in an environment: this program's own when none is given.

    Raises:
        UsageError: there is no such directory or archive, or no Python in it.
    """
    if environment is None:
        return (sys.executable,)
    path = environment.absolute()
    if path.is_dir():
        python = path / "bin" / "python"
        if not os.access(python, os.X_OK):
            raise UsageError(f"the environment {path} has no bin/python that can be run")
        return (str(python),)
    try:
        status = path.stat()
        readable = tarfile.is_tarfile(path)
    except OSError as error:
        raise UsageError(f"the environment {path} cannot be read: {error.strerror}") from error
    if not readable:
        raise UsageError(f"the environment {path} is neither a directory nor a tar archive")
    key = hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]
    place = (scratch or Path("/tmp")) / f"hpcq-environment-{os.getuid()}-{key}"  # noqa: S108 - checked to be ours
    return ("/bin/sh", "-c", _UNPACK, "hpcq-environment", str(path), str(place))


def pack(prefix: Path, archive: Path) -> int:
    """Pack the environment at ``prefix`` into ``archive`` (gzip), all or nothing; returns its size in bytes.

    Links stay links: the Python that a virtual environment was made from must be on the nodes.

    Raises:
        UsageError: there is no environment at ``prefix``, or the archive cannot be written.
    """
    if not os.access(prefix / "bin" / "python", os.X_OK):
        raise UsageError(f"{prefix} is no environment: it has no bin/python")
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:gz", compresslevel=3) as tar:
            tar.add(prefix, arcname=".", filter=_without_caches)
        temporary.replace(archive)
    except OSError as error:
        raise UsageError(f"cannot pack {prefix} into {archive}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return archive.stat().st_size


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name == "__pycache__" else member
