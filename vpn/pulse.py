"""When to ask a quiet tunnel for a sign of life, and when it counts as lost. Pure: time is an argument, in seconds.

::

    quiet --nothing came from there for ``interval``--> asked --answer--> quiet
                                                          +-- silence --> doubtful
    doubtful --asked again, every ``AGAIN`` seconds; answer, or anything from there--> quiet
       +-- still silent ``patience`` seconds after the first silence--> lost

What never answered is not doubted: it may be made so.
"""

from __future__ import annotations

AGAIN = 1.0


class Pulse:
    """Of one thing. ``proven``: it has answered before, or must. ``answer``: bytes that its answers may take."""

    def __init__(
        self, interval: float, patience: float = 0.0, *, now: float, proven: bool = True, answer: int = 0
    ) -> None:
        self.due = now + interval
        """When to ask next."""
        self._interval = interval
        self._patience = patience
        self._proven = proven
        self._answer = answer
        self._silent_since: float | None = None
        self._received: int | None = None

    def on_traffic(self, received: int | None, now: float) -> None:
        """``received`` bytes have come from there so far (None: nobody knows); if these are more than at the last call,
        and not by an answer alone, they are a sign of life.
        """
        if received is not None and self._received is not None and received > self._received + self._answer:
            self.on_answer(now)
        self._received = received

    def on_answer(self, now: float) -> None:
        """It answered."""
        self._proven = True
        self._silent_since = None
        self.due = now + self._interval

    def on_silence(self, now: float) -> bool:
        """It did not answer: whether it is lost now."""
        if not self._proven:
            self.due = now + self._interval
            return False
        if self._silent_since is None:
            self._silent_since = now
        self.due = now + min(AGAIN, self._interval)
        return now - self._silent_since >= self._patience
