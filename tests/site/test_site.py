"""The simulated site keeps its promises: what a compute node can and cannot do, and what the login node sees."""

from __future__ import annotations

import pytest
from simulated_site import plan
from simulated_site.client import Site

COMPUTE = [host.name for host in plan.COMPUTE]
HURRIED = {"XRD_CONNECTIONWINDOW": "2", "XRD_CONNECTIONRETRY": "0", "XRD_REQUESTTIMEOUT": "5"}


@pytest.mark.parametrize("host", plan.HOST_NAMES)
def test_a_host_has_its_own_name_and_the_same_user(site: Site, host: str) -> None:
    answer = site.run(host, ["sh", "-c", "hostname; id -un; pwd; touch shared-home"], check=True)
    assert answer.stdout.split() == [host, site.user, str(site.home)]
    assert (site.home / "shared-home").exists()


@pytest.mark.parametrize("host", COMPUTE)
def test_a_compute_node_has_no_way_out(site: Site, host: str) -> None:
    assert "default" not in site.run(host, ["ip", "route"], check=True).stdout
    connect = f"import socket; socket.create_connection(('{plan.WAN_ADDRESS}', 80), 5)"
    answer = site.run(host, [site.description["python"], "-c", connect])
    assert answer.returncode != 0
    assert "Network is unreachable" in answer.stderr


@pytest.mark.parametrize("host", COMPUTE)
def test_the_login_node_forwards_nothing(site: Site, host: str) -> None:
    # even a node that makes itself a default route gets nowhere
    route = f"ip route add default via {plan.LOGIN_INSIDE}"
    connect = f"import socket; socket.create_connection(('{plan.WAN_ADDRESS}', 80), 2)"
    script = f'{route} && "$0" -c "$1"; status=$?; ip route del default; exit $status'
    answer = site.run(host, ["sh", "-c", script, site.description["python"], connect], user=False)
    assert answer.returncode == 1
    assert "timed out" in answer.stderr or "unreachable" in answer.stderr


def test_compute_nodes_reach_the_login_node_and_each_other(site: Site) -> None:
    for host, other in (("cn1", "login"), ("cn1", "cn2"), ("cn2", "cn1"), ("login", "cn1")):
        site.run(host, ["ping", "-c1", "-W5", other], check=True)


def test_names_of_the_outside_resolve_on_the_login_node_only(site: Site) -> None:
    assert plan.WAN_ADDRESS in site.run("login", ["getent", "hosts", plan.XROOTD_NAME], check=True).stdout
    for host in COMPUTE:
        assert site.run(host, ["getent", "hosts", plan.XROOTD_NAME]).returncode != 0
    assert site.run("login", ["getent", "hosts", "nobody.example"]).returncode != 0


def test_the_web_server_answers_the_login_node(site: Site) -> None:
    fetch = f"import urllib.request as u; print(len(u.urlopen('{plan.HTTP_URL}{plan.ROOT_FILES[0]}').read()))"
    size = site.run("login", [site.description["python"], "-c", fetch], check=True).stdout
    assert int(size) == (plan.STORE / plan.ROOT_FILES[0]).stat().st_size


def test_xrootd_serves_the_login_node_and_not_the_compute_nodes(xrootd: Site) -> None:
    copy = ["xrdcp", "--nopbar", "--force", xrootd.xrootd_url + plan.ROOT_FILES[0]]
    xrootd.run("login", [*copy, "login.root"], check=True)
    original = (plan.STORE / plan.ROOT_FILES[0]).read_bytes()
    assert (xrootd.home / "login.root").read_bytes() == original
    for host in COMPUTE:
        assert xrootd.run(host, [*copy, f"{host}.root"], env=HURRIED).returncode != 0


def test_uproot_reads_over_xrootd(xrootd: Site) -> None:
    script = f"import uproot; print(uproot.open('{xrootd.xrootd_url}{plan.ROOT_FILES[0]}:events').num_entries)"
    assert xrootd.run("login", [xrootd.description["python"], "-c", script], check=True).stdout.strip() == "2304"


@pytest.mark.parametrize("host", COMPUTE)
def test_the_user_can_make_namespaces_with_a_tun_device(site: Site, host: str) -> None:
    script = "unshare --user --map-root-user --net ip tuntap add dev t0 mode tun && echo made"
    assert site.run(host, ["sh", "-c", f"PATH=$PATH:/usr/sbin; {script}"], check=True).stdout == "made\n"


def test_scratch_is_shared_and_tmp_is_not(site: Site, shared_path: object) -> None:
    site.run("cn1", ["sh", "-c", f"echo a > {shared_path}/f; echo a > /tmp/of-cn1"], check=True)
    assert site.run("cn2", ["cat", f"{shared_path}/f"], check=True).stdout == "a\n"
    assert site.run("cn2", ["test", "-e", "/tmp/of-cn1"]).returncode == 1
