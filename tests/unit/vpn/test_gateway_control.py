"""The control protocol's packets, and what a client that has gone leaves behind."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from vpn.gateway import control, server, store
from vpn.gateway.control import Agreed, Pilot, Refused, Report
from vpn.gateway.outside import Outside
from vpn.gateway.policy import Policy
from vpn.gateway.state import GatewayConfig


def report(count: int) -> Report:
    pilots = [Pilot(f"l{random.random()}" * 10, f"pilot-{number}", "connected", "a") for number in range(count)]
    return Report("g", "h", ["192.0.2.1"], 1, "pin", [], 1.0, pilots)


@pytest.mark.parametrize("answer", [Agreed(), Refused("no"), *map(report, (0, 1, 200, 201, 5000))])
def test_an_answer_comes_back_whole_however_long_it_is(answer):
    parts = []
    for packet in control.packets(answer):
        assert len(packet) <= control.PACKET_LIMIT
        assert not parts or control.whole(parts) is None
        parts.append(control.decode_answer(packet))
    assert control.whole(parts) == answer


def test_a_client_that_is_revoked_while_it_is_connected_is_forgotten_when_that_ends():
    async def main():
        outside = Outside(Policy())
        with outside.slot("p", "h", 80):
            with outside.slot("p", "h", 81):
                outside.forget("p")
            assert list(outside.usage) == ["p"]
        assert not outside.usage
        with outside.slot("p", "h", 80):
            pass
        assert list(outside.usage) == ["p"]  # it has not ended: its figures stay
        outside.forget("p")
        assert not outside.usage

    asyncio.run(main())


def test_a_disk_that_hangs_holds_up_no_credential(tmp_path, monkeypatch):
    disk = threading.Event()
    monkeypatch.setattr(store, "write_private", lambda _path, _data: disk.wait())
    monkeypatch.setattr(server, "DISK_PATIENCE", 0.01)

    async def main():
        gateway = server.Server(GatewayConfig(), tmp_path, tmp_path)
        gateway.refusal = "no ocserv here"
        try:
            issued = [await asyncio.wait_for(gateway.issue("p"), 60) for _ in range(3)]
            assert [gateway.book.is_known(username) for username, _ in issued] == [True] * 3
            await asyncio.wait_for(gateway.revoke(issued[0][0]), 60)
        finally:
            disk.set()
            await gateway.close()

    asyncio.run(main())
