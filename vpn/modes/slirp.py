"""Mode ``slirp``: a namespace whose only way out is pasta or slirp4netns, over the node's own outside access.

For nodes that can reach outside, but where tasks are to have a network of their own: nothing of the host's loopback,
no ports of other jobs. Sequence: the namespace → pasta, which is faster, or slirp4netns where that is missing, old or
does not come up, attached, with IPv6 where the node has a route for it → name servers: its own forwarder, which asks
the node's. There is no gateway, so no credential. When the program ends by itself it is started again, and programs
inside go on, without the connections they had; only when that fails again and again the tunnel is lost. It is lost as
well when nothing comes from outside for a while and the name server, which has answered before, does not any more.

An old pasta (seen with that of March 2023) does not tell a program that its peer has closed when the program had ended
its own direction before: so it is used only where there is nothing else.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vpn.asking import until_silent
from vpn.config import TunnelConfig
from vpn.errors import TunnelError
from vpn.gateway.addresses import UPLINK_DNS, UPLINK_GUEST
from vpn.kept import Kept, Tally
from vpn.modes.base import BringUp, TunnelInfo, stop
from vpn.namespace import Namespace, open_namespace
from vpn.pipes import read_lines
from vpn.process import Client, run
from vpn.programs import environment, find_program, missing_program, search_path
from vpn.pulse import Pulse
from vpn.relay import dns
from vpn.uplink import DEVICE, MTU, Uplink, start_pasta, start_uplink

STACKS = ("pasta", "slirp4netns")
FIRST_GOOD = 2024  # the year of pasta's version
VERSION_DEADLINE = 10.0
ASK_DEADLINE = 5.0  # seconds a name server has to answer: any answer will do
_ANSWER = 4096  # bytes: what an answer may bring, and what the stack says by itself
_ANYWHERE = "0" * 32 + " 00"  # destination and prefix length of a default route in /proc/net/ipv6_route


class SlirpTunnel:
    """The namespace and its slirp4netns."""

    def __init__(self, namespace: Namespace, info: TunnelInfo) -> None:
        self._namespace = namespace
        self._info = info

    @property
    def client(self) -> Client:
        """The holder, which starts programs inside."""
        return self._namespace.client

    def info(self) -> TunnelInfo:
        """As it came up."""
        return self._info


async def bring_up(config: TunnelConfig, up: BringUp) -> SlirpTunnel:
    """Bring it up; raises TunnelError naming the layer."""
    programs = find_stacks()
    up.step = ("user namespaces", "making a namespace")
    namespace = await open_namespace(up.keeper, new_session=up.new_session)
    up.stack.push_async_callback(namespace.close)
    namespace.client.lost.add_done_callback(lambda future: up.lose(future.result()))
    up.step = ("tun", "trying /dev/net/tun")
    os.close(await namespace.open_tun("probe"))  # refused, this says why; slirp4netns would not
    name, passed_over = await _attach(programs, namespace, config, up)
    servers = list(config.dns) or [UPLINK_DNS]
    await namespace.resolve_with(servers, search_domains())
    await _watch(namespace, servers[0], config, up)
    seconds = up.keeper.loop.time() - up.started_at
    info = TunnelInfo("slirp", name, "", seconds, UPLINK_GUEST, MTU, dns=tuple(servers), passed_over=tuple(passed_over))
    return SlirpTunnel(namespace, info)


def find_stacks() -> list[str]:
    """Those of pasta and slirp4netns that are installed, the faster first; raises TunnelError when there is none."""
    found = [name for name in STACKS if shutil.which(name, path=search_path())]
    if not found:
        raise TunnelError("program", f"{missing_program('slirp4netns')}; pasta (package passt) does as well")
    return found


def in_order(programs: Sequence[str], version: str) -> list[str]:
    """Which of the programs found to try, one after the other; ``version`` is what pasta says of its own. Pure."""
    year = re.search(r"20[2-9]\d", version)
    last = "" if year is not None and int(year[0]) >= FIRST_GOOD else "pasta"
    return sorted(programs, key=lambda name: name == last)


async def _pasta_version(keeper: Client) -> str:
    try:
        _, text = await run(keeper, [find_program("pasta"), "--version"], env=environment(), deadline=VERSION_DEADLINE)
    except (OSError, TimeoutError):
        return ""
    return text.partition("\n")[0]


async def _attach(
    programs: list[str], namespace: Namespace, config: TunnelConfig, up: BringUp
) -> tuple[str, list[str]]:
    """The first of the programs that comes up: its name, and a line for each that did not."""
    problems: list[str] = []
    version = await _pasta_version(up.keeper) if len(programs) > 1 else ""
    for name in in_order(programs, version):
        up.step = ("tunnel", f"starting {name}")
        try:
            await _keep(name, namespace, config, up)
        except (TunnelError, OSError) as error:
            reason = error.message if isinstance(error, TunnelError) else str(error)
            problems.append(f"{name} passed over: {reason}")
        else:
            return name, problems
    raise TunnelError("tunnel", "; ".join(problems))


async def _keep(name: str, namespace: Namespace, config: TunnelConfig, up: BringUp) -> None:
    """Attach it, and again when it ends by itself; that it cannot be kept loses the tunnel."""
    one = _Attached(name, namespace, config, up.keeper)
    kept = Kept(name, one.start, one.close, Tally())
    try:
        await kept.start()
    except BaseException:
        await kept.close()
        raise
    up.stack.push_async_callback(kept.close)
    kept.failed.add_done_callback(
        lambda failed: None if failed.cancelled() else up.lose(TunnelError("tunnel", failed.result()))
    )


async def _watch(namespace: Namespace, server: str, config: TunnelConfig, up: BringUp) -> None:
    """Ask a name server from inside, now and then while it is quiet; its silence loses the tunnel."""
    fd, _ = await namespace.listen("::" if ":" in server else "0.0.0.0", udp=True)  # noqa: S104  (in the namespace)
    sock = up.stack.enter_context(socket.socket(fileno=fd))
    sock.setblocking(False)
    now = up.keeper.loop.time()
    pulse = Pulse(config.probe_interval, config.reconnect_timeout, now=now, proven=False, answer=_ANSWER)
    pulse.due = now  # one that never answered is not missed: so let it

    deadline = min(ASK_DEADLINE, config.probe_interval)

    async def until_lost() -> None:
        silent = await until_silent(pulse, lambda: ask(sock, server, deadline), lambda: received(namespace.pid))
        up.lose(silent)

    task = asyncio.create_task(until_lost())
    up.stack.push_async_callback(stop, task)


async def ask(sock: socket.socket, server: str, deadline: float, port: int = 53) -> None:
    """Have any answer of a name server, by a UDP socket; raises TunnelError."""
    loop = asyncio.get_running_loop()
    query = dns.with_id(dns.question("localhost", dns.A), secrets.randbits(16))  # it need not ask others for that
    try:
        async with asyncio.timeout(deadline):
            await loop.sock_sendto(sock, query, (server, port))
            while not dns.answers(query, await loop.sock_recv(sock, 65535)):
                pass
    except TimeoutError:
        text = f"nothing comes from outside any more, and the name server {server} does not answer"
        raise TunnelError("tunnel", text) from None
    except OSError as error:
        text = f"nothing comes from outside any more, and the name server {server}: {error.strerror}"
        raise TunnelError("tunnel", text) from None


def received(pid: int, device: str = DEVICE) -> int | None:
    """The bytes that a device of a process's namespace has received (proc(5), net/dev); None when it is not there."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:
        return None
    found = [line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() == device]
    return int(found[0][0]) if found else None


