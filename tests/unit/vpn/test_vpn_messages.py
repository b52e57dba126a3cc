"""Messages, and texts of files."""

from __future__ import annotations

import base64
import hashlib

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from vpn.capabilities import Check, uses_of
from vpn.errors import LAYERS, TunnelError
from vpn.gateway import control, ocserv, state
from vpn.gateway.certificate import make_certificate, pin_of
from vpn.gateway.ocserv import Event
from vpn.holder import plain_hosts
from vpn.messages import Configure, Done, Exited, Failed, Kill, Ready, Report, Request, Spawn
from vpn.namespace import resolv_conf

blobs = st.binary()
numbers = st.integers(0, 2**31)
requests = st.one_of(
    st.builds(
        Spawn,
        numbers,
        st.lists(blobs),
        st.dictionaries(blobs, blobs),
        blobs,
        st.lists(numbers),
        st.booleans(),
    ),
    st.builds(Kill, numbers, numbers, st.booleans()),
    st.builds(Configure, numbers, st.text(), st.text(), numbers, st.lists(st.text())),
)
reports = st.one_of(
    st.builds(Ready, st.lists(st.text())),
    st.builds(Done, numbers, st.text(), numbers),
    st.builds(Failed, numbers, st.sampled_from(sorted(LAYERS)), st.text(), numbers),
    st.builds(Exited, numbers, st.integers(-64, 255)),
)


@given(requests)
def test_requests_survive_the_wire(message):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Request) == message


@given(reports)
def test_reports_survive_the_wire(message):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Report) == message


@given(requests)
def test_a_request_is_no_report(message):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Report)


@given(st.binary())
def test_control_garbage_is_refused(data):
    for decode in (control.decode_request, control.decode_answer):
        with pytest.raises(msgspec.DecodeError):
            decode(data)


@given(st.one_of(st.builds(control.Issue, st.text()), st.builds(control.Revoke, st.text()), st.just(control.Stop())))
def test_control_requests_survive_the_wire(request):
    assert control.decode_request(control.encode(request)) == request


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("connect u 1 198.18.0.1", Event("connect", "u", "1", "198.18.0.1")),
        ("", None),
        ("connect u", None),
        ("host-update u 1 a", None),
    ],
)
def test_events(line, event):
    assert ocserv.parse_event(line) == event


def test_pin_is_of_the_public_key():
    key, certificate = make_certificate("x" * 80)
    public = serialization.load_pem_private_key(key, None).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert pin_of(certificate) == "pin-sha256:" + base64.b64encode(hashlib.sha256(der).digest()).decode()
    assert x509.load_pem_x509_certificate(certificate).subject.rfc4514_string().startswith("CN=hpcq gateway x")


def test_ocserv_configuration_has_every_name_server():
    text = ocserv.configuration("/mnt", 4433, ["192.0.2.53", "192.0.2.54"], "192.0.2.1")
    assert "listen-host = 192.0.2.1\n" in text
    assert "listen-host" not in ocserv.configuration("/mnt", 4433, [], "")
    assert "udp-port = 4433" in text
    assert text.count("\ndns = ") == 2


def test_resolv_conf():
    assert resolv_conf(["a", "b", "c", "d"], ["x.org"]).splitlines()[:4] == [
        "nameserver a",
        "nameserver b",
        "nameserver c",
        "search x.org",
    ]


def test_host_names_come_from_dns_only():
    text = plain_hosts("passwd: files sss\nhosts: files resolve [!UNAVAIL=return] dns\n")
    assert text.splitlines() == ["passwd: files sss", "hosts: files dns"]


def test_what_a_host_can_be_used_for():
    checks = [Check(name, name != "tun", "") for name in ("user namespaces", "tun", "openconnect", "tun_from_fd")]
    assert uses_of(checks)["mode openconnect"] == ["tun"]


def test_an_error_names_its_layer():
    assert str(TunnelError("dns", "no")) == "dns: no"
    assert TunnelError("dns", "no").exit_status == 5


def test_sockets_go_elsewhere_when_the_state_directory_cannot_hold_them(tmp_path):
    assert state.socket_directory(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())
    other = state.socket_directory(tmp_path, holds_sockets=lambda _: False)
    assert other.stat().st_mode & 0o777 == 0o700
    state.remove_socket_directory(other)
    state.remove_socket_directory(tmp_path)
    assert not other.exists()
    assert tmp_path.exists()
