"""One question of the command line to a manager: connect, ask, close. Blocking, in the calling thread."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from hpcq import connection as conn
from hpcq import messages as m
from hpcq import transport
from hpcq.errors import HpcqError, QueueNotFoundError
from hpcq.protocol import Connection

ANSWER_TIMEOUT = 20.0
"""Seconds a manager has for its answer."""


def ask(queue: str, topic: str, body: object = None) -> Any:
    """What the manager of ``queue`` answers to ``topic`` (``pilots``, ``status``, ``jobs_submitted``).

    Raises:
        QueueNotFoundError: no such queue, or its manager cannot be reached or does not answer.
        AuthenticationError: the manager's key is not the one in the connection file.
        HpcqError: the manager answered with an error.
    """
    return ask_at(conn.find(queue), topic, body)


def ask_at(info: conn.ConnectionInfo, topic: str, body: object = None) -> Any:
    """As `ask`, for a connection file already read."""
    return asyncio.run(_ask(info, topic, msgspec.json.encode(body)))


async def _ask(info: conn.ConnectionInfo, topic: str, body: bytes) -> Any:
    received: asyncio.Queue[Any] = asyncio.Queue()

    def on_messages(_link: transport.Link, messages: list[Any]) -> None:
        for message in messages:
            received.put_nowait(message)

    def on_closed(_link: transport.Link, reason: str) -> None:
        received.put_nowait(QueueNotFoundError(f"the manager of queue {info.queue!r} hung up: {reason}"))

    def make() -> transport.Link:
        return transport.Link(Connection(m.FirstAnswer, m.ToClient), on_messages, on_closed)

    link = await transport.connect(info, make)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            link.send(m.ClientHello(m.PROTOCOL_VERSION, socket.gethostname()))
            _expect(await received.get(), m.Welcome)
            link.send(m.Ask(topic, body))
            answer = _expect(await received.get(), m.Answer)
    except TimeoutError as error:
        raise QueueNotFoundError(
            f"the manager of queue {info.queue!r} (process {info.pid} on {info.hostname}) gave no answer "
            f"within {ANSWER_TIMEOUT:.0f} s; it may be stopped or overloaded"
        ) from error
    finally:
        link.abort("done")
    if answer.error:
        raise HpcqError(answer.error)
    return msgspec.json.decode(answer.body)


def _expect(message: Any, kind: type) -> Any:
    if isinstance(message, kind):
        return message
    if isinstance(message, Exception):
        raise message
    if isinstance(message, m.Refused):
        raise QueueNotFoundError(f"the manager refused: {message.reason}")
    raise HpcqError(f"unexpected answer {type(message).__name__} from the manager")
