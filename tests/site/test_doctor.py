"""``hpcq doctor`` on the simulated site: as an ordinary user, through Slurm, on nodes that lack this and that."""

from __future__ import annotations

import json
from typing import Any

from cluster import Cluster, wrapping_template

WITHOUT_NAMESPACES = "exec unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"' sh"
WITHOUT_PROGRAMS = (
    "exec unshare -Urm sh -c 'PATH=$PATH:/usr/sbin; for one in openconnect slirp4netns pasta; do "
    'mount --bind /dev/null "$(command -v $one)"; done; exec "$@"\' sh'
)


def doctor(cluster: Cluster, *options: str, status: int = 0) -> dict[str, Any]:
    """The report, by mode; nothing may be left on the login node or in Slurm."""
    answer = cluster.hpcq("doctor", "--batch", "slurm", "--memory", "1GB", "--json", *options, status=status)
    assert not [job for job in cluster.jobs() if "COMPLETING" not in job]
    script = "ls ~/.local/state/hpcq ~/.local/state/hpcq-gateway 2>/dev/null | grep -e ^doctor- -e ^queue-"
    assert cluster.site.run("login", ["sh", "-c", script]).stdout == ""
    report: dict[str, Any] = json.loads(answer.stdout)
    return {**report, "modes": {mode["mode"]: mode for mode in report["modes"]}}


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {name: mode["verdict"] for name, mode in report["modes"].items()}


def test_every_tunnel_works_from_a_node_without_outside_access(cluster: Cluster) -> None:
    report = doctor(cluster, "--require", "root://xrootd.wan.test:1094")
    assert report["login"]["hostname"] == "login"
    assert report["node"]["hostname"] in ("cn1", "cn2")
    tunnels = dict.fromkeys(("relay", "openconnect", "socks"), "works")
    assert verdicts(report) == {**tunnels, "slirp": "fails", "none": "fails"}, report["modes"]
    assert "no default route" in " ".join(report["modes"]["slirp"]["reasons"])
    checks = report["node"]["capabilities"]["checks"]
    details = {check["name"]: check["detail"] for check in checks if check["ok"]}
    assert details["gateway mtu"] == "1500 bytes arrive", checks
    assert any(check["name"] == "gateway udp" and "DTLS" in check["detail"] for check in checks), checks
    assert "clock vs login" in details, checks


def test_a_node_without_user_namespaces_has_socks_alone(cluster: Cluster) -> None:
    report = doctor(cluster, "--template", wrapping_template(cluster, WITHOUT_NAMESPACES))
    assert verdicts(report)["socks"] == "works", report["modes"]
    assert verdicts(report)["relay"] == verdicts(report)["openconnect"] == "fails"
    assert "user.max_user_namespaces is 0: ask the site" in " ".join(report["modes"]["relay"]["reasons"])


def test_a_node_without_the_programs_has_what_needs_none(cluster: Cluster) -> None:
    report = doctor(cluster, "--template", wrapping_template(cluster, WITHOUT_PROGRAMS))
    assert verdicts(report)["relay"] == verdicts(report)["socks"] == "works", report["modes"]
    assert "openconnect was not found on PATH: install openconnect" in " ".join(
        report["modes"]["openconnect"]["reasons"]
    )
    assert "slirp4netns was not found on PATH" in " ".join(report["modes"]["slirp"]["reasons"])


def test_a_job_that_stays_pending_is_told_with_slurms_reason(cluster: Cluster) -> None:
    report = doctor(cluster, "--vpn", "none", "--option=--begin=now+1hour", "--timeout", "3", status=5)
    assert report["node"] is None
    assert "is still pending (BeginTime)" in report["trouble"]


def test_slurms_refusal_is_shown(cluster: Cluster) -> None:
    report = doctor(cluster, "--partition", "nope", "--vpn", "none", status=5)
    assert "invalid partition" in report["trouble"]
