"""The credentials' book, password hashes, the file that outlives a gateway."""

from __future__ import annotations

import asyncio
import resource
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import GatewayError
from vpn.gateway.certificate import load_or_make, make_certificate
from vpn.gateway.credentials import UNUSED_LIFETIME, Book, Saved
from vpn.gateway.ocserv import Event
from vpn.gateway.passwords import file_text, hash_password
from vpn.gateway.plane_messages import Figure
from vpn.gateway.store import Store

NOW = 1e9


def state(book):
    (pilot,) = book.pilots({})
    return pilot.state


def issued():
    book = Book()
    return book, book.issue("p", NOW)[0]


def test_a_login_spends_the_password_and_a_reconnect_does_not_again():
    book, user = issued()
    assert [name for name, _ in book.passwords()] == [user]
    assert state(book) == "issued"
    assert book.on_event(Event("connect", user, "11", "198.18.0.5"))
    assert book.passwords() == []
    assert not book.on_event(Event("connect", user, "12", "198.18.0.5"))
    assert not book.on_event(Event("disconnect", user, "11", "198.18.0.5"))
    assert state(book) == "connected"  # the new connection lives
    assert not book.on_event(Event("disconnect", user, "12", "198.18.0.5"))
    assert book.absence(user) == 1
    assert not book.on_event(Event("connect", user, "14", "198.18.0.5"))
    assert book.absence(user) == 0
    assert not book.on_event(Event("disconnect", user, "14", "198.18.0.5"))
    assert book.absence(user) == 2
    assert book.forget(user) == "disconnected"
    assert book.forget(user) == ""
    assert not book.on_event(Event("connect", user, "13", "198.18.0.5"))
    assert not book.is_known(user)


def test_a_report_has_figures_and_no_address_of_those_who_left():
    book, user = issued()
    book.on_event(Event("connect", user, "1", "198.18.0.5"))
    (pilot,) = book.pilots({user: Figure(10, 20, 3, 4)})
    assert (pilot.address, pilot.up, pilot.down, pilot.connections) == ("198.18.0.5", 10, 20, 3)
    book.on_event(Event("disconnect", user, "1", "198.18.0.5"))
    assert book.pilots({})[0].address == ""


def test_an_unused_credential_expires_a_used_one_does_not():
    book, user = issued()
    assert book.expired(NOW + UNUSED_LIFETIME - 1) == []
    assert book.expired(NOW + UNUSED_LIFETIME) == [user]
    book.on_event(Event("connect", user, "1", "a"))
    assert book.expired(NOW + 2 * UNUSED_LIFETIME) == []


def test_a_gateway_that_is_started_again_takes_a_used_password_once_more():
    book, used = issued()
    unused, _ = book.issue("q", NOW + 10)
    book.on_event(Event("connect", used, "1", "a"))
    hashes = {one.username: one.hash for one in book.saved()}
    again = Book()
    again.restore(book.saved(), NOW + 100)
    assert dict(again.passwords()) == hashes
    assert {pilot.username: pilot.state for pilot in again.pilots({})} == {used: "restored", unused: "issued"}
    assert again.expired(NOW + 10 + UNUSED_LIFETIME) == [unused]
    assert again.on_event(Event("connect", used, "1", "a"))
    assert [name for name, _ in again.passwords()] == [unused]
    assert [one.used for one in again.saved()] == [True, False]


def test_what_is_restored_expires_and_what_had_expired_is_not_restored():
    book, used = issued()
    book.issue("q", NOW)
    book.on_event(Event("connect", used, "1", "a"))
    later = NOW + 5 * UNUSED_LIFETIME
    again = Book()
    again.restore(book.saved(), later)
    assert [name for name, _ in again.passwords()] == [used]
    assert again.expired(later + UNUSED_LIFETIME) == [used]


@given(st.floats(-1e12, 1e12))
def test_a_clock_that_was_set_makes_nothing_last_longer(shift):
    book, _ = issued()
    again = Book()
    again.restore(book.saved(), NOW + shift)
    assert len(again.expired(NOW + shift + UNUSED_LIFETIME)) == len(again.passwords())


@pytest.mark.parametrize(
    ("password", "salt", "rounds", "hashed"),
    [  # of the specification's own test vectors
        ("Hello world!", "saltstringsaltst", 10000, "3xv.VbSHBb41AL9AvLeujZkZRBAwqFMz2.opqey6IcA"),
        ("This is just a test", "toolongsaltstrin", 5000, "Un/5jzAHMgOGZ5.mWJpuVolil07guHPvOW8mGRcvxa5"),
        (
            "we have a short salt string but not a short password",
            "short",
            77777,
            "JiO1O3ZpDAxGJeaDIuqCoEFysAe1mZNJRs3pw0KQRd/",
        ),
    ],
)
def test_hashes_are_those_of_crypt(password, salt, rounds, hashed):
    assert hash_password(password, salt, rounds) == f"$5$rounds={rounds}${salt}${hashed}"


@given(st.text(max_size=64))
def test_a_password_line_has_three_fields(password):
    line = file_text([("user", hash_password(password))])
    assert line.count(":") == 2
    assert line.startswith("user:*:$5$")
    assert line.endswith("\n")
    assert len(line) < 500  # ocserv reads no longer line


def test_the_store_keeps_and_replaces(tmp_path):
    contents = [Saved("l", "u", "h", b"d", 1.5, True)]
    store = Store(tmp_path / "file", lambda: contents)
    assert store.load() == []

    async def main():
        await store.save()
        assert store.load() == contents
        assert store.path.stat().st_mode & 0o777 == 0o600
        contents.append(Saved("m", "v", "h", b"d", 2.5, False))
        await asyncio.gather(*(store.save() for _ in range(10)))
        assert store.load() == contents

    asyncio.run(main())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_store_that_cannot_be_written_or_read_is_said_and_survived(tmp_path, caplog):
    store = Store(tmp_path / "no" / "file", list)

    async def main():
        await store.save()
        await store.save()

    asyncio.run(main())
    assert len(caplog.records) == 1
    assert "will not outlive this gateway" in caplog.text
    (tmp_path / "file").write_text("[{}]")
    assert Store(tmp_path / "file", list).load() == []
    assert "cannot be read" in caplog.text


@contextmanager
def full_disk(room):
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_no_half_certificate(tmp_path):
    with full_disk(300), pytest.raises(GatewayError, match=r"cannot be kept: .*large"):  # the key is shorter than that
        load_or_make(tmp_path, "g")
    assert load_or_make(tmp_path, "g") == load_or_make(tmp_path, "g")


@pytest.mark.parametrize("damage", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n", "other"])
def test_a_damaged_certificate_is_said_to_be(tmp_path, damage):
    load_or_make(tmp_path, "g")
    other = make_certificate("g")[1].decode()
    (tmp_path / "server-cert.pem").write_text(other if damage == "other" else damage)
    with pytest.raises(GatewayError, match="remove both"):
        load_or_make(tmp_path, "g")
