"""Who may use the relay: a password once, then tokens, until it ends."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vpn.gateway.tickets import AWAY_LIFETIME, FIRST_DELAY, FORGET_WRONG, LONGEST_DELAY, WRONG_LIMIT, Tickets

users = st.sampled_from(["a", "b"])


class Life(RuleBasedStateMachine):
    """Random lives of two credentials; a password is admitted once at most for each time it was issued."""

    def __init__(self):
        super().__init__()
        self.tickets = Tickets()
        self.now = 0.0
        self.issued = {}
        self.admitted = {}
        self.tokens = {}

    @rule(user=users)
    def issue(self, user):
        self.issued[user] = self.issued.get(user, 0) + 1
        self.tickets.add(user, f"password {user} {self.issued[user]}")
        self.tokens[user] = []

    @rule(user=users, back=st.integers(0, 2))
    def log_in(self, user, back):
        number = self.issued.get(user, 0) - back
        admission = self.tickets.admit(user, f"password {user} {number}".encode())
        if admission == "password":
            assert (user, number) not in self.admitted
            assert back == 0
            self.admitted[user, number] = True
            self.tokens[user].append(self.tickets.open(user))
        else:
            assert admission in ("spent", "wrong")

    @rule(user=users)
    def use_token(self, user):
        for token in self.tokens.get(user, [])[-1:]:
            assert self.tickets.admit(user, token.encode()) == "token"
        assert self.tickets.admit(user, b"") == "wrong"
        assert self.tickets.admit("b" if user == "a" else "a", b"x") == "wrong"

    @rule(user=users)
    def break_and_come_back(self, user):
        if self.tokens.get(user):
            self.tickets.leave(user, self.now)
            assert self.tickets.is_away(user)
            self.tokens[user].append(self.tickets.open(user))

    @rule(user=users)
    def stay_away(self, user):
        if self.tokens.get(user):
            self.tickets.leave(user, self.now)
            self.now += AWAY_LIFETIME
            assert user in self.tickets.expire(self.now)
            self.gone(user)

    @rule(user=users)
    def revoke(self, user):
        self.tickets.remove(user)
        self.gone(user)

    @rule(user=users)
    def spend(self, user):
        self.tickets.spend(user)
        if not self.tokens.get(user):
            self.gone(user)

    def gone(self, user):
        for token in self.tokens.pop(user, []):
            assert self.tickets.admit(user, token.encode()) == "wrong"
        assert self.tickets.admit(user, f"password {user} {self.issued.get(user, 0)}".encode()) == "wrong"
        assert self.tickets.open(user) == ""

    @invariant()
    def secrets_are_not_kept(self):
        assert "password" not in repr(vars(self.tickets)).replace("password=b", "")


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_wrong_logins_wait_longer_and_longer():
    tickets = Tickets()
    delays = [tickets.penalty("192.0.2.1", 0.0) for _ in range(10)]
    assert delays[0] == FIRST_DELAY
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY
    assert tickets.penalty("192.0.2.2", 0.0) == FIRST_DELAY
    assert tickets.penalty("192.0.2.1", FORGET_WRONG + 1) == FIRST_DELAY


def test_many_addresses_are_not_all_remembered():
    tickets = Tickets()
    for number in range(WRONG_LIMIT + 10):
        tickets.penalty(str(number), 0.0)
    assert len(tickets._wrong) <= WRONG_LIMIT
