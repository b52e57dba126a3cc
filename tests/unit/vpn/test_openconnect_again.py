"""An openconnect that is to log in again, at a server that takes the connection and says nothing."""

import asyncio
from types import SimpleNamespace

import pytest

from vpn.modes import openconnect


class Silent:
    """A process that waits for its server."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def end(self) -> None:
        self.ended.set_result(0)


@pytest.mark.parametrize("patience", [0.0, 0.01])
def test_a_silent_server_is_given_up_and_its_openconnect_ended(monkeypatch, patience):
    started = []

    async def start(*_: str) -> Silent:
        started.append(Silent())
        return started[-1]

    async def log_in_again():
        up = SimpleNamespace(keeper=SimpleNamespace(loop=asyncio.get_running_loop()))
        config = SimpleNamespace(mode="openconnect", dtls=False, mtu=0, direct=())
        tunnel = openconnect.OpenconnectTunnel(config, SimpleNamespace(), up)
        tunnel.server = "gateway.example"
        monkeypatch.setattr(tunnel, "_start", start)
        return await tunnel._log_in_again("openconnect", "shim", patience)

    monkeypatch.setattr(openconnect, "LOGIN_DEADLINE", 0.01)
    monkeypatch.setattr(openconnect, "LOGIN_PAUSE", 0.0)
    error = asyncio.run(log_in_again())
    assert error.layer == "gateway"
    assert error.message == "gateway.example did not answer a login in 0.01 s"
    assert started
    assert all(process.ended.done() for process in started)
