"""The line of waiting visitors: first come, first served, each told his place and how long it may take."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.5  # seconds between two looks at the line; a visitor who left is noticed as often
FIRST_GUESS = 10.0  # seconds a reply may take, before one was measured


class Full(Exception):
    """So many are waiting that one more would wait too long."""


class Line:
    """`places` are served at once, at most `longest` wait. Gradio's own queue answers a full line with an error."""

    def __init__(self, places: Callable[[], int], longest: int) -> None:
        self.places, self.longest = places, longest
        self.typical = FIRST_GUESS  # seconds a reply takes, a moving average
        self._tickets: deque[object] = deque()  # those served now, then those who wait
        self._moved = threading.Condition()

    @contextmanager
    def ticket(self) -> Iterator[object]:
        """A place at the end of the line, given up on leaving the block. Raises Full."""
        mine = object()
        with self._moved:
            if len(self._tickets) >= self.places() + self.longest:
                raise Full
            self._tickets.append(mine)
        try:
            yield mine
        finally:
            with self._moved:
                self._tickets.remove(mine)
                self._moved.notify_all()

    def wait(self, ticket: object) -> Iterator[tuple[int, float]]:
        """Until it is this ticket's turn: again and again, how many are ahead and the seconds it may take."""
        while True:
            with self._moved:
                places = self.places()
                ahead = self._tickets.index(ticket) - places + 1
                if ahead <= 0:
                    return
            yield ahead, self.typical * (1 + (ahead - 1) // places)
            with self._moved:
                if self._tickets.index(ticket) >= self.places():
                    self._moved.wait(LOOK)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A reply given inside this block moves the average."""
        began = time.monotonic()
        yield
        self.typical += 0.2 * (time.monotonic() - began - self.typical)
