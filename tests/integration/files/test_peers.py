"""Pilots that take contents from each other, when the one that gives dies, breaks or lies in the middle of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hpcq import connection, state_dir
from hpcq.files import wire
from hpcq.files.cache import Cache
from hpcq.files.digests import of_bytes
from hpcq.identity import make_identity
from hpcq.pilot.contents import Contents

DATA = bytes(range(256)) * 40_000
"""Several chunks of it."""

GIVER = """
import asyncio, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from hpcq import connection
from hpcq.files import wire
from hpcq.files.cache import Cache
from hpcq.pilot.contents import Contents

how, file, scratch = sys.argv[1:]
DATA = bytes(range(256)) * 40_000

class Giver(Contents):
    async def _give(self, channel, request):
        await channel.send(wire.Coming())
        if how == "lies":
            await channel.send_stream(iter([DATA[::-1]]))
            return
        await channel._send_piece(DATA[: len(DATA) // 2])
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        channel.close()

async def main():
    link = SimpleNamespace(info=connection.read(Path(file)), send=lambda message: None)
    giver = Giver(Cache(Path(scratch), 1 << 30), "giver", link, lambda digests: None)
    print(await giver.serve(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


class Taker(Contents):
    """One whose manager first names a peer, then, when that is to be avoided, gives the content itself."""

    peer: wire.Peer

    async def _ask_manager(self, digest, size, task, descriptor, avoid):
        self.asked = [*getattr(self, "asked", []), sorted(avoid)]
        if self.peer.pilot not in avoid:
            return wire.Elsewhere(self.peer)
        os.write(descriptor, DATA)
        return None


@pytest.mark.parametrize("how", ["dies", "breaks", "lies"])
def test_what_a_peer_has_not_given_whole_is_taken_elsewhere(how, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state_dir.ensure_queue_dir("q")
    identity = make_identity("q")
    info = connection.ConnectionInfo("q", 1, [], 1, "here", os.getpid(), identity.authority, identity.pilot)
    connection.write(info)
    file = state_dir.connection_file("q")
    (tmp_path / "giver").mkdir()
    argv = [sys.executable, "-c", GIVER, how, str(file), str(tmp_path / "giver")]

    async def take(port):
        told = []
        taker = Taker(Cache(tmp_path, 1 << 30), "taker", SimpleNamespace(info=info, send=print), told.extend)
        taker.peer = wire.Peer("giver", ["127.0.0.1"], port)
        try:
            content = of_bytes(DATA)
            descriptor = await taker.obtain(content.digest, content.size, 1)
            assert os.pread(descriptor, len(DATA) + 1, 0) == DATA
            os.close(descriptor)
            assert taker.asked == [[], ["giver"]]
            assert told == [content.digest]
            assert taker.cache.digests() == [content.digest]
            assert not list((taker.cache.root / "parts").iterdir())
        finally:
            await taker.close()

    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as giver:
        asyncio.run(asyncio.wait_for(take(int(giver.stdout.readline())), 90))
        giver.stdin.close()
        assert giver.wait(90) == (-9 if how == "dies" else 0)
