"""What can answer: the ChatEngine protocol, its sampling and its pieces. Standard library only."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from chat.persona import Message

BASE_ONLY = "base"  # the adapter name that means: none, the base as it is
PROMPT_TOKENS = (
    2048  # longest prompt of an engine here; a CPU reads it in some seconds, the training rows are far shorter
)
MAX_NEW_TOKENS = 512
REPLY_SECONDS = 120.0  # a reply ends here even when nobody listens
COLDEST = 0.01  # the lowest temperature that is not greedy
MAX_CHARACTERS = 800  # of one question
MAX_TURNS = 200  # of a history, before trimming by tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the defaults are those of Qwen2.5's generation_config. Temperature 0 is greedy.

    Raises ValueError for a value out of range: the page's API takes what strangers send.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0, 2),
            "top_p": (0.05, 1),
            "top_k": (1, 200),
            "repetition_penalty": (1, 2),
            "max_new_tokens": (1, MAX_NEW_TOKENS),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; choose a number from {low} to {high}.")
        if 0 < self.temperature < COLDEST:  # logits over it would be infinite
            raise ValueError(f"temperature is {self.temperature!r}; choose 0, or a number from {COLDEST} to 2.")


@dataclass(frozen=True)
class Cost:
    """Why a reply ended and what it took."""

    stopped: Literal["end", "length", "time", "cancelled"]
    tokens: int
    first_token: float  # seconds
    seconds: float
    forgotten: int = 0  # messages dropped from the history so that the rest fits

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        after = self.seconds - self.first_token
        return (self.tokens - 1) / after if after > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """Some text of a reply; the last piece carries the cost."""

    text: str
    cost: Cost | None = None
    waiting: float = 0  # seconds until an engine with too much to do is asked again


class Busy(RuntimeError):
    """The engine has more to answer than it can for now."""

    def __init__(self, message: str, seconds: float = 0) -> None:
        super().__init__(message)
        self.seconds = seconds  # after which it may be asked again, by its own word


def check_adapters(adapters: Sequence[str], served: Sequence[str]) -> None:
    """Raise ValueError for an adapter that is not served, with the choice."""
    for adapter in adapters:
        if adapter not in served:
            raise ValueError(f"There is no adapter {adapter!r}; choose one of {', '.join(served)}.")


def whole_number(setting: str, value: str) -> int:
    """A setting's value as a whole number from 1 on. Raises ValueError."""
    if not (value.isascii() and value.isdecimal() and int(value)):
        raise ValueError(f"{setting} is {value!r}. Write a whole number from 1 on.")
    return int(value)


class ChatEngine(Protocol):
    """Anything that can answer. `stream` yields pieces; the caller joins them. Closing the stream stops the model."""

    @property
    def places(self) -> int:
        """How many replies it can give at once; more wait in line."""

    @property
    def most(self) -> int:
        """How many it may come to give at once: an engine may get quick while it serves."""

    @property
    def ready(self) -> bool:
        """Whether it answers at once; while it is still being loaded, a reply waits for that."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names that `stream` takes, the default first; BASE_ONLY is always among them."""

    @property
    def base(self) -> str:
        """The base that answers, and who served it: a line for people."""

    @property
    def refused(self) -> Sequence[str]:
        """Why some adapters are not served, a sentence each: for the log, as they may name folders."""

    def digest(self, adapter: str) -> str:
        """The head of the adapter's sha256, so that a reply can name what said it; empty for the base alone."""

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """Answer the last turn, or with `go_on` continue it, hers or the visitor's.

        Raises ValueError for an unknown adapter or a question too long.
        """

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """Answer the last turn with several adapters in one batch: pieces, each with its adapter's position."""


class Awaited:
    """An engine that another thread is still making: the page can open around it, a reply waits until it is there.

    `base` and `adapters` are what the engine is expected to serve, `make` returns it; what `make` raises, `wait` and
    every reply raise too.
    """

    def __init__(self, base: str, adapters: Sequence[str], make: Callable[[], ChatEngine], places: int = 1) -> None:
        self._most = places
        self._base, self._adapters = base, [*adapters, BASE_ONLY]
        self._making = ThreadPoolExecutor(1, thread_name_prefix="loading").submit(make)

    def wait(self) -> ChatEngine:
        """The engine, once it is there."""
        return self._making.result()

    @property
    def places(self) -> int:
        """Replies at once: of the engine as it is now, one while it is made."""
        return self.wait().places if self.ready else 1

    @property
    def most(self) -> int:
        """Replies at once that it may come to."""
        return self._most

    @property
    def ready(self) -> bool:
        """Whether the engine is there."""
        return self._making.done()

    @property
    def base(self) -> str:
        """The base that answers."""
        return self.wait().base if self.ready else self._base

    @property
    def adapters(self) -> Sequence[str]:
        """What is served; an adapter that the engine turns down leaves the list when the engine is there."""
        return self.wait().adapters if self.ready else self._adapters

    @property
    def refused(self) -> Sequence[str]:
        """Why some adapters are not served."""
        return self.wait().refused if self.ready else ()

    def digest(self, adapter: str) -> str:
        """The head of the adapter's sha256."""
        return self.wait().digest(adapter)

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """As the engine's own."""
        return self.wait().stream(turns, adapter, sampling, cancel, go_on)

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """As the engine's own."""
        return self.wait().compare(turns, adapters, sampling, cancel)


class ScriptedEngine:
    """An engine that says given replies, a character a piece: the page's tests need no model."""

    base = "scripted"
    adapters: tuple[str, ...] = ("scripted", BASE_ONLY)
    refused: tuple[str, ...] = ()
    places = most = 1
    ready = True

    def __init__(self, *replies: str | Exception, pause: float = 0) -> None:
        self.replies = list(replies)
        self.pause = pause  # seconds before each piece
        self.heard: list[tuple[list[Message], str, Sampling]] = []
        self.running = self.peak = self.spoken = 0

    def digest(self, adapter: str) -> str:
        """A digest that is none."""
        return "" if adapter == BASE_ONLY else "0123abcd"

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """Say the next reply, or raise it when it is an exception."""
        self.heard.append((list(turns), adapter, sampling))
        reply = self.replies[(len(self.heard) - 1) % len(self.replies)]
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            yield from self._say(reply, cancel)
        finally:
            self.running -= 1

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """The next replies, one after the other."""
        for position, adapter in enumerate(adapters):
            for piece in self.stream(turns, adapter, sampling, cancel):
                yield position, piece

    def _say(self, reply: str | Exception, cancel: threading.Event) -> Iterator[Piece]:
        if isinstance(reply, Exception):
            raise reply
        for said, character in enumerate(reply, start=1):
            time.sleep(self.pause)
            if cancel.is_set():
                yield Piece("", Cost("cancelled", said - 1, 0, 0))
                return
            self.spoken += 1
            yield Piece(character)
        yield Piece("", Cost("end", len(reply), 0, 0))
