"""Which function bodies a pilot needs; what the manager lists of its pilots."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcq import messages as m
from hpcq.functions import Functions
from hpcq.roster import ENDED_KEPT, PilotState, Roster, view

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
PILOTS = st.sampled_from(["p", "q"])


class FunctionsModel(RuleBasedStateMachine):
    """Pilots that are told everything in order always have the bodies of the tasks they are sent."""

    def __init__(self):
        super().__init__()
        self.functions = Functions(kept=2)
        self.used = []
        self.pilots = {"p": {}, "q": {}}
        self.dropped = {"p": set(), "q": set()}

    @rule(key=KEYS)
    def submit(self, key):
        self.functions.acquire(key, b"body of " + key)
        self.used.append(key)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def finish(self, data):
        key = data.draw(st.sampled_from(self.used))
        self.used.remove(key)
        self.functions.release(key)
        for pilot, has in self.pilots.items():
            self.dropped[pilot] |= {key for key in has if not self.functions.size(key)}

    @precondition(lambda self: self.used)
    @rule(data=st.data(), pilot=PILOTS)
    def send(self, data, pilot):
        keys = set(data.draw(st.lists(st.sampled_from(self.used), min_size=1)))
        bodies = self.functions.missing(pilot, keys)
        forget = self.functions.to_forget(pilot)
        has = self.pilots[pilot]
        for body in bodies:  # in the order in which a pilot does it
            assert body.body == b"body of " + body.key
            assert body.key not in has or body.key in self.dropped[pilot], "sent to a pilot that has it"
            self.dropped[pilot].discard(body.key)
            has[body.key] = body.body
        for key in forget:
            has.pop(key)
            self.dropped[pilot].discard(key)
        assert keys <= set(has), "a task was sent without its function"

    @rule(pilot=PILOTS)
    def pilot_goes(self, pilot):
        self.functions.pilot_gone(pilot)
        self.pilots[pilot] = {}
        self.dropped[pilot].clear()

    @invariant()
    def bounded(self):
        assert len(self.functions) <= len(set(self.used)) + 2


def test_a_function_goes_to_a_pilot_once():
    functions = Functions(kept=1)
    functions.acquire(b"a", b"body")
    assert [one.key for one in functions.missing("p", {b"a"})] == [b"a"]
    assert not functions.missing("p", {b"a"})
    functions.release(b"a")
    functions.acquire(b"a", b"body")
    assert not functions.missing("p", {b"a"})
    assert [one.key for one in functions.missing("q", {b"a"})] == [b"a"]


FunctionsModel.TestCase.settings = settings(max_examples=50, deadline=None)
TestFunctionsModel = FunctionsModel.TestCase


def hello(name="p"):
    return m.PilotHello(
        1, name, "slurm", "7", 0, "node1", 5, 4, 1000, 0.0, "relay", "g", m.Versions("3", "3", "0", "0")
    )


def test_a_pilots_life():
    roster = Roster()
    entry = roster.arrived(hello(), 100.0)
    assert entry.state is PilotState.STARTING
    roster.ready(entry, m.Ready("relay", "tls", 1.5, "10.0.0.2", ["wan"]))
    assert (entry.state, entry.tunnel_mode, entry.tunnel_seconds) == (PilotState.READY, "relay", 1.5)
    roster.tunnel(entry, m.TunnelUp("socks", "TLS", 0.5, "", ["wan"], ["relay passed over: refused"]))
    assert (entry.tunnel_mode, entry.tunnel_passed_over) == ("socks", ["relay passed over: refused"])
    roster.draining(entry, "its walltime ends")
    assert (entry.state, entry.message) == (PilotState.DRAINING, "its walltime ends")
    roster.closed(entry, "connection closed")
    assert (entry.state, entry.message, entry.ended) == (PilotState.GONE, "its walltime ends", True)


def test_a_pilot_that_just_vanished_says_how():
    roster = Roster()
    entry = roster.arrived(hello(), 100.0)
    roster.closed(entry, "nothing heard for 60 s")
    assert (entry.state, entry.message) == (PilotState.GONE, "nothing heard for 60 s")


def test_a_failed_start_stays_listed_as_failed_whatever_comes_after():
    roster = Roster()
    entry = roster.arrived(hello(), 100.0)
    roster.failed(entry, m.StartFailed("gateway", "no credential"))
    roster.draining(entry, "no credential")
    roster.closed(entry, "connection closed")
    assert (entry.state, entry.failed_layer, entry.message) == (PilotState.FAILED, "gateway", "no credential")


def test_a_pilot_that_comes_again_is_one_entry():
    roster = Roster()
    first = roster.arrived(hello(), 100.0)
    second = roster.arrived(hello(), 200.0)
    assert roster.entries == {"p": second}
    assert first is not second


def test_ended_pilots_are_bounded_and_living_ones_kept():
    roster = Roster()
    living = roster.arrived(hello("living"), 0.0)
    for number in range(ENDED_KEPT + 50):
        roster.closed(roster.arrived(hello(f"p{number}"), 0.0), "")
    roster.arrived(hello("last"), 0.0)
    assert len(roster.entries) == ENDED_KEPT + 2
    assert roster.entries["living"] is living
    assert "p0" not in roster.entries


def test_credentials_are_not_shared_between_entries():
    roster = Roster()
    first, second = roster.arrived(hello("a"), 0.0), roster.arrived(hello("b"), 0.0)
    first.credentials["secret"] = "gateway"
    assert second.credentials == {}


def test_a_view_reads_as_a_mapping_and_shows_no_credential():
    entry = Roster().arrived(hello(), 100.0)
    entry.credentials = {"user-1": "default"}
    shown = dict(view(entry, 3))
    assert (shown["name"], shown["state"], shown["cores_busy"]) == ("p", "starting", 3)
    assert "user-1" not in str(shown)
