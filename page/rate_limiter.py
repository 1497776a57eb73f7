"""How much one visitor, and all together, may ask for: the page is public, and its API takes what strangers send."""

import os
from collections.abc import Iterator

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

# setting → what is allowed; the name of each is an environment variable
DEFAULTS = {
    "VISITOR_MESSAGES": "15/minute",
    "VISITOR_TOKENS": "20000/hour",
    "ALL_MESSAGES": "300/minute",
    "ALL_TOKENS": "2000000/hour",
}


class Exceeded(Exception):
    """The visitor, or all together, asked for more than is allowed for now."""


class RateLimiter:
    """Moving windows in memory. A session's name can be forged anew each time, so the sum over all is the true cap."""

    def __init__(self) -> None:
        """Read the settings. Raises ValueError for one that cannot be read."""
        self._limits: dict[str, RateLimitItem] = {}
        for name, default in DEFAULTS.items():
            value = os.environ.get(name) or default
            try:
                self._limits[name] = parse(value)
            except ValueError as error:
                raise ValueError(f"{name} is {value!r}. Write it like {default!r}.") from error
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, visitor_id: str) -> None:
        """Count a message. Raises Exceeded."""
        for kind, allowed in (("TOKENS", self._window.test), ("MESSAGES", self._window.hit)):
            if not all(allowed(limit, key) for limit, key in self._windows(visitor_id, kind)):
                raise Exceeded

    def spend(self, visitor_id: str, tokens: int) -> None:
        """Count the tokens of a reply; one that went over is not taken back, the next is refused."""
        for limit, key in self._windows(visitor_id, "TOKENS"):
            if left := self._window.get_window_stats(limit, key).remaining:
                self._window.hit(limit, key, cost=min(tokens, left))

    def _windows(self, visitor_id: str, kind: str) -> Iterator[tuple[RateLimitItem, str]]:
        yield self._limits[f"VISITOR_{kind}"], f"visitor {visitor_id}"
        yield self._limits[f"ALL_{kind}"], "all"
