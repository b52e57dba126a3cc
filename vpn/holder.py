"""The holder: the process that is a namespace. Runs in a fresh, single-threaded Python, started by a keeper.

Sequence: unshare user+net+mount+pid → write the id maps → fork. The child is pid 1 of the pid namespace: when
it dies, by whatever cause, the kernel kills every process inside, and the last reference to the network
namespace goes with them. The parent only waits and is there to carry the death signal. Pid 1: mounts made
slaves → /proc → lo up → ``Ready`` → serves requests (see ``messages``) until its socket ends.

Identity ``user`` maps the caller's own ids to themselves: the holder keeps every capability because it never
execs, while the programs it starts lose theirs at exec and are an ordinary user inside too. Identity ``root``
maps root to the caller, for a server that insists on being root. ``privileged`` is for root itself: no user namespace.
Network ``host`` leaves the network alone: such a
namespace is for mounts only.

Failure cases, each explained by ``explain_unshare``: namespaces forbidden (EPERM, EACCES), used up (ENOSPC),
absent from the kernel (EINVAL); capabilities withheld inside (AppArmor); no tun device.
"""

from __future__ import annotations

import errno
import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from vpn import kernel, netlink
from vpn.errors import TunnelError
from vpn.keeper import Keeper, attach, say
from vpn.messages import (
    Configure,
    Diagnose,
    Done,
    Listen,
    OpenTun,
    PrivateDirectory,
    Redirect,
    Resolve,
    Stage,
    WriteFile,
)
from vpn.redirect import redirect
from vpn.refusals import explain_tun, explain_unshare
from vpn.roots import stage
from vpn.spawn import leave_terminal_alone, raise_file_limit

LISTEN_BACKLOG = 4096
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
# Where a tmpfs may cover what is there: no site keeps data or programs in /sys, as some do in /mnt.
_ROOMS = ("/sys", "/media", "/srv", "/mnt")
_BYPASSES = (  # sockets through which glibc asks a resolver of the host's instead of reading resolv.conf
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/nscd/socket",
    "/var/run/nscd/socket",
)


class Holder(Keeper):
    """A keeper that is pid 1 of a namespace and can configure it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.handlers |= {
            OpenTun: self.on_open_tun,
            Configure: self.on_configure,
            Listen: self.on_listen,
            Redirect: self.on_redirect,
            Resolve: self.on_resolve,
            WriteFile: self.on_write_file,
            PrivateDirectory: self.on_private_directory,
            Stage: self.on_stage,
            Diagnose: self.on_diagnose,
        }

    def report_started(self, request: int, pid: int) -> None:
        """Our pids mean nothing outside: the kernel translates the one in the credentials."""
        self.report(Done(request), pid=pid)

    def on_open_tun(self, message: OpenTun, _fds: list[int]) -> None:
        """Make a tun device; the descriptor belongs to this namespace wherever it is sent."""
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TunnelError("tun", explain_tun(error)) from None
        try:
            flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if message.headers else 0)
            request = struct.pack("16sH22x", message.name.encode(), flags)
            fcntl.ioctl(fd, _TUNSETIFF, request)
            self.report(Done(message.id, message.name), (fd,))
        except OSError as error:
            text = f"cannot make the device {message.name}: TUNSETIFF: {error.strerror}"
            raise TunnelError("tun", text) from None
        finally:
            os.close(fd)

    def on_configure(self, message: Configure, _fds: list[int]) -> None:
        """Address, MTU, up, routes."""
        configure_link(message)
        self.report(Done(message.id))

    def on_listen(self, message: Listen, _fds: list[int]) -> None:
        """A socket that belongs to this namespace wherever it is sent; answered with its port."""
        with listen_inside(message) as sock:
            self.report(Done(message.id, str(sock.getsockname()[1])), (sock.fileno(),))

    def on_redirect(self, message: Redirect, _fds: list[int]) -> None:
        """The rule of nat; it lasts as long as the namespace."""
        redirect(message.device, message.port, six=message.six)
        self.report(Done(message.id))

    def on_resolve(self, message: Resolve, _fds: list[int]) -> None:
        """Bind resolv.conf and a hosts-by-files-and-dns nsswitch.conf; silence name-service daemons."""
        target = os.path.realpath("/etc/resolv.conf")
        if not Path(target).exists():
            raise TunnelError("dns", f"cannot give the namespace its name servers: this host has no {target}")
        bind_text(target, message.text)
        switch = Path("/etc/nsswitch.conf")
        if switch.exists():
            bind_text(os.path.realpath(switch), plain_hosts(switch.read_text(errors="replace")))
        for bypass in _BYPASSES:
            if os.path.exists(bypass):  # noqa: PTH110  (Path.exists raises when a parent may not be searched)
                with suppress(OSError):
                    kernel.mount(os.devnull, os.path.realpath(bypass), None, kernel.MS_BIND)
        self.report(Done(message.id))

    def on_write_file(self, message: WriteFile, _fds: list[int]) -> None:
        """Write a setting, or a file of its own: that is replaced as a whole, and never exists with another mode."""
        path = Path(f"{message.path}.new" if message.mode else message.path)
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | (os.O_CREAT if message.mode else 0)
        with os.fdopen(os.open(path, flags, message.mode), "w") as file:
            file.write(message.text)
        if message.mode:
            path.replace(message.path)
        self.report(Done(message.id))

    def on_private_directory(self, message: PrivateDirectory, _fds: list[int]) -> None:
        """Mount a tmpfs over a directory no program here needs."""
        self.report(Done(message.id, mount_room()))

    def on_stage(self, message: Stage, _fds: list[int]) -> None:
        """Make places to mount on."""
        stage(message.top, message.places, message.shown)
        self.report(Done(message.id))

    def on_diagnose(self, message: Diagnose, _fds: list[int]) -> None:
        """Sockets that tell of this namespace's connections wherever they are sent."""
        with ExitStack() as stack:
            opened = [stack.enter_context(sock) for sock in netlink.diagnosing_sockets()]
            self.report(Done(message.id), tuple(sock.fileno() for sock in opened))


