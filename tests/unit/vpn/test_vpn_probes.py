"""Probes' parsers, and what refusals are explained as."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.capabilities import uses_of, version_in
from vpn.errors import UsageError
from vpn.probes import _HANDSHAKE, _KXR_PROTOCOL, check_target, parse_handshake, parse_protocol
from vpn.refusals import explain_tun, explain_unshare
from vpn.surroundings import Check

TARGETS = [
    "root://h",
    "root://h:1094//store/x",
    "http://h/",
    "https://h:8443/x",
    "cvmfs:cms.cern.ch",
    "dns:cern.ch",
    "root://[2001:db8::1]:1094",
]


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    "target",
    ["", "root:", "root://", "http://", "ftp://h", "root://h:x", "cvmfs:", "dns:", "h:1094", "root://[::1"],
)
def test_bad_targets(target):
    with pytest.raises(UsageError):
        check_target(target)


@given(st.text())
def test_any_text_is_a_target_or_refused(text):
    try:
        check_target(text)
    except UsageError:
        return


def test_request_sizes_are_the_protocols():
    assert len(_HANDSHAKE) == 20
    assert len(_KXR_PROTOCOL) == 24


def test_answers_of_a_data_server():
    assert parse_handshake(struct.pack(">HHIiI", 0, 0, 8, 0x520, 1)) == "data server"
    assert parse_handshake(struct.pack(">HHIiI", 0, 0, 8, 0x520, 0)) == "manager (redirector)"
    assert parse_protocol(struct.pack(">2sHIiI", b"\0\1", 0, 8, 0x520, 1)) == "5.2.0"


@given(st.binary(min_size=16, max_size=16))
def test_any_answer_is_xrootds_or_refused(data):
    for parse in (parse_handshake, parse_protocol):
        try:
            assert parse(data)
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("code", "switches", "words"),
    [
        (errno.ENOSPC, {"user.max_user_namespaces": 0}, "user.max_user_namespaces is 0"),
        (errno.ENOSPC, {"user.max_user_namespaces": 100}, "used up"),
        (errno.EPERM, {"kernel.unprivileged_userns_clone": 0}, "kernel.unprivileged_userns_clone=1"),
        (errno.EACCES, {"kernel.apparmor_restrict_unprivileged_userns": 1}, "AppArmor"),
        (errno.EPERM, {}, "security policy"),
        (errno.EINVAL, {}, "CONFIG_USER_NS"),
    ],
)
def test_refusals_get_their_own_advice(code, switches, words):
    assert words in explain_unshare(code, switches=switches)
    assert errno.errorcode[code] in explain_unshare(code, switches=switches)


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOENT, "modprobe tun"), (errno.EACCES, "0666"), (errno.EIO, "error")]
)
def test_tun_refusals(code, words):
    assert words in explain_tun(OSError(code, "an error"))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("OpenConnect version v9.01-3\nUsing GnuTLS 3.7.9.\n", "v9.01-3"),
        ("pasta unknown version\nGNU AGPL <https://www.gnu.org/licenses/agpl-3.0.html>\n", ""),
        ("pasta 2024_05_23.765eb0b\n", "2024_05_23.765eb0b"),
        ("pasta 0.0~git20230309.7c7625d-1\n", "0.0~git20230309.7c7625d-1"),
        ("slirp4netns version 1.2.0\ncommit: 656041d\nlibslirp: 4.7.0\n", "1.2.0"),
        ("nftables v1.0.6 (Lester Gooch #5)\n", "v1.0.6"),
        ("", ""),
    ],
)
def test_a_programs_version(text, version):
    assert version_in(text) == version


def test_what_serves_as_well_is_enough():
    def lacking(*names):
        return uses_of([Check(name, True, "") for name in ("user namespaces", "tun", "default route", *names)])

    assert lacking("pasta")["mode slirp"] == lacking("slirp4netns")["mode slirp"] == []
    assert lacking()["mode slirp"] == ["pasta or slirp4netns"]
