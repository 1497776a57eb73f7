"""The queue of waiting visitors: first come, first served, each told how many are ahead and how long it may take."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.5  # between two looks at the queue; a visitor who left is noticed as often
FIRST_GUESS = 10.0  # seconds a reply may take, before one was measured


class Full(Exception):
    """So many are waiting that one more would wait too long."""


class WaitingQueue:
    """`num_slots()` are served at once, at most `longest` wait. Gradio's own queue answers with an error when full."""

    def __init__(self, num_slots: Callable[[], int], longest: int) -> None:
        self.num_slots, self.longest = num_slots, longest
        self.reply_seconds = FIRST_GUESS  # that a reply takes: a moving average
        self._tickets: deque[object] = deque()  # of those served now, then of those who wait
        self._moved = threading.Condition()

    @contextmanager
    def ticket(self) -> Iterator[object]:
        """The end of the queue, given up on leaving the block. Raises Full."""
        ticket = object()
        with self._moved:
            if len(self._tickets) >= self.num_slots() + self.longest:
                raise Full
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()

    def wait(self, ticket: object) -> Iterator[tuple[int, float]]:
        """Until it is this ticket's turn: again and again, how many are ahead and the seconds it may take."""
        while True:
            with self._moved:
                num_slots = self.num_slots()
                ahead = self._tickets.index(ticket) - num_slots + 1
                if ahead <= 0:
                    return
            yield ahead, self.reply_seconds * (1 + (ahead - 1) // num_slots)
            with self._moved:
                if self._tickets.index(ticket) >= self.num_slots():
                    self._moved.wait(POLL_SECONDS)

    @property
    def served(self) -> int:
        """How many are answered now."""
        return min(len(self._tickets), self.num_slots())

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A reply given inside this block moves the average."""
        started = time.monotonic()
        yield
        self.reply_seconds += 0.2 * (time.monotonic() - started - self.reply_seconds)