def configure_link(message: Configure) -> None:
    """Perform ``Configure`` by netlink."""
    step = "find"
    try:
        index = socket.if_nametoindex(message.device)
        if message.address:
            step = f"give the address {message.address} to"
            netlink.perform(netlink.ROUTE, [netlink.address_add(index, message.address)])
        step = f"set the MTU {message.mtu} of" if message.mtu else "set up"
        netlink.perform(netlink.ROUTE, [netlink.link_up(index, message.mtu, message.queue)])
        for route in message.routes:
            step = f"add the route {route} through"
            wanted = "0.0.0.0/0" if route == "default" else route
            netlink.perform(netlink.ROUTE, [netlink.route_add(index, wanted)])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TunnelError("tunnel", f"cannot {step} {message.device} in the namespace: {reason}") from None


def listen_inside(message: Listen) -> socket.socket:
    """Perform ``Listen``."""
    family = socket.AF_INET6 if ":" in message.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM if message.udp else socket.SOCK_STREAM)
    try:
        sock.bind((message.address, message.port))
        if not message.udp:
            sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        text = f"cannot listen on {message.address} port {message.port} in the namespace: {error.strerror}"
        raise TunnelError("tunnel", text) from None
    return sock


def plain_hosts(text: str) -> str:
    """An nsswitch.conf whose host names come from files and DNS only (nsswitch.conf(5))."""
    lines = [line for line in text.splitlines() if line.split(":")[0].strip() != "hosts"]
    return "\n".join([*lines, "hosts: files dns", ""])


def mount_room() -> str:
    """Mount a private tmpfs; its path."""
    for path in _ROOMS:
        if Path(path).is_dir():
            kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0700,size=16m")
            return path
    raise TunnelError("user namespaces", f"none of {', '.join(_ROOMS)} exists to mount a private directory on")


def bind_text(target: str, text: str) -> None:
    """Bind a file with this text over ``target``; nothing is left on disk, the file lives in a detached
    tmpfs.
    """
    room = mount_room()
    try:
        source = Path(room, "file")
        source.write_text(text)
        source.chmod(0o644)
        kernel.mount(str(source), target, None, kernel.MS_BIND)
    finally:
        kernel.unmount(room)


def enter(identity: str, network: str) -> None:
    """Leave the caller's namespaces; raises TunnelError with what the site's administrators would change."""
    uid, gid = os.geteuid(), os.getegid()
    inner = (0, 0) if identity == "root" else (uid, gid)
    try:
        own_network = 0 if network == "host" else kernel.CLONE_NEWNET
        if identity == "privileged":
            kernel.unshare(own_network | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
            return
        kernel.unshare(kernel.CLONE_NEWUSER | own_network | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{inner[0]} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{inner[1]} {gid} 1")
    except OSError as error:
        raise TunnelError("user namespaces", explain_unshare(error.errno or 0)) from None


def furnish(network: str) -> list[str]:
    """Mounts and lo of the new namespaces; returns what was refused but can be done without."""
    notes = []
    try:
        # Slaves, not private: what the host's automounter mounts later (CVMFS, home) must appear inside too.
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_SLAVE)
        if network != "host":
            loopback_up()
    except OSError as error:
        raise TunnelError("user namespaces", explain_unshare(error.errno or errno.EPERM, inside=True)) from None
    try:
        kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except OSError as error:
        notes.append(f"/proc shows the host's process ids: mounting it was refused ({error.strerror})")
    return notes


def loopback_up() -> None:
    """Set lo up with SIOCSIFFLAGS (netdevice(7)); it then has its address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS


def serve(sock: socket.socket, alive: int, network: str) -> None:
    """Pid 1: die with the outer process, furnish, serve."""
    kernel.die_with_parent(signal.SIGKILL)
    holder = Holder(sock)
    holder.selector.register(alive, selectors.EVENT_READ, lambda: sys.exit(1))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        notes = furnish(network)
    except TunnelError as error:
        say(sock, error.layer, error.message)
        return
    holder.run(notes)


def main(argv: list[str]) -> None:
    """FD PARENT IDENTITY NETWORK: become two processes, the outer one waiting for the inner."""
    leave_terminal_alone()
    raise_file_limit()
    sock = attach(argv)
    sock.set_inheritable(False)
    try:
        enter(argv[2], argv[3])
    except TunnelError as error:
        say(sock, error.layer, error.message)
        sock.close()
        sys.exit(1)
    kernel.die_with_parent(signal.SIGKILL)  # a change of credentials may have cleared it
    alive, hold = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        serve(sock, alive, argv[3])
        os._exit(0)
    os.close(alive)
    sock.close()
    os.waitpid(pid, 0)
    os._exit(0)
