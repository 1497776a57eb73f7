"""How much one visitor, and all together, may ask for: the page is public, and its API takes what strangers send."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

from limits import RateLimitItem, parse

# setting → what is allowed; the name of each is an environment variable
DEFAULTS = {
    "VISITOR_MESSAGES": "15/minute",
    "VISITOR_TOKENS": "20000/hour",
    "ALL_MESSAGES": "300/minute",
    "ALL_TOKENS": "2000000/hour",
}
ALL = 0  # the key of all together


class Exceeded(Exception):
    """The visitor, or all together, asked for more than is allowed for now."""


class SlidingWindowCounter:
    """A limit for each key. What was taken in the window before counts by the part of it that is not yet over.

    Windows begin for all keys at once, so that a whole window is forgotten in one step: a call costs the same however
    many keys there are. `limits` decides alike, but looks at every key whenever one is used (`benchmarks/limiter.py`).
    """

    def __init__(self, limit: RateLimitItem) -> None:
        self._amount, self._seconds = limit.amount, limit.get_expiry()
        self._number = 0.0
        self._before, self._taken = Counter[int](), Counter[int]()

    def _part(self) -> float:
        """How much of the present window is over; what came before the one before it is forgotten."""
        number, part = divmod(time.monotonic() / self._seconds, 1)
        if number != self._number:
            self._before = self._taken if number == self._number + 1 else Counter()
            self._number, self._taken = number, Counter()
        return part

    def allows(self, key: int) -> bool:
        """Whether something is left."""
        part = self._part()
        return self._before[key] * (1 - part) + self._taken[key] < self._amount

    def take(self, key: int, amount: int) -> None:
        """Count so much, be it left or not."""
        self._part()
        self._taken[key] += amount


class RateLimiter:
    """Limits in memory. A session's name can be forged anew each time, so the sum over all is the true cap."""

    def __init__(self) -> None:
        """Read the settings. Raises ValueError for one that cannot be read."""
        self._limits: dict[str, SlidingWindowCounter] = {}
        for name, default in DEFAULTS.items():
            value = os.environ.get(name) or default
            try:
                self._limits[name] = SlidingWindowCounter(parse(value))
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}. Write it like {default!r}.") from error
        self._lock = threading.Lock()

    def admit(self, visitor_id: str) -> None:
        """Count a message. Raises Exceeded, and then counts nothing: refused strangers take no memory."""
        with self._lock:
            if not all(window.allows(key) for window, key in self._windows(visitor_id, "TOKENS", "MESSAGES")):
                raise Exceeded
            for window, key in self._windows(visitor_id, "MESSAGES"):
                window.take(key, 1)

    def spend(self, visitor_id: str, tokens: int) -> None:
        """Count the tokens of a reply; one that went over is not taken back, the next is refused."""
        with self._lock:
            for window, key in self._windows(visitor_id, "TOKENS"):
                window.take(key, tokens)

    def _windows(self, visitor_id: str, *kinds: str) -> Iterator[tuple[SlidingWindowCounter, int]]:
        for kind in kinds:
            yield self._limits[f"VISITOR_{kind}"], hash(visitor_id)  # for a stranger's name may be of any length
            yield self._limits[f"ALL_{kind}"], ALL
