#!/usr/bin/env bash
# limits keeps an entry for each unit of a cost, and each hit looks at the keys of everybody who ever came.
#
# Guess before: a moving window in memory keeps two numbers a key, a hit costs the same however many keys there are, and
# a key whose window has passed is forgotten.
# Seen with limits 5.8.0: a hit of cost 1,000 leaves 1,000 entries. After 20,000 keys were hit once and their window has
# passed, all 20,000 keys are still there, and a hit takes many times the CPU that it took on an empty store: a timer
# thread walks through all keys. So whoever limits tokens of a public chat by it pays for strangers who left.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check limits==5.8.0
cat > try.py <<'PYTHON'
"""What a moving window in memory keeps, and what a hit costs."""
import time

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

KEYS, HITS = 20_000, 20


def cpu_ms_a_hit(window, item):
    """CPU of the whole process, with what a hit leaves to other threads."""
    began = time.process_time()
    for n in range(HITS):
        window.hit(item, f"now {n}")
        time.sleep(0.05)
    return 1000 * (time.process_time() - began) / HITS


store = MemoryStorage()
window = MovingWindowRateLimiter(store)
window.hit(RateLimitItemPerSecond(10_000, 60), "one", cost=1000)
(entries,) = store.events.values()
print(f"a hit of cost 1,000 keeps {len(entries):,} entries")
assert len(entries) == 1000

short = RateLimitItemPerSecond(10, 1)
store = MemoryStorage()
window = MovingWindowRateLimiter(store)
empty = cpu_ms_a_hit(window, short)
for n in range(KEYS):
    window.hit(short, f"stranger {n}")
time.sleep(3)
kept = len(store.events)
crowded = cpu_ms_a_hit(window, short)
print(f"{kept:,} keys are kept three seconds after windows of one second")
print(f"a hit takes {empty:.2f} ms of CPU on an empty store, {crowded:.2f} ms beside them: {crowded / empty:.0f} times")
assert kept >= KEYS and crowded > 5 * empty
PYTHON
venv/bin/python try.py
