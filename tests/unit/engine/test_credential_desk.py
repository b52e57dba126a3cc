"""Credentials for pilots, of one gateway or of several."""

import asyncio

import pytest

from hpcq import messages as m
from hpcq.credentials import LAST, QUICK, CredentialDesk
from hpcq.roster import Entry
from vpn import GatewayError


class Gateways:
    """What gateways answer; ``down`` are those that do not."""

    def __init__(self):
        self.down, self.asked, self.revoked, self.count = set(), [], [], 0

    def issue(self, gateway, label, deadline):
        self.asked.append((gateway, deadline))
        if gateway in self.down:
            raise GatewayError(f"gateway {gateway!r} was killed")
        self.count += 1
        return f"user-{self.count}", f"{gateway} for {label}".encode()

    def revoke(self, gateway, username):
        self.revoked.append((gateway, username))
        if gateway in self.down:
            raise GatewayError(f"gateway {gateway!r} was killed")


class Link:
    def __init__(self):
        self.is_open, self.sent = True, []

    def send(self, message):
        self.sent.append(message)


def pilot(number, gateway="a,b"):
    return Entry(f"p{number}", "local", "1", 0, "cn1", 1, 1, 1, "relay", gateway, 0.0)


@pytest.fixture
def gateways():
    return Gateways()


def run(work):
    async def main():
        tasks = set()

        def spawn(function, *arguments):
            tasks.add(asyncio.get_running_loop().create_task(function(*arguments)))

        result = await work(spawn)
        await asyncio.gather(*tasks)
        return result

    return asyncio.run(main())


async def ask(desk, entry):
    link = Link()
    await desk.issue(link, entry)
    (reply,) = link.sent
    return reply


def test_pilots_are_spread_over_the_gateways_and_revoked_where_they_were_issued(gateways):
    entries = [pilot(number) for number in range(6)]

    async def work(spawn):
        desk = CredentialDesk(gateways, spawn)
        await asyncio.gather(*(ask(desk, entry) for entry in entries))
        assert sorted(entry.tunnel_gateway for entry in entries) == ["a"] * 3 + ["b"] * 3
        issued = [(gateway, username) for entry in entries for username, gateway in entry.credentials.items()]
        for entry in entries:
            for username in list(entry.credentials):
                desk.revoke(entry, username)
                desk.revoke(entry, username)  # twice is once
        return issued

    issued = run(work)
    assert sorted(gateways.revoked) == sorted(issued)
    assert len(issued) == 6


def test_when_one_dies_its_pilots_go_to_the_other(gateways):
    entries = [pilot(number) for number in range(4)]

    async def work(spawn):
        desk = CredentialDesk(gateways, spawn)
        for entry in entries:
            await ask(desk, entry)
        gateways.down = {"a"}
        for entry in entries:
            if entry.tunnel_gateway == "a":
                for username in list(entry.credentials):
                    desk.revoke(entry, username)
                reply = await ask(desk, entry)
                assert reply == m.CredentialReply(f"b for {entry.name}".encode())
        await ask(desk, pilot(8))
        gateways.asked.clear()
        await ask(desk, pilot(9))
        return gateways.asked

    assert run(work) == [("b", QUICK)]  # one that failed is not asked before the other
    assert [entry.tunnel_gateway for entry in entries] == ["b"] * 4


def test_a_pilot_that_asks_again_gets_another_gateway_than_before(gateways):
    entry = pilot(1)

    async def work(spawn):
        desk = CredentialDesk(gateways, spawn)
        return [(await ask(desk, entry)).credential.split()[0] for _ in range(4)]

    assert run(work) == [b"a", b"b", b"a", b"b"]


def test_when_all_are_down_each_is_named_and_the_last_has_the_longest_time(gateways):
    gateways.down = {"a", "b"}
    entry = pilot(1)

    async def work(spawn):
        return await ask(CredentialDesk(gateways, spawn), entry)

    assert run(work) == m.CredentialReply(b"", "gateway 'a' was killed; gateway 'b' was killed")
    assert gateways.asked == [("a", QUICK), ("b", LAST)]
    assert entry.credentials == {}


def test_a_pilot_without_a_gateway_s_name_has_the_default_one(gateways):
    async def work(spawn):
        return await ask(CredentialDesk(gateways, spawn), pilot(1, gateway=""))

    assert run(work).credential == b"default for p1"


def test_a_pilot_that_went_away_meanwhile_has_its_credential_revoked(gateways):
    entry, link = pilot(1), Link()
    link.is_open = False

    async def work(spawn):
        await CredentialDesk(gateways, spawn).issue(link, entry)

    run(work)
    assert link.sent == []
    assert gateways.revoked == [("a", "user-1")]


def test_a_name_that_no_gateway_can_have_is_refused(gateways):
    async def work(spawn):
        return await ask(CredentialDesk(gateways, spawn), pilot(1, gateway="../../etc"))

    assert "cannot be a gateway's name" in run(work).error
    assert gateways.asked == []
