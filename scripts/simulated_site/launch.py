"""The namespaces of the site and their first process.

Three processes: the *launcher* (the command the user started), *init* (pid 1 of the site, reaps orphans) and the
*builder* (brings the site up, runs the user's command). Kill any of them and all is gone: init dies with the
launcher (PDEATHSIG), and with init the kernel ends the rest.

Fails when the machine refuses namespaces (`SiteRefusedError`, with the setting to change).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from simulated_site import kernel
from simulated_site.errors import SiteRefusedError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
SITE_NAMESPACES = (
    kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC
)


def launch(builder: Callable[[], int]) -> int:
    """Run `builder` in a fresh site; its status once everything of the site is gone."""
    enter_namespaces()
    read_end, write_end = os.pipe()  # closes when the launcher dies, before init has asked for PDEATHSIG
    init = os.fork()
    if init == 0:
        os.close(write_end)
        os._exit(_guarded(lambda: _init(read_end, builder)))
    os.close(read_end)
    return _wait_forwarding(init)


def enter_namespaces() -> None:
    """Move this process into the site's namespaces; as an ordinary user, into a user namespace first."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid != 0:
            kernel.unshare(kernel.CLONE_NEWUSER)
            kernel.map_one_id(uid, gid)
        kernel.unshare(SITE_NAMESPACES)
        kernel.mount("none", Path("/"), None, kernel.MS_REC | kernel.MS_PRIVATE)
    except OSError as error:
        raise SiteRefusedError(refusal(error, uid)) from error


def refusal(error: OSError, uid: int) -> str:
    """Why the kernel said no, and which setting would change it."""
    start = f"this machine refuses the namespaces of the simulated site: {error.strerror}"
    if error.errno == errno.ENOSPC:
        return f"{start}; user.max_user_namespaces is used up or 0 (sysctl user.max_user_namespaces=15000)"
    if uid == 0:
        return f"{start}; a container needs CAP_SYS_ADMIN and a seccomp profile that allows unshare and mount"
    return (
        f"{start}; unprivileged user namespaces are switched off: look at the sysctls"
        " kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, and at seccomp"
    )


def _init(launcher_alive: int, builder: Callable[[], int]) -> int:
    """Pid 1 of the site: start the builder, reap whatever ends, leave with the builder's status."""
    kernel.die_with_parent()
    if select.select([launcher_alive], [], [], 0)[0]:
        return 128 + signal.SIGKILL
    os.close(launcher_alive)
    child = os.fork()
    if child == 0:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(_guarded(builder))
    return _wait_forwarding(child)


def _wait_forwarding(child: int) -> int:
    """Wait for `child`, reaping orphans on the way and passing on what we are told."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    while True:
        pid, status = os.wait()
        if pid == child:
            return exit_status(status)


def exit_status(status: int) -> int:
    """A wait status as a shell would show it: 128+N for signal N."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _guarded(function: Callable[[], int]) -> int:
    """Run `function` in a forked child: no exception may travel up into the parent's copy of the stack."""
    try:
        return function()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:  # the last frame of this process: report, then leave
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
