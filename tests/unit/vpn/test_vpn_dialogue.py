"""openconnect's lines and its script's environment, pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import LAYERS, TunnelError
from vpn.modes.dialogue import (
    END,
    DtlsDown,
    DtlsUp,
    MtuFound,
    NetworkSettings,
    ScriptReader,
    TlsUp,
    explain_exit,
    login_patience,
    parse_line,
    parse_settings,
)

ENV = {
    "reason": "connect",
    "INTERNAL_IP4_ADDRESS": "198.18.0.7",
    "INTERNAL_IP4_MTU": "1434",
    "INTERNAL_IP4_DNS": "198.19.0.3 8.8.8.8",
    "CISCO_DEF_DOMAIN": "cern.ch fnal.gov",
}


def test_settings_of_a_full_tunnel():
    assert parse_settings(ENV) == NetworkSettings(
        "198.18.0.7/32", 1434, ("default",), ("198.19.0.3", "8.8.8.8"), ("cern.ch", "fnal.gov")
    )


def test_split_routes():
    split = {
        "CISCO_SPLIT_INC": "2",
        "CISCO_SPLIT_INC_0_ADDR": "10.0.0.0",
        "CISCO_SPLIT_INC_0_MASKLEN": "8",
        "CISCO_SPLIT_INC_1_ADDR": "192.168.1.5",
        "CISCO_SPLIT_INC_1_MASKLEN": "24",
    }
    assert parse_settings(ENV | split).routes == ("10.0.0.0/8", "192.168.1.0/24")


@pytest.mark.parametrize(
    ("given", "address", "routes"),
    [
        ({"INTERNAL_IP6_ADDRESS": "fd00::5"}, "fd00::5/128", ("::/0",)),
        ({"INTERNAL_IP6_NETMASK": "fd00::5/64"}, "fd00::5/128", ("::/0",)),
        (
            {
                "INTERNAL_IP6_ADDRESS": "fd00::5", "CISCO_IPV6_SPLIT_INC": "1",
                "CISCO_IPV6_SPLIT_INC_0_ADDR": "2001:db8::", "CISCO_IPV6_SPLIT_INC_0_MASKLEN": "32",
            },
            "fd00::5/128", ("2001:db8::/32",),
        ),
        ({"INTERNAL_IP6_ADDRESS": "nonsense"}, "", ()),
        ({}, "", ()),
    ],
)  # fmt: skip
def test_ipv6_is_taken_where_it_is_given(given, address, routes):
    settings = parse_settings(ENV | {"INTERNAL_IP6_DNS": "2001:db8::53"} | given)
    assert (settings.address6, settings.routes6) == (address, routes)
    assert ("2001:db8::53" in settings.dns) == bool(address)
    assert settings.address == "198.18.0.7/32"


@pytest.mark.parametrize(
    "change",
    [
        {"INTERNAL_IP4_ADDRESS": ""},
        {"INTERNAL_IP4_ADDRESS": "1.2.3.4; reboot"},
        {"CISCO_SPLIT_INC": "1", "CISCO_SPLIT_INC_0_ADDR": "x"},
    ],
)
def test_what_is_no_address_is_refused(change):
    with pytest.raises(TunnelError) as caught:
        parse_settings(ENV | change)
    assert caught.value.layer == "openconnect"


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *ENV,
                "CISCO_SPLIT_INC",
                "CISCO_SPLIT_INC_0_ADDR",
                "CISCO_SPLIT_INC_0_MASKLEN",
                "INTERNAL_IP6_ADDRESS",
                "INTERNAL_IP6_DNS",
                "CISCO_IPV6_SPLIT_INC",
                "CISCO_IPV6_SPLIT_INC_0_ADDR",
            ]
        ),
        st.text(),
    )
)
def test_any_environment_is_settings_or_a_tunnel_error(env):
    try:
        settings = parse_settings(env)
    except TunnelError:
        return
    assert settings.mtu == 0 or 576 <= settings.mtu <= 65535


names = st.text(st.characters(codec="ascii", exclude_characters="=\0"), min_size=1).filter(lambda name: name != END)
values = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.lists(st.dictionaries(names, values), max_size=4), st.data())
def test_script_environments_arrive_whole_however_the_pipe_cuts_them(environments, data):
    wire = b"".join(
        b"".join(f"{name}={value}\0".encode() for name, value in env.items()) + f"{END}=\0".encode()
        for env in environments
    )
    reader, seen, left = ScriptReader(), [], wire
    while left:
        size = data.draw(st.integers(1, len(left)))
        seen += reader.feed(left[:size])
        left = left[size:]
    assert seen == environments


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "Connected to HTTPS on 192.0.2.2 with ciphersuite (TLS1.3)-(ECDHE-SECP256R1)-(AES-256-GCM)",
            TlsUp("(TLS1.3)-(ECDHE-SECP256R1)-(AES-256-GCM)"),
        ),
        (
            "Established DTLS connection (using GnuTLS). Ciphersuite (DTLS1.2)-(PSK)-(AES-256-GCM).",
            DtlsUp("(DTLS1.2)-(PSK)-(AES-256-GCM)"),
        ),
        ("Configured as 198.18.0.7, with SSL connected and DTLS disabled", DtlsDown()),
        ("Configured as 198.18.0.7, with SSL connected and DTLS connected", None),
        ("Configured as 198.18.0.7, with SSL connected and DTLS established", None),
        ("Configured as 198.18.0.7, with SSL connected and DTLS in progress", None),
        ("DTLS handshake timed out", DtlsDown()),
        ("DTLS handshake failed: Resource temporarily unavailable, try again.", DtlsDown()),
        ("Detected MTU of 1326 bytes (was 1434)", MtuFound(1326)),
        ("Please enter your password.", None),
    ],
)
def test_lines(line, said):
    assert parse_line(line) == said


@given(st.text())
def test_any_line_is_understood_or_ignored(line):
    parse_line(line)


@given(st.integers(-64, 255), st.lists(st.text(), max_size=5))
def test_any_exit_is_explained_in_one_layer(status, lines):
    error = explain_exit(status, lines, "gw")
    assert error.layer in LAYERS
    assert "gw" in error.message


@pytest.mark.parametrize(
    ("lines", "layer", "words"),
    [
        (["Login failed.", "Failed to complete authentication"], "openconnect", "good for one login"),
        (
            [
                "None of the 1 fingerprint(s) specified via --servercert match server's certificate: x",
                "Failed to open HTTPS connection to gw",
            ],
            "openconnect",
            "not the pinned one",
        ),
        (["Failed to connect to host gw", "Failed to open HTTPS connection to gw"], "gateway", "reached"),
        (["Session terminated by server; exiting."], "gateway", "ended the session"),
        (["something new"], "openconnect", "status 1: something new"),
        ([], "openconnect", "it said nothing"),
    ],
)
def test_exits(lines, layer, words):
    error = explain_exit(1, lines, "gw")
    assert (error.layer, words in error.message) == (layer, True), error


def test_a_signal_is_named():
    assert "signal 9" in explain_exit(-9, [], "gw").message


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("Cookie was rejected by server; exiting.", 60),
        ("Cookie is no longer valid, ending session", 60),
        ("Reconnect failed", 60),
        ("Session terminated by server; exiting.", 5),
        ("User cancelled (SIGINT/SIGTERM); exiting.", 0),
        ("Failed to open tun device: Operation not permitted", 0),
        ("", 0),
    ],
)
def test_how_long_a_login_after_the_end_of_a_session_is_tried(said, seconds):
    assert login_patience(["Established DTLS connection", said], 60) == seconds
    assert login_patience([said], 1) == min(seconds, 1)
