"""A page around an engine that is scripted at the pace of a GPU, in a process of its own: `benchmarks.page` starts it.

It runs from the checkout that PYTHONPATH names, this one or an earlier build, whose engines had other names.
"""

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

sys.path.pop(0)  # the folder of this file, whose page.py would hide the package page

import app
from chat import engine

LETTERS = 128  # of a reply; benchmarks.page has both numbers too
LETTERS_PER_SECOND = 160  # of each reply, however many are generated: the decoder's pace on an H200 with 32 visitors


def reply(question: str) -> str:
    """What the engine answers: letters that name the question, so that a reply given to another visitor is noticed."""
    return (question * LETTERS)[:LETTERS]


class PacedEngine:
    """Letters come on a clock of their own, as from an engine with threads of its own: a slow page delays none."""

    base, adapters, refused, ready, health = "scripted", ("scripted", "base"), (), True, "ok"
    temperature = 0.7

    def __init__(self, num_slots: int) -> None:
        self.num_slots = self.max_num_seqs = self.places = self.most = num_slots

    def wait(self) -> None:
        """It is ready."""

    def digest(self, adapter: str) -> str:
        """None."""
        return ""

    def stream(self, messages: Any, adapters: Any, sampling: Any, cancel: threading.Event, *_: Any) -> Iterator[Any]:
        """The reply to the last message."""
        began, text = time.perf_counter(), reply(messages[-1]["content"])
        for n, letter in enumerate(text, start=1):
            time.sleep(max(0.0, began + n / LETTERS_PER_SECOND - time.perf_counter()))
            yield CHUNK(letter)
        yield CHUNK("", **{END: USAGE("stop" if NEW else "end", len(text), 0.0, time.perf_counter() - began)})


CONTRACT: Any = engine
NEW = hasattr(engine, "Chunk")
CHUNK, USAGE, END = (CONTRACT.Chunk, CONTRACT.Usage, "usage") if NEW else (CONTRACT.Piece, CONTRACT.Cost, "cost")


def main() -> None:
    """Open the page for so many visitors, print its address, and serve until standard input ends."""
    num_slots = int(sys.argv[1])
    page = app.build_page(PacedEngine(num_slots))  # type: ignore[arg-type]
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_threads=3 * num_slots + 40, **app.LAUNCH)
    print(url, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
