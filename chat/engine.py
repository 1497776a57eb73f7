"""The ChatEngine protocol, its chunks and usage, and what engines share. Standard library only."""

import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from chat.persona import Message
from chat.sampling import Sampling

BASE_ONLY = "base"  # the adapter name that means: none, the base as it is
PROMPT_TOKENS = 2048  # longest prompt of an engine here; a CPU prefills it in some seconds, training rows are shorter
REPLY_SECONDS = 120.0  # a reply ends here even when nobody listens
HEARTBEAT = 0.5  # seconds between two empty chunks while there is no text: a visitor can leave only at a chunk
MAX_CHARACTERS = 800  # of one question
MAX_TURNS = 200  # of a history, before trimming by tokens


FinishReason = Literal["stop", "length", "time", "cancelled"]


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
        """Speed after the first token."""
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


def until_loaded(loading: "Future[None]") -> Iterator[Chunk]:
    """An empty chunk every HEARTBEAT seconds until loading is done. Raises what loading raised."""
    while not wait([loading], HEARTBEAT).done:
        yield Chunk("")
    loading.result()


def drain(chunks: Chunks, replies: Sequence["Future[Usage]"], dropped_messages: int = 0) -> Iterator[Chunk]:
    """The chunks that replies under way put into their queue, and for each reply that ends a chunk with its usage.

    `replies` holds the usage to come of each row. While there is no text an empty chunk comes every HEARTBEAT seconds.
    Raises at once what one of the replies raised; the caller stops the others.
    """
    for reply in replies:
        reply.add_done_callback(chunks.put)
    left = len(replies)
    while left:
        try:
            item = chunks.get(timeout=HEARTBEAT)
        except queue.Empty:
            item = Chunk("")
        if isinstance(item, Chunk):
            yield item
        else:
            left -= 1
            usage = replace(item.result(), dropped_messages=dropped_messages)
            yield Chunk("", replies.index(item), usage)


class ChatEngine(Protocol):
    """Anything that can answer. It may still be loading: `wait` returns when it is `ready`, `stream` waits for that."""

    @property
    def num_slots(self) -> int:
        """How many replies it generates at once; further ones wait in a queue."""

    @property
    def max_num_seqs(self) -> int:
        """How many it may come to generate at once: `num_slots` may grow while it serves."""

    @property
    def ready(self) -> bool:
        """Whether it answers at once."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names that `stream` takes, the default first; BASE_ONLY is always among them.

        While it loads: those it expects to serve; an adapter that is turned down leaves the list.
        """

    @property
    def base(self) -> str:
        """The base that answers, and where its bytes came from: a line for people."""

    @property
    def refused(self) -> Sequence[str]:
        """Why some adapters are not served, a sentence each: for the log, as they may name folders."""

    def wait(self) -> None:
        """Return once it is ready. Raises what loading raised."""

    def digest(self, adapter: str) -> str:
        """The first hex digits of the adapter's sha256; empty for the base alone."""

    def stream(
        self, messages: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
        continue_final_message: bool = False,
    ) -> Iterator[Chunk]:  # fmt: skip
        """Generate a reply with each of the adapters, or with `continue_final_message` continue the last message.

        Chunks of different rows may be interleaved. Closing the iterator or setting `cancel` stops the model.
        Raises ValueError for an unknown adapter or a question too long, Busy, Unavailable, or what loading raised.
        """
