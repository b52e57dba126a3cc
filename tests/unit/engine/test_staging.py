"""Tasks with files: what an input that cannot be had makes of its task."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcq import messages as m
from hpcq.files.wire import SourceError
from hpcq.pilot.lanes import Report
from hpcq.pilot.staging import Staging
from vpn import TunnelError


def staged(scratch: Path, kind: str, verdict: str, spawn_error: Exception) -> m.TaskResult:
    """The result of a task with one input that cannot be had."""
    told: list[Report] = []

    async def spawn(*_: object, **__: object) -> Any:
        raise spawn_error

    async def thread(function: Any, *args: Any, **_: Any) -> Any:
        return function(*args)

    async def judge() -> str:
        return verdict

    async def obtain(*_: object, **__: object) -> int:
        raise SourceError("the manager has it no more")

    async def whole() -> None:
        contents: Any = SimpleNamespace(thread=thread, obtain=obtain, hang_up=lambda: None)
        staging = Staging(scratch, contents, spawn, judge, lambda _: None, told.append, {})
        given = m.InputSpec("data", kind, b"d", 0, "http://wan.test/data", cache=kind != "url")
        task = m.TaskSpec(1, b"", b"true", files=m.FileSpec([given], []))
        staging.take(m.Run([], [task], []))
        await staging.idle.wait()
        await staging.abandon()

    asyncio.run(whole())
    (result,) = [result for report in told for result in report.results]
    return result


DOWN = "tunnel: gone"


@pytest.mark.parametrize(
    ("kind", "verdict", "error", "outcome"),
    [
        ("url", "", SourceError("404 Not Found"), "files"),
        ("url", DOWN, SourceError("timed out"), "network"),
        ("url", "", TunnelError("namespace", "its holder has ended"), "network"),
        ("file", DOWN, SourceError("unused"), "files"),
    ],
)
def test_an_url_that_cannot_be_had_while_the_tunnel_is_down_is_not_the_tasks_fault(
    tmp_path, kind, verdict, error, outcome
):
    result = staged(tmp_path, kind, verdict, error)
    assert result.outcome == outcome
    assert "http://wan.test/data" in result.message
