"""Blocking calls of coroutines, in threads that cannot be stopped.

A coroutine that is cancelled while a thread works for it must not go on before the thread has done: what it closes then
(a descriptor, say) the thread would still use, and its number may be another file's by that time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait until the thread behind ``future`` has done, cancelled or not: raises CancelledError after that only."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})  # which does not cancel it; to await it would
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def call(
    workers: Executor, function: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None
) -> T:
    """``function(*args)`` in one of the ``workers``. When the caller is cancelled, what the call made is undone."""
    future = asyncio.get_running_loop().run_in_executor(workers, function, *args)
    try:
        await ended(future)
    except asyncio.CancelledError:
        if not future.cancelled() and future.exception() is None and undo is not None:
            undo(future.result())
        raise
    return future.result()
