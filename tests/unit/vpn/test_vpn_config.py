"""Settings, credentials and secrets."""

from __future__ import annotations

import copy
import ipaddress
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.config import MODES, Credential, Secret, TunnelConfig, check_honoured, parse_server, split_networks
from vpn.errors import UsageError, VpnError
from vpn.gateway.state import GatewayConfig, check_name
from vpn.modes.direct import tunnelled

PIN = "pin-sha256:" + "A" * 43 + "="


def credential(**changes):
    values = {
        "addresses": ("192.0.2.1",),
        "port": 443,
        "pin": PIN,
        "username": "u",
        "password": Secret("hunter2"),
    }
    return Credential(**(values | changes))


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, lambda it: f"{it}"])
def test_a_secret_does_not_show_itself(show):
    for thing in (Secret("hunter2"), credential(), TunnelConfig("openconnect", credential())):
        assert "hunter2" not in show(thing)


def test_a_secret_is_not_pickled():
    for thing in (Secret("x"), credential()):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)


def test_secrets_compare_and_copy():
    assert Secret("a") == Secret("a") != Secret("b")
    assert copy.deepcopy(credential()) == credential()
    with pytest.raises(TypeError):
        hash(Secret("a"))


passwords = st.text(st.characters(codec="utf-8", exclude_characters="\n"))


@given(passwords, st.integers(1, 65535), st.lists(st.ip_addresses().map(str), min_size=1, max_size=4))
def test_a_credential_survives_the_wire(password, port, addresses):
    sent = credential(password=Secret(password), port=port, addresses=tuple(addresses), mtu=16000, dtls=False)
    assert Credential.from_bytes(sent.to_bytes()) == sent


@given(st.binary())
def test_bytes_are_a_credential_or_refused(data):
    with pytest.raises(VpnError):
        Credential.from_bytes(data)


def test_a_refused_credential_is_not_quoted():
    with pytest.raises(UsageError) as caught:
        Credential.from_bytes(b'{"password": "hunter2"}')
    assert "hunter2" not in repr(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ()},
        {"addresses": ("-oProxy",)},
        {"addresses": ("a b",)},
        {"port": 0},
        {"port": 70000},
        {"pin": "sha256:x"},
        {"username": ""},
        {"username": "-u"},
        {"username": "a\nb"},
        {"password": Secret("a\nb")},
    ],
)
def test_bad_credentials_are_refused(changes):
    with pytest.raises(UsageError):
        credential(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "wish"},
        {"credential": None},
        {"bring_up_timeout": 0},
        {"dtls_timeout": -1},
        {"mtu": 100},
        {"dns": ("ns.example",)},
        {"reconnect_timeout": -1},
        {"probe_interval": 0.9},
        {"probe_interval": 61},
    ],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(UsageError):
        TunnelConfig(**({"mode": "openconnect", "credential": credential()} | changes))


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("h:1", ("h", 1)),
        ("h", ("h", 443)),
        ("[2001:db8::1]:8443", ("2001:db8::1", 8443)),
        ("[::1]", ("::1", 443)),
    ],
)
def test_servers(text, server):
    assert parse_server(text) == server


@given(st.text())
def test_any_text_is_a_server_or_refused(text):
    try:
        host, port = parse_server(text)
    except UsageError:
        return
    assert host
    assert 0 < port < 65536


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a" * 65, "a b", "a\n"])
def test_bad_gateway_names(name):
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize(
    "changes",
    [{"listen": "::1", "uplink": "slirp4netns"}, {"listen": "host"}, {"port": 70000}, {"dns": ("x",)}],
)
def test_bad_gateway_settings(changes):
    with pytest.raises(UsageError):
        GatewayConfig(**changes)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_would_ignore_is_refused_by_name(mode):
    for name, value, shown, modes in (
        ("tls", False, "--no-tls", {"relay", "socks", "auto"}),
        ("dtls", True, "--dtls", {"openconnect", "auto"}),
        ("dtls", False, "--no-dtls", {"openconnect", "auto"}),
        ("mtu", 1400, "--mtu", {"openconnect", "auto"}),
        ("socks", "h:1", "--socks", {"socks", "auto"}),
        ("server", "h", "--server", {"openconnect", "prototype", "auto"}),
        ("gateway", "a", "--gateway", set(MODES) - {"slirp", "none"}),
        ("credential", "f", "--credential", set(MODES) - {"slirp", "none"}),
        ("probe_interval", 5.0, "--probe-interval", set(MODES) - {"none"}),
        ("probe_interval", 15.0, "", set(MODES)),
        ("tls", True, "", set(MODES)),
        ("mtu", 0, "", set(MODES)),
        ("direct", ("10.0.0.0/8",), "", set(MODES)),
    ):
        if mode in modes:
            check_honoured(mode, {name: value})
        else:
            with pytest.raises(UsageError, match=f"^{shown} means nothing in mode {mode}: it is for "):
                check_honoured(mode, {name: value})


def test_networks_are_lists_and_what_they_are_of():
    given = split_networks(["192.0.2.77/24, 2001:db8::1", "10.0.0.0/8"])
    assert given == ("192.0.2.0/24", "2001:db8::1/128", "10.0.0.0/8")
    assert TunnelConfig("none", direct=("192.0.2.77/24",)).direct == ("192.0.2.0/24",)
    for bad in ("", "192.0.2.0/24,", "example.org", "192.0.2.0/33"):
        with pytest.raises(UsageError, match="is not a network"):
            split_networks([bad])


@pytest.mark.parametrize(
    ("direct", "routes", "servers", "left"),
    [
        (["10.0.0.0/8"], ["default", "::/0"], ["192.0.2.1"], ["default", "::/0"]),
        (["10.0.0.0/8"], ["10.1.0.0/16", "11.0.0.0/8"], [], ["11.0.0.0/8"]),
        (["10.1.0.0/16"], ["10.0.0.0/8"], ["10.1.0.53", "10.2.0.53", "10.1.0.53"], ["10.0.0.0/8", "10.1.0.53/32"]),
        (["10.0.0.0/8", "10.0.0.53/32"], ["default"], ["10.0.0.53"], ["default"]),
        (["0.0.0.0/0"], ["default", "::/0"], ["10.0.0.53"], ["::/0", "10.0.0.53/32"]),
        (["2001:db8::/32"], ["default", "2001:db8:1::/48"], ["2001:db8::53"], ["default", "2001:db8::53/128"]),
    ],
)
def test_what_stays_in_a_tunnel_beside_direct_networks(direct, routes, servers, left):
    networks = [ipaddress.ip_network(each) for each in direct]
    assert tunnelled(networks, routes, servers) == left
