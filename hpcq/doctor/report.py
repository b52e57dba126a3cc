"""What doctor found, and what it means for each tunnel mode. Pure: nothing is looked at here."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

import msgspec

from vpn import Capabilities, Check

TUNNELS = ("relay", "openconnect", "socks")
"""Modes that end at a gateway, each login with a credential of its own; the order is that of mode auto."""
OWN_WAY_OUT = ("slirp", "none")
"""Modes that need the node's own way out: only a target outside can tell whether there is one."""
MODES = (*TUNNELS, *OWN_WAY_OUT)


CLOCK_WANTED = 60.0
"""Seconds that the clocks of nodes may differ."""


class Verdict(enum.StrEnum):
    """``WORKS``: it came up and carried what was asked; ``PERHAPS``: nothing forbids it, but it was not tried."""

    WORKS = "works"
    FAILS = "fails"
    PERHAPS = "perhaps"


class Trial(msgspec.Struct, frozen=True):
    """One mode brought up on a node: the seconds that took, or why it failed."""

    mode: str
    seconds: float = 0.0
    kind: str = ""
    error: str = ""


class Findings(msgspec.Struct, frozen=True):
    """What was found on one host. ``began`` and ``ended`` are when, by its own clock (s since 1970; 0: not noted)."""

    hostname: str
    capabilities: Capabilities
    trials: list[Trial] = []
    began: float = 0.0
    ended: float = 0.0

    def with_checks(self, *checks: Check) -> Findings:
        """The same with these checks in the place of those of their names, or after all."""
        mine = {check.name: check for check in self.capabilities.checks} | {check.name: check for check in checks}
        changed = msgspec.structs.replace(self.capabilities, checks=list(mine.values()))
        return msgspec.structs.replace(self, capabilities=changed)


class ModeReport(msgspec.Struct, frozen=True):
    """What is known of one mode; ``reasons`` say why not, or why it is not known, each with what to ask for."""

    mode: str
    verdict: Verdict
    seconds: float = 0.0
    kind: str = ""
    reasons: list[str] = []


class Report(msgspec.Struct, frozen=True):
    """All of it. ``modes`` are those of the compute node, or of this host when ``node`` was not asked for.

    ``trouble`` says why no compute node was seen; ``job`` is the batch job and ``waited`` the seconds until its pilot
    was ready.
    """

    login: Findings
    batch: str
    modes: list[ModeReport]
    node: Findings | None = None
    job: str = ""
    waited: float = 0.0
    trouble: str = ""

    @property
    def fit(self) -> bool:
        """Whether at least one mode works: seen on a node, or as far as this host tells when no node was to be seen."""
        good = {Verdict.WORKS} if self.node is not None else {Verdict.WORKS, Verdict.PERHAPS}
        return not self.trouble and any(mode.verdict in good for mode in self.modes)


def compare_clocks(sent: float, findings: Findings, received: float) -> Check:
    """A node's clock against ours: it began after ``sent``, and had ended before ``received`` (s since 1970)."""
    least, most = findings.ended - received, findings.began - sent
    if least <= 0 <= most:
        return Check("clock vs login", True, "agrees with the login node's, as far as can be told")
    off = min((least, most), key=abs)
    if abs(off) > CLOCK_WANTED:
        return Check(
            "clock vs login", False, f"{off:+.0f} s: certificates and tokens will fail; ask the site to set it"
        )
    return Check("clock vs login", True, f"{off:+.1f} s")


def judge(findings: Findings, modes: Iterable[str], untried: Mapping[str, str]) -> list[ModeReport]:
    """What findings mean for each of ``modes``; ``untried`` says why one of them was not tried, where that is known."""
    trials = {trial.mode: trial for trial in findings.trials}
    return [_judge(findings.capabilities, mode, trials.get(mode), untried.get(mode, "not tried")) for mode in modes]


def _judge(capabilities: Capabilities, mode: str, trial: Trial | None, untried: str) -> ModeReport:
    if trial is not None and not trial.error:
        return ModeReport(mode, Verdict.WORKS, trial.seconds, trial.kind)
    reasons = capabilities.why_not(f"mode {mode}")
    if trial is not None:
        return ModeReport(mode, Verdict.FAILS, reasons=reasons or [trial.error])
    if reasons:
        return ModeReport(mode, Verdict.FAILS, reasons=reasons)
    return ModeReport(mode, Verdict.PERHAPS, reasons=[untried])


def lines_of(report: Report) -> list[str]:
    """The report for people, a line each."""
    lines = [f"login node {report.login.hostname}", *_checks(report.login.capabilities.checks)]
    lines += _use("gateway", report.login.capabilities.why_not("gateway"))
    if report.node is not None:
        lines += ["", f"compute node {report.node.hostname} (job {report.job} of {report.batch}, ready after "
                  f"{report.waited:.0f} s)", *_checks(report.node.capabilities.checks)]  # fmt: skip
    if report.trouble:
        return [*lines, "", "compute node: not seen, because", *(f"    {line}" for line in report.trouble.splitlines())]
    seen_on = report.node or report.login
    lines += ["", f"tunnels from {seen_on.hostname}"]
    for mode in report.modes:
        lines += _mode(mode)
    return [*lines, "", _advice(report)]


def _checks(checks: Iterable[Check]) -> list[str]:
    return [f"  {'yes' if check.ok else 'NO ':3}  {check.name:16} {check.detail}" for check in checks]


def _use(what: str, reasons: list[str]) -> list[str]:
    if not reasons:
        return [f"  {what}: can run here"]
    return [f"  {what}: cannot run here with every mode, because", *(f"      {reason}" for reason in reasons)]


def _mode(mode: ModeReport) -> list[str]:
    if mode.verdict is Verdict.WORKS:
        kind = f" ({mode.kind})" if mode.kind else ""
        return [f"  {mode.mode:12} works, up in {mode.seconds:.2f} s{kind}"]
    words = "does not work, because" if mode.verdict is Verdict.FAILS else "may work"
    if len(mode.reasons) == 1:
        return [f"  {mode.mode:12} {words}{'' if words.endswith('because') else ':'} {mode.reasons[0]}"]
    return [f"  {mode.mode:12} {words}", *(f"      {reason}" for reason in mode.reasons)]


def _advice(report: Report) -> str:
    working = [mode.mode for mode in report.modes if mode.verdict is Verdict.WORKS]
    if working:
        return f"use: hpcq submit-pilots --batch {report.batch} --vpn {working[0]} (or --vpn auto)"
    if report.node is None and report.fit:
        return "only a compute node can tell: leave out --no-pilot"
    return "no mode works; the lines above say what to ask the site for"
