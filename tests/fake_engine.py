"""An engine that says given replies, a character a chunk: tests and benchmarks of the page need no model."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from chat.engine import BASE_ONLY, Chunk, Health, Usage
from chat.persona import Message
from chat.sampling import Sampling


class FakeEngine:
    """Replies come in order, again and again; one that is an exception is raised."""

    base, temperature = "scripted", Sampling.temperature
    adapters: tuple[str, ...] = ("scripted", BASE_ONLY)
    refused: tuple[str, ...] = ()
    unstated: Mapping[str, Sequence[str]] = MappingProxyType({})
    num_slots = max_num_seqs = 1
    ready = True
    health: Health = "ok"

    def __init__(self, *replies: str | Exception, pause: float = 0) -> None:
        self.replies = list(replies)
        self.pause = pause  # seconds before each chunk
        self.asked: list[tuple[list[Message], str, Sampling]] = []
        self.running = self.peak = self.generated = 0

    def wait(self) -> None:
        """It is ready."""

    def digest(self, adapter: str) -> str:
        """A digest that is none."""
        return "" if adapter == BASE_ONLY else "0123abcd"

    def stream(
        self,
        messages: Sequence[Message],
        adapters: Sequence[str],
        sampling: Sampling,
        cancel: threading.Event,
        continue_final_message: bool = False,
    ) -> Iterator[Chunk]:
        """The next replies, one adapter after the other."""
        for row, adapter in enumerate(adapters):
            self.asked.append((list(messages), adapter, sampling))
            reply = self.replies[(len(self.asked) - 1) % len(self.replies)]
            self.running += 1
            self.peak = max(self.peak, self.running)
            try:
                yield from self._generate(reply, row, cancel)
            finally:
                self.running -= 1

    def _generate(self, reply: str | Exception, row: int, cancel: threading.Event) -> Iterator[Chunk]:
        if isinstance(reply, Exception):
            raise reply
        for tokens, character in enumerate(reply):
            time.sleep(self.pause)
            if cancel.is_set():
                yield Chunk("", row, Usage("cancelled", tokens, 0, 0))
                return
            self.generated += 1
            yield Chunk(character, row)
        yield Chunk("", row, Usage("stop", len(reply), 0, 0))
