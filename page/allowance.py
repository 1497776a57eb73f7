"""How much one visitor, and all together, may ask for: the page is public, and its API takes what strangers send."""

import os

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
ALL = "all"


class Exceeded(Exception):
    """The visitor, or all together, asked for more than is allowed for now."""


class Allowance:
    """Moving windows in memory. A session's name can be forged anew each time, so the sum over all is the true cap."""

    def __init__(self) -> None:
        self._limits: dict[str, RateLimitItem] = {name: _limit(name) for name in DEFAULTS}
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, visitor: str) -> None:
        """Count a message. Raises Exceeded."""
        for name, who in self._keys(visitor, "TOKENS"):
            if not self._window.test(self._limits[name], who):
                raise Exceeded
        for name, who in self._keys(visitor, "MESSAGES"):
            if not self._window.hit(self._limits[name], who):
                raise Exceeded

    def spend(self, visitor: str, tokens: int) -> None:
        """Count the tokens of a reply; one that went over is not taken back, the next is refused."""
        for name, who in self._keys(visitor, "TOKENS"):
            limit = self._limits[name]
            left = self._window.get_window_stats(limit, who).remaining
            self._window.hit(limit, who, cost=min(tokens, left)) if left else None

    @staticmethod
    def _keys(visitor: str, kind: str) -> list[tuple[str, str]]:
        return [(f"VISITOR_{kind}", f"visitor {visitor}"), (f"ALL_{kind}", ALL)]


def _limit(name: str) -> RateLimitItem:
    value = os.environ.get(name) or DEFAULTS[name]
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}. Write it like {DEFAULTS[name]!r}.") from error
