"""Bring CVMFS up in a session: what the node has natively is left as it is, the rest is mounted in the namespace.

Sequence: which repositories can be read on the node itself → (tunnel up) → a cvmfs2 is found → a room on node-local
disk → the holder makes places at /cvmfs → one cvmfs2 a repository, started by the holder with the right to mount; each
ends when its file system is mounted and leaves a server in the background. The server is in the namespace: whatever
kills that, the kernel ends the server and drops the mount.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from vpn.cvmfs import client as cvmfs2
from vpn.cvmfs.cache import TRIM_INTERVAL, session_room, trim
from vpn.cvmfs.client import TOP, Installation, Room
from vpn.cvmfs.log import cause_of, troubles_in
from vpn.cvmfs.servers import Watch, find
from vpn.cvmfs.settings import Cvmfs
from vpn.errors import TunnelError
from vpn.messages import Stage
from vpn.modes.base import BringUp, Spawner
from vpn.probing import ask
from vpn.process import Client
from vpn.process import run as run_program
from vpn.programs import environment, missing_program, search_path

NATIVE_DEADLINE = 10.0
"""Seconds the node's own automounter has to show a repository."""
READ_DEADLINE = 30.0
UNPACK_DEADLINE = 60.0
SQUASHFUSES = ("squashfuse_ll", "squashfuse")


async def look(settings: Cvmfs, up: BringUp) -> tuple[str, ...]:
    """The repositories that this node does not show at /cvmfs by itself."""
    imaged = {image.repository for image in settings.images}
    wanted = tuple(name for name in settings.repositories if name not in imaged)
    if settings.whole or not wanted or not await asyncio.to_thread(Path(TOP).is_dir):
        return () if settings.whole else wanted
    up.step = ("cvmfs", f"looking for {', '.join(wanted)} at {TOP}")
    results = await ask(up.keeper.spawn, [f"cvmfs:{name}" for name in wanted], NATIVE_DEADLINE)
    return tuple(name for name, result in zip(wanted, results, strict=True) if not result.ok)


async def provide(settings: Cvmfs, missing: Sequence[str], holder: Client, up: BringUp) -> Room | None:
    """Mount images and the ``missing`` repositories; where cvmfs2 keeps its logs, if it was needed.

    Raises:
        TunnelError: says what could not be mounted, and why.
    """
    if not (missing or settings.images):
        return None
    installed = await find_cvmfs2(settings, up) if missing else None
    room = up.stack.enter_context(session_room(settings.cache)) if missing else None
    defaults, config_repository = _defaults(installed)
    if settings.servers:
        config_repository = ""  # the node's configuration is not needed
    first = [config_repository] if config_repository and config_repository not in missing else []
    images = [image.repository for image in settings.images if image.repository]
    native = [name for name in settings.repositories if name not in missing and name not in images]
    number = holder.number()
    sockets = [cvmfs2.SOCKETS_NAME] if missing else []
    shown = [] if settings.whole else native
    await holder.request(Stage(number, TOP, [*sockets, *images, *first, *missing], shown))
    for image in settings.images:
        await _mount_image(image.path, f"{TOP}/{image.repository}".rstrip("/"), holder, up)
    if installed is None or room is None:
        return None
    mounting = _Mounting(settings, installed, room, defaults, config_repository)
    mounting.check(missing)
    for name in first:
        await mounting.mount(name, holder, up)
    up.step = ("cvmfs", f"mounting {', '.join(missing)}")
    tasks = [asyncio.create_task(mounting.mount(name, holder, up)) for name in missing]
    try:
        await asyncio.gather(*tasks)
    finally:  # the first that fails is the reason; the others end before the room goes
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    trimming = asyncio.create_task(_keep_trimmed(room.cache, settings.quota << 20))
    up.stack.callback(trimming.cancel)
    up.troubles.append(_Logs(room, [*first, *missing]).news)
    for name in (*first, *missing):
        await _watch(room.configuration(name, "first"), cvmfs2.explain_loss(name), up)
    return room