class _Attached:
    """One of the programs, attached to the namespace."""

    def __init__(self, name: str, namespace: Namespace, config: TunnelConfig, keeper: Client) -> None:
        self._name = name
        self._namespace = namespace
        self._config = config
        self._keeper = keeper
        self._uplink: Uplink | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> asyncio.Future[str]:
        """Start it; returns when it carries packets, with what resolves with the words for its end."""
        output, output_end = os.pipe()
        last: collections.deque[str] = collections.deque(maxlen=1)
        self._reading = asyncio.create_task(_pass_on(self._name, output, last))
        try:
            self._uplink = uplink = await self._launch(output_end)
        except TunnelError as error:
            os.close(output_end)
            output_end = -1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reading), 1)
            raise TunnelError(error.layer, f"{error.message}: {last[0] if last else 'it said nothing'}") from None
        finally:
            if output_end >= 0:
                os.close(output_end)
        ended: asyncio.Future[str] = self._keeper.loop.create_future()

        def on_end(status: asyncio.Future[int]) -> None:
            if not (self._keeper.lost.done() or self._namespace.client.lost.done()):  # then all is over
                ended.set_result(f"{self._name} ended (status {status.result()})")

        uplink.process.ended.add_done_callback(on_end)
        return ended

    async def _launch(self, output: int) -> Uplink:
        six = has_ipv6_route()
        options = [*(["--enable-ipv6"] if six else []), *(["--disable-dns"] if self._config.dns else [])]
        if self._name == "pasta":
            return await start_pasta(self._keeper, self._namespace, six=six, log=output)
        return await start_uplink(self._keeper, self._namespace, options, cwd="/", log=output)

    async def close(self) -> None:
        """End it."""
        if self._uplink is not None:
            uplink, self._uplink = self._uplink, None
            await uplink.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)


async def _pass_on(name: str, output: int, last: collections.deque[str]) -> None:
    """What it says when all is well is nobody's business; what it complains about is for standard error."""
    async for line in read_lines(output):
        last.append(line)
        if name == "slirp4netns" and ("ERROR" in line.upper() or "fail" in line or "cannot" in line.lower()):
            sys.stderr.write(f"{name}: {line}\n")


def has_ipv6_route(routes: Path = Path("/proc/net/ipv6_route")) -> bool:
    """Whether this node has a default route for IPv6 over a device other than lo."""
    try:
        lines = routes.read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith(_ANYWHERE) and line.split()[-1] != "lo" for line in lines)


def search_domains(file: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The node's own search list (resolv.conf(5): the last one counts)."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    lists = [line.split()[1:] for line in lines if line.split()[:1] in (["search"], ["domain"])]
    return lists[-1] if lists else []
