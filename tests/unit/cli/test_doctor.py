"""What doctor concludes from what was found, and how it shows it."""

import msgspec
import pytest

from hpcq.cli.main import run
from hpcq.doctor.node import WITH_DTLS, udp_of
from hpcq.doctor.report import MODES, Findings, ModeReport, Report, Trial, Verdict, compare_clocks, judge, lines_of
from vpn import Capabilities, Check
from vpn.capabilities import NEEDS, uses_of

ALL = sorted({need for needs in NEEDS.values() for need in needs})


def found(*missing: str, trials: list[Trial] | None = None) -> Findings:
    """A host that has everything but ``missing``."""
    checks = [Check(name, name not in missing, f"about {name}") for name in ALL]
    return Findings("cn1", Capabilities(checks, uses_of(checks)), trials or [])


def verdicts(findings: Findings, untried: dict[str, str] | None = None) -> dict[str, ModeReport]:
    return {one.mode: one for one in judge(findings, MODES, untried or {})}


def test_a_mode_that_came_up_works_and_says_how_fast():
    one = verdicts(found(trials=[Trial("relay", 0.4, "TLS")]))["relay"]
    assert one == ModeReport("relay", Verdict.WORKS, 0.4, "TLS")


def test_one_that_was_not_tried_may_work_and_says_why_not_tried():
    one = verdicts(found(), {"socks": "no gateway"})["socks"]
    assert one == ModeReport("socks", Verdict.PERHAPS, reasons=["no gateway"])


def test_what_the_host_lacks_is_the_reason_with_its_advice():
    told = verdicts(found("user namespaces", "openconnect"))
    assert told["relay"].reasons == ["user namespaces: about user namespaces"]
    assert told["openconnect"].reasons == ["user namespaces: about user namespaces", "openconnect: about openconnect"]
    assert {mode for mode, one in told.items() if one.verdict is Verdict.FAILS} == {"relay", "openconnect", "slirp"}


def test_a_trial_counts_more_than_what_the_host_seems_to_lack():
    trials = [Trial("none", 0.1), Trial("relay", 0.2, "TLS", "it comes up, but nobody answers")]
    told = verdicts(found("default route", trials=trials))
    assert told["none"].verdict is Verdict.WORKS
    assert told["relay"] == ModeReport("relay", Verdict.FAILS, reasons=["it comes up, but nobody answers"])


def report(node: Findings | None, trouble: str = "") -> Report:
    modes = judge(node or found(), MODES, {})
    return Report(found("gateway"), "slurm", [] if trouble else modes, node, "17", 2.6, trouble)


@pytest.mark.parametrize(
    ("one", "fit"),
    [
        (report(found(trials=[Trial("socks", 1.0)])), True),
        (report(found()), False),  # a node was there, and nothing was seen to work
        (report(None), True),  # as far as this host tells
        (report(None, "job 17 is still pending (Resources)"), False),
        (report(found(trials=[Trial(mode, error="no") for mode in MODES])), False),
    ],
)
def test_fit_means_that_something_was_seen_to_work(one: Report, fit: bool):
    assert one.fit is fit


def test_the_table_names_the_node_the_modes_and_what_to_do():
    lines = lines_of(report(found("tun", trials=[Trial("socks", 1.234, "TLS")])))
    assert "compute node cn1 (job 17 of slurm, ready after 3 s)" in lines
    assert "  NO   tun              about tun" in lines
    assert "  relay        does not work, because tun: about tun" in lines
    assert "  socks        works, up in 1.23 s (TLS)" in lines
    assert lines[-1] == "use: hpcq submit-pilots --batch slurm --vpn socks (or --vpn auto)"


def test_the_table_gives_several_reasons_a_line_each():
    lines = lines_of(report(found("tun", "nat")))
    start = lines.index("  relay        does not work, because")
    assert lines[start + 1 : start + 3] == ["      tun: about tun", "      nat: about nat"]
    assert lines[-1] == "no mode works; the lines above say what to ask the site for"


def test_the_table_says_why_no_node_was_seen():
    lines = lines_of(report(None, "the job ended\nits output"))
    assert lines[-3:] == ["compute node: not seen, because", "    the job ended", "    its output"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--timeout", "soon"], "--timeout"),
        (["--batch", "lsf"], "lsf"),
        (["--vpn", "wireguard"], "wireguard"),
        (["--batch", "slurm", "--memory", "much"], "--memory"),
        (["--require", "xrootd.example.org"], "--require"),
    ],
)
def test_bad_options_are_named_before_anything_is_looked_at(arguments, word, capsys):
    assert run(["doctor", *arguments]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("began", "ended", "ok", "words"),
    [
        (101.0, 109.0, True, "agrees with the login node's"),
        (100.0, 110.0, True, "agrees with the login node's"),
        (131.0, 139.0, True, "+29.0 s"),
        (71.0, 79.0, True, "-29.0 s"),
        (301.0, 309.0, False, "+199 s: certificates and tokens will fail"),
        (1.0, 9.0, False, "-99 s: certificates"),
    ],
)
def test_a_nodes_clock_is_compared_with_the_login_nodes(began, ended, ok, words):
    """Sent at 100, received at 110: how far it is off at least."""
    check = compare_clocks(100.0, msgspec.structs.replace(found(), began=began, ended=ended), 110.0)
    assert (check.name, check.ok) == ("clock vs login", ok)
    assert words in check.detail


def test_a_check_takes_the_place_of_the_one_of_its_name():
    changed = found("tun").with_checks(Check("tun", True, "now"), Check("new", True, "added"))
    details = {check.name: (check.ok, check.detail) for check in changed.capabilities.checks}
    assert details["tun"] == (True, "now")
    assert [check.name for check in changed.capabilities.checks] == [*ALL, "new"]


def test_a_tunnel_tells_whether_udp_arrives():
    assert udp_of(Trial("openconnect", 1.0, WITH_DTLS)).ok
    assert not udp_of(Trial("openconnect", 1.0, "TLS")).ok
    assert udp_of(Trial("openconnect", error="no")) is None
    assert udp_of(Trial("relay", 1.0, "TLS")) is None
