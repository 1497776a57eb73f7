"""What the rate limiter keeps of strangers who left, and what the next message then costs, beside the `limits` package.

python -m benchmarks.limiter [--visitors 20000]
"""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from benchmarks import results
from page.rate_limiter import DEFAULTS, RateLimiter

TOKENS = 22  # of a reply, the mean of the full set
MESSAGES = 50  # timed, 50 ms apart, so that what `limits` does behind a message is over before the next
UNLIMITED = {"ALL_MESSAGES": "1000000000/minute", "ALL_TOKENS": "1000000000/hour"}
UNITS = {"visitors": "who left", "memory": "MB", "empty": "ms of CPU a message", "full": "ms of CPU a message"}


def ours() -> Callable[[str], None]:
    """A function that counts a message and its tokens, by the page's own limiter."""
    limiter = RateLimiter()

    def message(visitor: str) -> None:
        limiter.admit(visitor)
        limiter.spend(visitor, TOKENS)

    return message


def library(strategy: Any) -> Callable[[str], None]:
    """The same by a strategy of `limits`."""
    window = strategy(MemoryStorage())
    items = {name: parse(value) for name, value in (DEFAULTS | UNLIMITED).items()}

    def message(visitor: str) -> None:
        for name, item in items.items():
            key = visitor if name.startswith("VISITOR") else "all"
            if name.endswith("TOKENS"):
                assert window.test(item, key)
                window.hit(item, key, cost=TOKENS)
            else:
                assert window.hit(item, key)

    return message


KINDS: dict[str, Callable[[], Callable[[str], None]]] = {
    "ours": ours,
    "limits, sliding window counter": lambda: library(SlidingWindowCounterRateLimiter),
    "limits, moving window": lambda: library(MovingWindowRateLimiter),
}


def measure(kind: str, visitors: int, rows: Any) -> None:
    """One limiter in this process, which ends with it."""
    os.environ.update(UNLIMITED)
    message, names = KINDS[kind](), (f"stranger {n:016d}" for n in itertools.count())

    def cost() -> float:
        began = time.process_time()
        for _ in range(MESSAGES):
            message(next(names))
            time.sleep(0.05)
        return (time.process_time() - began) / MESSAGES * 1e3

    process = psutil.Process()
    empty, before = cost(), process.memory_info().rss
    for _ in range(visitors):
        message(next(names))
    time.sleep(1)  # what `limits` does behind the last of them
    grown = (process.memory_info().rss - before) / 1e6
    rows.put({"limiter": kind, "visitors": visitors, "memory": grown, "empty": empty, "full": cost()})


def main() -> None:
    """Measure each in a fresh process, write the results and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--visitors", type=int, default=20_000)
    args = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    rows = fresh.SimpleQueue()
    for kind in KINDS:
        process = fresh.Process(target=measure, args=(kind, args.visitors, rows))
        process.start()
        process.join()
    results.save("limiter", [rows.get() for _ in KINDS], UNITS)
    print(results.table("limiter"))


if __name__ == "__main__":
    main()
