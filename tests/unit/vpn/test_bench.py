"""The harness's pure parts: what is measured in which order, figures from samples, goals, tables and the plot."""

from __future__ import annotations

import itertools
import json
import math

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hpcq.cli.bench import bench
from vpn.bench import show, whole
from vpn.bench.cli import tunnel
from vpn.bench.figures import bytes_at, common_rates, fairness
from vpn.bench.goals import RATIOS, judge, kind_of
from vpn.bench.plan import COPY, NATIVE, Link, Plan, Way, default_ways
from vpn.bench.report import Report, Row
from vpn.bench.run import launcher
from vpn.bench.traffic import Job, Series
from vpn.cli import cli
from vpn.config import MODES
from vpn.errors import UsageError
from vpn.modes.base import TunnelInfo

MBIT = 1e6


def steady(rate, begin, end, step=0.05):
    """Samples of a flow of ``rate`` bytes per second."""
    count = round((end - begin) / step)
    return [(begin + index * step, rate * index * step) for index in range(count + 1)]


# --- samples -----------------------------------------------------------------------------------------------------


@given(
    rates=st.lists(st.floats(1e3, 1e10), min_size=1, max_size=20),
    skew=st.floats(0, 0.5),
    warmup=st.floats(0, 1),
)
def test_steady_flows_have_their_own_rates_whenever_they_began(rates, skew, warmup):
    workers = [steady(rate, index * skew / len(rates), 3.0) for index, rate in enumerate(rates)]
    found = common_rates(workers, warmup)
    assert all(math.isclose(a, 8 * b, rel_tol=1e-6) for a, b in zip(found, rates, strict=True))


def test_slow_start_does_not_count():
    samples = [(0.0, 0), (1.0, 10), (2.0, 1010), (3.0, 2010)]
    assert common_rates([samples], 1.0) == [8000.0]


def test_what_one_did_alone_does_not_count():
    alone_first = [(0.0, 0), (1.0, 1000), (2.0, 1100)]
    later = [(1.0, 0), (2.0, 100)]
    assert common_rates([alone_first, later], 0.0) == [800.0, 800.0]


def test_workers_that_never_worked_together_are_no_measurement():
    with pytest.raises(ValueError, match="not at work at the same time"):
        common_rates([steady(10, 0, 1), steady(10, 2, 3)], 0.0)


def test_bytes_outside_the_samples():
    samples = [(1.0, 0), (2.0, 10)]
    assert (bytes_at(samples, 0.5), bytes_at(samples, 9.0)) == (0.0, 10)


@given(st.lists(st.just(0.0) | st.floats(1, 1e11), min_size=1, max_size=50))
def test_fairness_is_between_one_nth_and_one(rates):
    if any(rates):
        assert 1 / len(rates) - 1e-9 <= fairness(rates) <= 1 + 1e-9
    else:
        assert fairness(rates) == 0.0


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 0.3)), min_size=1, max_size=60))
def test_a_series_keeps_every_byte_and_few_samples(reads):
    series = Series(Job("down", 1.0, 1.0), 0.0)
    now, over = 0.0, False
    for count, pause in reads:
        now += pause
        over = series.add(count, now)
        if over:
            break
    assert series.total >= series.samples[-1][1]
    assert over == (now >= 2.0)
    assert all(b[0] - a[0] >= 0.05 and b[1] > a[1] for a, b in itertools.pairwise(series.samples))


@given(st.sampled_from(["up", "down", "echo"]), st.floats(0, 300), st.floats(0, 300), st.integers(0, 1000))
def test_a_job_survives_its_line(kind, warmup, seconds, trips):
    job = Job(kind, warmup, seconds, trips)
    assert Job.parse(job.line()) == job