async def prove(settings: Cvmfs, client: Spawner, up: BringUp, room: Room | None) -> None:
    """Read a file of every repository from inside; raises TunnelError."""
    targets = [f"cvmfs:{name}" for name in settings.names]
    up.step = ("cvmfs", f"reading {', '.join(targets)}")
    for result in await ask(client.spawn, targets, READ_DEADLINE) if targets else ():
        if not result.ok and settings.whole:
            name = result.target.removeprefix("cvmfs:")
            raise TunnelError("cvmfs", f"{name} cannot be read in the image {settings.whole.path}")
        if not result.ok:
            said = cause_of(_read(room.log(result.target.removeprefix("cvmfs:"))))[1] if room else ""
            raise TunnelError("cvmfs", f"{result.message} (cvmfs2 says: {said})" if said else result.message)


class _Logs:
    """The logs of a session's cvmfs2, each read on from where it was read up to."""

    def __init__(self, room: Room, names: Sequence[str]) -> None:
        self._paths = {name: room.log(name) for name in names}
        self._read = dict.fromkeys(names, 0)

    def news(self) -> list[str]:
        """What could not be read since it was last asked."""
        found = []
        for name, path in self._paths.items():
            text = _read(path)
            begin = self._read[name] if len(text) >= self._read[name] else 0  # it has been begun anew
            self._read[name] = len(text)
            found += [f"cvmfs: {name}: {line}" for line in troubles_in(text[begin:])]
        return found


def _defaults(installed: Installation | None) -> tuple[list[str], str]:
    """The files of default.d, and the repository with the configuration of the others."""
    if installed is None:
        return [], ""
    paths = sorted(Path(installed.etc("default.d")).glob("*.conf"))
    texts = []
    for path in [*paths, Path(installed.etc("default.local"))]:
        with suppress(OSError):
            texts.append(path.read_text(errors="replace"))
    return [path.name for path in paths], cvmfs2.config_repository_of(texts)


class _Mounting:
    """What all repositories of a session have in common."""

    def __init__(
        self, settings: Cvmfs, installed: Installation, room: Room, defaults: list[str], config_repository: str
    ) -> None:
        self.settings = settings
        self.installed = installed
        self.room = room
        self.defaults = defaults
        self.config_repository = config_repository

    def check(self, names: Sequence[str]) -> None:
        """Refuse what has no configuration at all: cvmfs2 would only say that it has no server."""
        if self.settings.servers or self.config_repository:
            return
        for name in names:
            own = self.installed.etc("config.d", f"{name}.conf"), self.installed.etc("config.d", f"{name}.local")
            domain = self.installed.etc("domain.d", f"{cvmfs2.domain_of(name)}.conf")
            if not any(Path(path).exists() for path in (*own, domain)):
                raise TunnelError(
                    "cvmfs",
                    f"{name}: {self.installed.etc()} says nothing of it: install cvmfs-config-default, or give "
                    "--cvmfs-server http://HOST/cvmfs and --cvmfs-key FILE",
                )

    async def mount(self, name: str, holder: Client, up: BringUp) -> None:
        """Mount one; raises TunnelError."""
        up.step = ("cvmfs", f"mounting {name}")
        first, last = (Path(self.room.configuration(name, part)) for part in ("first", "last"))
        _write(first, cvmfs2.configuration(cvmfs2.first_settings()))
        _write(last, cvmfs2.configuration(cvmfs2.last_settings(self.settings, self.room, name)))
        files = cvmfs2.configuration_files(self.installed, self.room, name, self.defaults, self.config_repository)
        if self.installed.root:
            files = [self._relocated(name, number, path) for number, path in enumerate(files)]
        argv = cvmfs2.command(self.installed, files, name)
        status, said = await _run(holder, argv, environment(**self.installed.environment))
        if status:
            raise cvmfs2.explain_end(name, status, said, _read(self.room.log(name)))

    def _relocated(self, name: str, number: int, path: str) -> str:
        """A copy of this file that fits where the installation is, if it is the installation's."""
        if not path.startswith(self.installed.etc("")) or not (text := _read(path)):
            return path
        copy = Path(self.room.configuration(name, str(number)))
        _write(copy, cvmfs2.relocated(text, path, self.installed.root))
        return str(copy)


