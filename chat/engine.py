"""The ChatEngine protocol, its chunks and usage, and what engines share. Standard library only."""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from chat.persona import Message
from chat.sampling import Sampling

BASE_ONLY = "base"  # the adapter name that means: none, the base as it is
PROMPT_TOKENS = 2048  # longest prompt of an engine here; a CPU prefills it in some seconds, training rows are shorter
REPLY_SECONDS = 120.0  # a reply ends here even when nobody listens
HEARTBEAT = 0.5  # seconds between two empty chunks while there is no text: a visitor can leave only at a chunk
STALL_SECONDS = 25.0  # without progress until an engine counts as stuck; its longest step takes some seconds
MAX_CHARACTERS = 800  # of one question
MAX_TURNS = 200  # of a history, before trimming by tokens

FinishReason = Literal["stop", "length", "time", "cancelled"]
Health = Literal["ok", "loading", "stuck", "dead", "unavailable"]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Why a reply ended and what it took; `finish_reason` as in OpenAI's API, with two reasons of ours."""

    finish_reason: FinishReason
    tokens: int
    first_token: float  # seconds
    seconds: float
    dropped_messages: int = 0  # from the start of the history, so that the rest fits

    @property
    def tokens_per_second(self) -> float:
        """After the first token."""
        after = self.seconds - self.first_token
        return (self.tokens - 1) / after if after > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """Some text of one reply; the last chunk of a reply carries its usage."""

    text: str
    row: int = 0  # which of the adapters asked for it belongs to
    usage: Usage | None = None
    retry_after: float = 0  # seconds until a busy engine is asked again; the text is empty then


Chunks = queue.SimpleQueue["Chunk | Future[Usage]"]  # of one request: its chunks, and each reply when it is done


class Busy(RuntimeError):
    """The engine has more to answer than it can for now."""

    def __init__(self, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds, by its own word


class Stalled(RuntimeError):
    """The engine gets no further: its inference thread is stuck or dead."""


class InferenceThreads(ThreadPoolExecutor):
    """Threads whose jobs call `progress` at every step, so that others notice a step that never ends."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, thread_name_prefix=name)
        self._unfinished: set[Callable[[], Any]] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        def job() -> T:
            try:
                return fn(*args, **kwargs)
            finally:
                self._unfinished.discard(job)  # no progress: jobs of those who gave up end while another is stuck

        if not self._unfinished:
            self.progress()
        self._unfinished.add(job)
        return super().submit(job)

    def progress(self) -> None:
        self._last = time.monotonic()

    @property
    def health(self) -> Health:
        if self._shutdown or not all(thread.is_alive() for thread in list(self._threads)):
            return "dead"
        return "stuck" if self._unfinished and time.monotonic() - self._last > STALL_SECONDS else "ok"

    def check(self) -> None:
        """Raise Stalled unless it gets on."""
        if (health := self.health) != "ok":
            raise Stalled(f"The inference thread is {health}. Start the program again.")


def check_adapters(adapters: Sequence[str], served: Sequence[str]) -> None:
    """Raise ValueError for an adapter that is not served, with the choice."""
    for adapter in adapters:
        if adapter not in served:
            raise ValueError(f"There is no adapter {adapter!r}; choose one of {', '.join(served)}.")


def max_num_seqs(default: int, prefix: str = "", settings: Mapping[str, str] = os.environ) -> int:
    """How many replies to generate at once: the setting MAX_NUM_SEQS, or PLACES, its old name. Raises ValueError."""
    for name in (f"{prefix}MAX_NUM_SEQS", f"{prefix}PLACES"):
        if value := settings.get(name):
            if not (value.isascii() and value.isdecimal() and int(value)):
                raise ValueError(f"{name} is {value!r}. Write a whole number from 1 on.")
            return int(value)
    return default


def until_loaded(loading: "Future[None]", threads: InferenceThreads) -> Iterator[Chunk]:
    """An empty chunk every HEARTBEAT seconds until loading is done. Raises what loading raised, or Stalled."""
    while not wait([loading], HEARTBEAT).done:
        yield Chunk("")
    loading.result()
    threads.check()


def drain(chunks: Chunks, replies: Sequence["Future[Usage]"], dropped_messages: int = 0,
          threads: InferenceThreads | None = None) -> Iterator[Chunk]:  # fmt: skip
    """The chunks that replies under way put into their queue, and for each that ends a chunk with its usage.

    An empty chunk comes every HEARTBEAT seconds without text. Raises at once what one of the replies raised,
    and Stalled when the threads that generate them get no further; the caller cancels the others.
    """
    for reply in replies:
        reply.add_done_callback(chunks.put)
    left = len(replies)
    while left:
        try:
            item = chunks.get(timeout=HEARTBEAT)
        except queue.Empty:
            if threads:
                threads.check()
            item = Chunk("")
        if isinstance(item, Chunk):
            yield item
        else:
            left -= 1
            if (error := item.exception()) and not isinstance(error, Exception):  # SystemExit, on an inference thread
                raise Stalled(f"A reply ended its thread: {error!r}.") from error
            usage = replace(item.result(), dropped_messages=dropped_messages)
            yield Chunk("", replies.index(item), usage)


class ChatEngine(Protocol):
    """Anything that can answer. It may still be loading: `wait` returns when it is `ready`, `stream` waits for that."""

    @property
    def base(self) -> str: ...  # which one, and where its bytes came from: a line for people
    @property
    def adapters(self) -> Sequence[str]: ...  # the default first, BASE_ONLY last; what is turned down leaves
    @property
    def refused(self) -> Sequence[str]: ...  # a sentence for each one that is not served: for the log
    @property
    def unstated(self) -> Mapping[str, Sequence[str]]: ...  # of its folder, by adapter: "prompt", "base"
    @property
    def num_slots(self) -> int: ...  # how many replies it generates at once; further ones wait in a queue
    @property
    def max_num_seqs(self) -> int: ...  # to how many that may grow
    @property
    def temperature(self) -> float: ...  # at which its base talks by default
    @property
    def ready(self) -> bool: ...  # whether it answers at once
    @property
    def health(self) -> Health: ...  # "ok" and "loading" are well
    def wait(self) -> None: ...  # until it is ready; raises what loading raised
    def digest(self, adapter: str) -> str: ...  # first hex digits of the adapter's sha256; empty for the base alone

    def stream(self, messages: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
               continue_final_message: bool = False) -> Iterator[Chunk]:  # fmt: skip
        """Generate a reply with each of the adapters, or with `continue_final_message` continue the last message.

        Chunks of different rows may be interleaved. Closing the iterator or setting `cancel` stops the model.
        Raises ValueError for an unknown adapter or too long a question, Busy, Stalled, Unavailable, or as loading did.
        """