@pytest.mark.parametrize(
    "line", [b"", b"GET / HTTP/1.1\r\n", b"[]", b'{"kind":"flood"}', b'{"kind":"up","seconds":1e9}',
             b'{"kind":"up","seconds":-1}', b'{"kind":"up","seconds":"nan"}', b'{"kind":"up","seconds":[]}'],
)  # fmt: skip
def test_what_is_no_job_is_refused(line):
    with pytest.raises((ValueError, TypeError)):
        Job.parse(line)


# --- the plan ----------------------------------------------------------------------------------------------------

WAYS = (Way("relay", "relay"), Way("openconnect", "openconnect"))


def test_every_way_takes_its_turn_at_every_work_of_a_round():
    plan = Plan(WAYS, workers=(1, 4), rounds=3, copies=True)
    steps = list(plan.steps(plan.labels))
    assert len(steps) == plan.count() == len(set(steps))
    for at in range(0, len(steps), 3):
        turn = steps[at : at + 3]
        assert len({(number, work) for number, work, _ in turn}) == 1
        assert {label for _, _, label in turn} == set(plan.labels)
    assert {steps[at][2] for at in range(0, len(steps), 3)} == set(plan.labels)  # none is always first


def test_a_way_that_did_not_come_up_has_no_steps():
    plan = Plan(WAYS, workers=(1,), rounds=1)
    assert {label for _, _, label in plan.steps([NATIVE, "relay"])} == {NATIVE, "relay"}
    assert list(plan.steps([])) == []


def test_the_time_it_takes_is_that_of_its_steps():
    short = Plan(WAYS, workers=(1,), rounds=1, seconds=1.0, warmup=1.0)
    longer = Plan(WAYS, workers=(1,), rounds=3, seconds=1.0, warmup=1.0)
    transfers = 2 * 3 * 2.4
    assert short.duration() > transfers
    assert math.isclose(longer.duration() - short.duration(), 2 * (transfers + 3 * short.pings() * short.round_trip))


def test_more_workers_and_longer_links_warm_up_longer():
    plan = Plan((), round_trip=0.02)
    assert 0.9 < plan.warming(1) < plan.warming(20) < Plan((), round_trip=0.15).warming(20)
    assert Plan((), warmup=0.3).warming(20) == 0.3
    assert [Plan((), round_trip=trip).pings() for trip in (0.0, 0.02, 0.05, 0.5)] == [50, 50, 20, 10]


@pytest.mark.parametrize(
    ("text", "rate", "trip"),
    [
        ("10gbit", 1e10, 0.0),
        ("1gbit,20ms", 1e9, 0.02),
        ("100mbit,150ms", 1e8, 0.15),
        ("10Gbit, 0ms", 1e10, 0.0),
        ("unshaped", 0, 0),
    ],
)
def test_links(text, rate, trip):
    link = Link.parse(text)
    assert (link.rate, link.round_trip) == (rate, trip)
    assert Link.parse(str(link)) == link


@pytest.mark.parametrize("text", ["", "1gbit,", "gbit,20ms", "0mbit,1ms", "1gbit,20", "1gbit,-1ms"])
def test_what_is_no_link(text):
    with pytest.raises(UsageError, match="link"):
        Link.parse(text)


def test_a_way_has_settings():
    way = Way.parse("openconnect:dtls=no,mtu=1400,dns=1.1.1.1+9.9.9.9,uplink=slirp4netns")
    assert way.options == {"dtls": False, "mtu": 1400, "dns": ["1.1.1.1", "9.9.9.9"]}
    assert way.uplink == "slirp4netns"
    for wrong in ("nothing", "openconnect:=3"):
        with pytest.raises(UsageError):
            Way.parse(wrong)


def test_every_mode_that_leads_out_is_measured():
    assert {way.mode for way in default_ways()} == set(MODES) - {"none", "auto"}
    assert [way.label for way in default_ways(root=True) if way.plain] == ["plain"]