async def _mount_image(path: str, place: str, holder: Client, up: BringUp) -> None:
    up.step = ("cvmfs", f"mounting {path}")
    program = next(filter(None, (shutil.which(name, path=search_path()) for name in SQUASHFUSES)), None)
    if program is None:
        raise TunnelError("program", missing_program("squashfuse"))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise TunnelError("cvmfs", f"{path}: {error.strerror} (it must be visible on the node)") from None
    mark = f"vpn-{secrets.token_hex(16)}"
    status, said = await _run(holder, cvmfs2.image_command(program, path, place, mark), environment())
    if status:
        raise cvmfs2.explain_image(path, status, said)
    await _watch(mark, cvmfs2.explain_loss(path, "squashfuse"), up)


async def _watch(mark: str, loss: TunnelError, up: BringUp) -> None:
    """The tunnel is lost when the server with this on its command line ends."""
    pids = await asyncio.to_thread(find, mark)
    up.stack.callback(Watch(pids, partial(up.lose, loss)).close)


async def _run(holder: Client, argv: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Run a FUSE server until it has gone to the background; its status and what it said.

    Not by a pipe: the server may keep it open.
    """
    output = os.memfd_create("output")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        process = await holder.spawn(argv, env=env, cwd="/", stdin=null, stdout=output, stderr=output, may_mount=True)
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                await process.end(grace=0)
        return status, os.pread(output, 1 << 16, 0).decode(errors="replace")
    except OSError as error:
        raise TunnelError("cvmfs", f"{argv[0]} cannot be run: {error}") from None
    finally:
        os.close(output)
        os.close(null)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise TunnelError("cvmfs", f"{path}: {error.strerror}; give --cvmfs-cache DIR on a disk with room") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


async def _keep_trimmed(cache: str, quota: int) -> None:
    while True:
        await asyncio.to_thread(trim, cache, quota)
        await asyncio.sleep(TRIM_INTERVAL)


async def find_cvmfs2(settings: Cvmfs, up: BringUp) -> Installation:
    """The cvmfs2 in a cvmfsexec on PATH, else the one that is installed; raises TunnelError when there is none."""
    wrapper = shutil.which("cvmfsexec", path=search_path())
    problem = ""
    if wrapper is not None:
        try:
            return await _installation_of(wrapper, settings, up)
        except TunnelError as error:
            problem = error.message
    program = shutil.which("cvmfs2", path=search_path())
    if program is not None:
        return Installation(program)
    raise TunnelError("cvmfs" if problem else "program", problem or cvmfs2.MISSING)


async def _installation_of(wrapper: str, settings: Cvmfs, up: BringUp) -> Installation:
    """The installation that a cvmfsexec is: a directory beside it, or in it as an archive that it unpacks itself."""
    path = await asyncio.to_thread(Path(wrapper).resolve)
    found = _relocated(path.parent / "dist")
    if found is None:
        room = up.stack.enter_context(session_room(settings.cache))
        argv = ["/bin/sh", "-c", 'cd "$1" && exec "$2" -v', "sh", room.own, str(path)]
        try:
            _, said = await run_program(up.keeper, argv, env=environment(), deadline=UNPACK_DEADLINE)
        except TimeoutError:
            raise TunnelError("cvmfs", f"{path} did not unpack itself within {UNPACK_DEADLINE:g} s") from None
        places = Path(room.own, ".cvmfsexec", "dist"), path.parent / ".cvmfsexec" / "dist"
        found = next(filter(None, map(_relocated, places)), None)
        if found is None:
            last = said.strip().splitlines()[-1:] or ["it said nothing"]
            raise TunnelError("cvmfs", f"{path} has no cvmfs2, neither in dist beside it nor inside it ({last[0]})")
    return found


def _relocated(root: Path) -> Installation | None:
    program = root / "usr/bin/cvmfs2"
    if not program.is_file():
        return None
    libraries = next((str(root / name) for name in ("usr/lib64", "usr/lib") if (root / name).is_dir()), "")
    return Installation(str(program), str(root), libraries)
