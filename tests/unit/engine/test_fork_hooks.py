"""Hooks at forks that are left out while there is one thread."""

from hypothesis import given
from hypothesis import strategies as st

from hpcq.pilot.forkhooks import ThreadHooks


def _hooks(calls, threads, modules):
    hooks = ThreadHooks(lambda: threads[0])
    for name in range(modules):
        hooks.add(
            before=lambda name=name: calls.append(("before", name)),
            after_in_parent=lambda name=name: calls.append(("parent", name)),
            after_in_child=lambda name=name: calls.append(("child", name)),
        )
    return hooks


@given(modules=st.integers(0, 4), child=st.booleans())
def test_called_in_pythons_order_with_threads(modules, child):
    calls = []
    hooks = _hooks(calls, [2], modules)
    hooks.before()
    (hooks.in_child if child else hooks.in_parent)()
    after = [("child" if child else "parent", name) for name in range(modules)]
    assert calls == [("before", name) for name in reversed(range(modules))] + after


def test_left_out_while_alone_and_not_later():
    calls, threads = [], [1]
    hooks = _hooks(calls, threads, 1)
    hooks.before()
    hooks.in_parent()
    assert calls == []
    threads[0] = 2
    hooks.before()
    hooks.in_parent()
    assert calls == [("before", 0), ("parent", 0)]


@given(before=st.integers(1, 3), after=st.integers(1, 3))
def test_a_lock_that_was_taken_is_given_back(before, after):
    """Threads may begin or end between the two halves; both are done, or none."""
    calls, threads = [], [before]
    hooks = _hooks(calls, threads, 1)
    hooks.before()
    threads[0] = after
    hooks.in_parent()
    assert len(calls) in (0, 2)


def test_only_what_is_given_is_called():
    calls = []
    hooks = ThreadHooks(lambda: 2)
    hooks.add(after_in_child=lambda: calls.append("child"))
    hooks.before()
    hooks.in_parent()
    assert calls == []
    hooks.in_child()
    assert calls == ["child"]