def test_an_ocserv_of_roots_is_reached_by_openconnect():
    way = Way.parse("plain:dtls=no,mtu=16000")
    assert (way.mode, way.plain, way.options) == ("openconnect", True, {"dtls": False, "mtu": 16000})


def test_what_no_goal_asks_for_is_not_copied():
    plan = Plan(tuple(map(Way.parse, ("relay", "prototype", "plain"))), workers=(1,), rounds=2, copies=True)
    steps = list(plan.steps(plan.labels))
    assert len(steps) == plan.count()
    assert {label for _, stage, label in steps if stage == COPY} == {NATIVE, "relay"}


def test_the_whole_table_measures_every_goal_and_in_time():
    measured = {(kind_of(Link.parse(part.link)), label, part.workers) for part in whole.PARTS for label in part.ways}
    for goal in RATIOS:
        assert any((goal.kind, label, goal.workers) in measured for label in goal.labels), goal
    assert whole.duration() < 8 * 60
    for part in whole.PARTS:
        assert part.plan().labels[1:] == list(part.ways)


def test_all_goals_in_one_plot_and_one_verdict(tmp_path):
    pytest.importorskip("matplotlib")
    reports = [report_of(link, native=950, relay=940, openconnect=800) for link in ("1gbit,20ms", "unshaped")]
    for report in reports:
        report.goals = judge(report, Link.parse(report.link))
    show.plot_goals(reports, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert whole.Whole(reports).missed
    assert not whole.Whole([]).missed
    assert whole.Whole([], ["link x: nothing"]).missed


def test_a_site_that_cannot_be_is_said_and_the_next_tried(monkeypatch):
    monkeypatch.setattr(whole.sys, "executable", "/bin/false")
    said = []
    parts = [whole.Part("1gbit,20ms", ("relay",)), whole.Part("unshaped", ("relay",))]
    found = whole.measure(said.append, parts)
    assert not found.reports
    assert [problem.partition(":")[0] for problem in found.problems] == ["link 1gbit,20ms", "link unshaped"]


@pytest.mark.parametrize(
    "change",
    [{"workers": (0,)}, {"workers": ()}, {"rounds": 0}, {"seconds": 0.0}, {"warmup": -1.0}, {"ways": (WAYS[0],) * 2}],
)
def test_a_plan_that_cannot_be_done(change):
    with pytest.raises(UsageError):
        Plan(**({"ways": WAYS} | change))


def test_prefixes():
    assert launcher("", ["a", "b c"]) == ["a", "b c"]
    assert launcher("srun -n1", ["a", "b c"]) == ["srun", "-n1", "a", "b c"]
    assert launcher("ssh login", ["a", "b c"]) == ["ssh", "login", "a 'b c'"]


# --- the report --------------------------------------------------------------------------------------------------


def report_of(link, **rates):
    """A report with one flow, and 20 workers with the same; rates in Mbit/s, bring-up 0.5 s, 0.3 ms added."""
    report = Report("2026-01-01T00:00:00+00:00", {}, link, "198.51.100.1:5000", {})
    for label, rate in rates.items():
        first = label == NATIVE
        row = Row(
            label, label, TunnelInfo(label, "TLS", mtu=1400), None if first else 0.5, [0.02 + (0 if first else 0.0003)]
        )
        row.copies = [2.0 if first else 2.08]
        for workers, direction in itertools.product((1, 20), ("up", "down")):
            point = row.point(direction, workers)
            point.bits_per_second = [rate * MBIT] if rate else []
            point.problem = "" if rate else "connection refused"
            point.fairness = [1.0]
        report.rows.append(row)
    return report


def verdicts(report, link):
    return {goal.goal: goal for goal in judge(report, Link.parse(link) if link else None)}


def test_goals_are_met_or_missed():
    found = verdicts(report_of("1gbit,20ms", native=950, relay=948, openconnect=800, prototype=190), "1gbit,20ms")
    assert found["relay, 1 flow up, of native"].ok is True
    assert found["relay, 20 workers down, of native"].ok is True
    assert found["openconnect, 1 flow up, of native"].ok is False
    assert found["openconnect, 1 flow up, times prototype"].ok is True
    assert found["relay, bring-up, s"].ok is True
    assert found["relay, added round trip, ms"].ok is True
    assert found["relay, time of xrdcp, times native"].ok is True
    assert found["socks, 1 flow up, of native"].ok is None
    assert found["socks, 1 flow up, of native"].note == "not measured"


def test_a_link_that_native_does_not_fill_proves_nothing():
    found = verdicts(report_of("1gbit,20ms", native=600, relay=300), "1gbit,20ms")
    verdict = found["relay, 1 flow up, of native"]
    assert (verdict.value, verdict.ok) == (0.5, None)
    assert "0.60 of the link" in verdict.note


def test_other_links_have_other_goals():
    report = report_of("", native=9000, relay=2500, openconnect=2000)
    unshaped, long, unknown = (verdicts(report, link) for link in ("unshaped", "100mbit,150ms", None))
    assert unshaped["relay, 1 flow up, of native"].limit == 0.25
    assert unshaped["openconnect, 1 flow up, of native"].ok is False
    assert long["relay, 1 flow up, of native"].limit == 0.9
    assert unknown["relay, 1 flow up, of native"].ok is False


def test_a_tunnel_that_did_not_come_up_says_why_everywhere():
    report = report_of("1gbit,20ms", native=950)
    report.rows.append(Row("relay", "relay", problem="no user namespaces here"))
    assert verdicts(report, "1gbit,20ms")["relay, 1 flow up, of native"].note == "no user namespaces here"
    assert any("no user namespaces here" in line for line in show.plain(show.setup_table(report)))


def test_the_table_has_every_way_and_work():
    report = report_of("1gbit,20ms", native=950, relay=475, socks=0)
    lines = show.table(report)
    assert len(lines) == 1 + 3 * 4
    assert {len(line) for line in lines} == {len(show.HEADS)}
    half = next(line for line in lines if line[0] == "relay")
    assert half[:7] == ["relay", "up", "1", "475", "475", "475", "0.50"]
    assert "failed: connection refused" in show.plain(lines)[3]


def test_a_report_is_json_and_back():
    report = report_of("1gbit,20ms", native=950, relay=475)
    report.goals = judge(report, Link.parse("1gbit,20ms"))
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    show.plot(report_of("1gbit,20ms", native=950, relay=940, socks=0), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write the plot"):
        show.plot(report_of("1gbit,20ms", native=950), tmp_path / "no" / "x.png")


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say where the far side is"),
        (["--server", "h:5000", "--workers", "x"], "--workers 'x'"),
        (["--server", "h:5000", "--mode", "carrier-pigeon"], "unknown tunnel mode"),
        (["--server", "h:99999"], "is not a port"),
        (["--site", "--link", "fast"], "link 'fast'"),
        (["--goals", "--server", "h:5000"], "--goals is for --site"),
        (["--goals", "--site", "--link", "1gbit,20ms"], "knows links and modes"),
        (["--server", "h:5000", "--output", "/no/such/place"], "cannot write"),
    ],
)
def test_usage(arguments, words):
    done = CliRunner().invoke(tunnel, arguments)
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)


def test_it_is_a_command_of_both_programs():
    for program, arguments in ((cli, ["bench", "--help"]), (bench, ["tunnel", "--help"])):
        done = CliRunner().invoke(program, arguments)
        assert done.exit_code == 0, done.output
        assert "--link RATE,TIME" in done.output
    assert "tunnel" in CliRunner().invoke(bench, ["--help"]).output


def test_the_data_of_a_report_is_for_programs():
    data = json.loads(msgspec.json.encode(report_of("", native=1)))
    assert {"date", "hosts", "link", "server", "settings", "rows", "goals"} <= set(data)
