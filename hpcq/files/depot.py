"""The manager's end of parcels: gives arguments out, takes results in. See `haul` for what is said.

A parcel of arguments is here from ``submit`` until its task is done, so that an attempt elsewhere can have it. A result
arrives before its pilot says that the task has ended; until then it is dropped with the pilot, and with the task, which
may have been cancelled or have ended elsewhere meanwhile. At most `THREADS`
connections are served at a time, the others wait; those that have nothing to say make room.

What is not written by its own thread is changed under the lock; what is public is called in the manager's thread.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hpcq.errors import HpcqError
from hpcq.files import haul
from hpcq.files.haul import Haul
from hpcq.files.wire import DataError, describe
from hpcq.parcels import Parcel, Shelf

log = logging.getLogger("hpcq.files")

THREADS = 16
"""Connections served at a time."""

IDLE = 5.0
"""Seconds a connection is kept that nothing comes on."""

FAREWELL = 2.0
"""Seconds their threads have to end; one in a handshake or at a slow disk is left to end by itself."""


class _Guest(NamedTuple):
    """A connection that waits to be served."""

    sock: socket.socket
    pilot: str
    where: str


class Depot:
    """All parcels of one queue. ``tls`` is the manager's side; new ones are made on `shelf`. ``is_open`` says whether a
    task is not done yet; called in any thread.
    """

    def __init__(self, tls: ssl.SSLContext, shelf: Shelf) -> None:
        self.shelf = shelf
        self.is_open: Callable[[int], bool] = lambda _task: True
        self._tls = tls
        self._lock = threading.Lock()
        self._outgoing: dict[int, Parcel] = {}
        self._arrived: dict[tuple[int, str], Parcel] = {}
        self._reported: dict[tuple[int, str], Parcel] = {}
        self._waiting: deque[_Guest] = deque()
        self._serving: dict[Haul, str] = {}
        self._idle: set[Haul] = set()
        self._present: set[str] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    # --- parcels ---

    def give_out(self, task: int, parcel: Parcel) -> None:
        """Keep the arguments of a task until `done`."""
        self._outgoing[task] = parcel

    def done(self, task: int) -> None:
        """Nobody will want its arguments, or more results of it."""
        if self._outgoing:
            self._outgoing.pop(task, None)
        if self._arrived:
            with self._lock:
                for key in [key for key in self._arrived if key[0] == task]:
                    del self._arrived[key]

    def reported(self, task: int, pilot: str) -> bool:
        """The pilot says that the task has ended with a result it has brought; whether it has."""
        with self._lock:
            parcel = self._arrived.pop((task, pilot), None)
        if parcel is not None:
            self._reported[task, pilot] = parcel
        return parcel is not None

    def claim(self, task: int, pilot: str) -> Parcel:
        """The result of a task, for its user."""
        return self._reported.pop((task, pilot))

    def forget(self, reports: Iterable[tuple[int, str]]) -> None:
        """Nobody wants the results of these tasks from these pilots any more, if there are any."""
        if self._reported:
            for report in reports:
                self._reported.pop(report, None)

    # --- connections ---

    def accept(self, sock: socket.socket, pilot: str, where: str) -> None:
        """Serve this connection of a pilot that is here."""
        with self._lock:
            if self._closed:
                sock.close()
                return
            self._present.add(pilot)
            self._waiting.append(_Guest(sock, pilot, where))
            if len(self._threads) >= THREADS:
                for guest in self._idle:
                    guest.hang_up()
                return
            thread = threading.Thread(target=self._work, name="hpcq-parcels", daemon=True)
            self._threads.add(thread)
        thread.start()

    def pilot_gone(self, pilot: str) -> None:
        """Hang up on it; drop what it brought and did not report."""
        with self._lock:
            self._present.discard(pilot)
            for served, name in self._serving.items():
                if name == pilot:
                    served.hang_up()
            for key in [key for key in self._arrived if key[1] == pilot]:
                del self._arrived[key]

    def close(self) -> None:
        """Hang up on all; their threads end by that."""
        with self._lock:
            self._closed = True
            for guest in self._waiting:
                guest.sock.close()
            self._waiting.clear()
            for served in self._serving:
                served.hang_up()
            threads = list(self._threads)
        deadline = time.monotonic() + FAREWELL
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for parcels in (self._outgoing, self._arrived, self._reported):
            parcels.clear()

    # --- in threads ---

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return
                guest = self._waiting.popleft()
            try:
                self._serve(guest)
            except DataError as error:
                log.debug("a connection of pilot %s for parcels ends: %s", guest.pilot, error)
            except (HpcqError, OSError) as error:
                log.warning("a connection of pilot %s for parcels ends: %s", guest.pilot, error)
            except Exception:  # a fault of ours costs this connection, not one of the threads for all that follow
                log.exception("a connection of pilot %s for parcels", guest.pilot)

    def _serve(self, guest: _Guest) -> None:
        served = haul.answer(guest.sock, self._tls, guest.where)
        with self._lock:
            self._serving[served] = guest.pilot
            wanted = not self._closed and guest.pilot in self._present
        try:
            while wanted:
                self._answer(served, guest.pilot, self._next(served))
                with self._lock:
                    wanted = not self._waiting
        finally:
            with self._lock:
                del self._serving[served]
            served.close()

    def _next(self, served: Haul) -> haul.Request:
        with self._lock:
            self._idle.add(served)
        try:
            request = served.receive(haul.Request, IDLE)
        finally:
            with self._lock:
                self._idle.discard(served)
        assert isinstance(request, haul.Take | haul.Bring)
        return request

    def _answer(self, served: Haul, pilot: str, request: haul.Request) -> None:
        if isinstance(request, haul.Bring):
            served.send(haul.Kept(self._keep(served, pilot, request)))
            return
        parcel = self._outgoing.get(request.task)
        if parcel is None:
            served.send(haul.Refusal(f"task {request.task} is not waiting for its arguments any more"))
        else:
            served.send(haul.Following(parcel.size))
            served.send_parcel(parcel)

    def _keep(self, served: Haul, pilot: str, request: haul.Bring) -> str:
        """Take a result in; why that could not be done, or an empty string."""
        parcel, failure = None, ""
        try:
            parcel = self.shelf.new(request.size)
        except OSError as error:
            failure = describe(error)
        failure = served.receive_parcel(parcel, request.size) or failure
        if parcel is None or failure:
            return f"{request.size} bytes: {failure}"
        with self._lock:
            if pilot in self._present and self.is_open(request.task):
                self._arrived[request.task, pilot] = parcel
        return ""
