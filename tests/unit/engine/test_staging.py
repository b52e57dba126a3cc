"""Tasks with files: what an input that cannot be had makes of its task."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcq import messages as m
from hpcq.files.wire import SourceError
from hpcq.pilot.lanes import Report
from hpcq.pilot.staging import Staging
from vpn import TunnelError

DATA = "http://wan.test/data"


def staged(scratch: Path, kind: str, verdict: str, spawn: Any, origin: str = DATA) -> m.TaskResult:
    """The result of a task with one input that cannot be had."""
    told: list[Report] = []

    async def thread(function: Any, *args: Any, **_: Any) -> Any:
        return function(*args)

    async def judge() -> str:
        return verdict

    async def obtain(*_: object, **__: object) -> int:
        raise SourceError("the manager has it no more")

    async def whole() -> None:
        contents: Any = SimpleNamespace(thread=thread, obtain=obtain, hang_up=lambda: None)
        staging = Staging(scratch, contents, spawn, judge, lambda _: None, told.append, {})
        given = m.InputSpec("data", kind, b"d", 0, origin, cache=kind != "url")
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
    async def spawn(*_: object, **__: object) -> Any:
        raise error

    result = staged(tmp_path, kind, verdict, spawn)
    assert result.outcome == outcome
    assert "http://wan.test/data" in result.message


def test_an_url_is_not_among_the_arguments_that_every_user_of_the_node_can_see(tmp_path):
    secret = "https://wan.test/data?signature=s3cret"
    given: list[tuple[list[str], bytes]] = []

    async def spawn(argv: list[str], **options: Any) -> Any:
        given.append((argv, os.pread(options["stdin"], 4096, 0)))
        assert os.lseek(options["stdin"], 0, os.SEEK_CUR) == 0
        raise TunnelError("tunnel", "it is enough to have seen this")

    staged(tmp_path, "url", "", spawn, secret)
    [(argv, read)] = given
    assert secret not in " ".join(argv)
    assert read.decode() == secret
