"""RemoteEngine: any OpenAI-compatible servers with LoRA adapters: vLLM, SGLang, Ray Serve LLM, transformers serve."""

import asyncio
import itertools
import logging
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import anyio
import httpx

from chat.engine import BASE_ONLY, Busy, ChatEngine, Cost, Piece, Sampling, whole_number
from chat.fetch import Unavailable
from chat.persona import Message
from chat.wire import Limits, Server, chatml

log = logging.getLogger(__name__)

URL = "ENGINE_URL"  # the setting that chooses this engine
PLACES = 32  # replies at once
PROMPT_BYTES = 8192  # longest prompt; of Chinese and of English about the 2,048 tokens that the local engine keeps
STARTING = 600.0  # seconds that a server may take to load its model
LONGEST_WAIT = 8.0  # seconds between two attempts
BEAT = 0.5  # seconds between two signs of life while nothing is said, so that a visitor who left is noticed
VERSION = re.compile(r".*-([0-9a-f]{8,12})")  # an adapter published as NAME-DIGEST
Pieces = queue.SimpleQueue[tuple[int, Piece] | None]


def connect(settings: Mapping[str, str] = os.environ, limits: Limits | None = None) -> "RemoteEngine":
    """The engine that the settings name, once one of its servers answers. Raises Unavailable or ValueError."""
    fallback = None
    if choice := settings.get("ENGINE_FALLBACK"):
        from chat import load_here
        from chat.base import BASES

        # Not on a GPU, which may be the very one that the engine fills.
        fallback = load_here(choice, engine="llama" if choice in BASES else None)
    engine = RemoteEngine(
        [url.strip() for url in settings[URL].split(",") if url.strip()],
        key=settings.get("ENGINE_KEY", ""),
        base=settings.get("ENGINE_BASE", ""),
        wanted=[name.strip() for name in settings.get("ENGINE_ADAPTERS", "").split(",") if name.strip()],
        places=whole_number("ENGINE_PLACES", settings.get("ENGINE_PLACES") or str(PLACES)),
        fallback=fallback,
        limits=limits or Limits(),
    )
    engine.wait(0 if fallback else STARTING)
    return engine


@dataclass(frozen=True)
class _Asked:
    """What a visitor wants answered."""

    turns: Sequence[Message]
    sampling: Sampling
    go_on: bool


@dataclass
class _Said:
    """How far one reply has come; its pieces go to whoever waits for them."""

    adapter: str
    row: int
    pieces: Pieces
    began: float = field(default_factory=time.monotonic)
    first: float = 0
    tokens: int = 0

    def add(self, text: str) -> None:
        """A piece more; a server that counts tokens corrects their number in the end."""
        self.first = self.first or time.monotonic()
        self.tokens += 1
        self.pieces.put((self.row, Piece(text)))

    def cost(self, stopped: Literal["end", "length", "time", "cancelled"]) -> Cost:
        """What it took, now that it has ended."""
        now = time.monotonic()
        return Cost(stopped, self.tokens, (self.first or now) - self.began, now - self.began)


class RemoteEngine:
    """Servers with the same base. Its own thread runs one task for each reply; cancelling it closes the connection."""

    ready = True

    def __init__(
        self, urls: Sequence[str], *, key: str = "", base: str = "", wanted: Sequence[str] = (),
        places: int = PLACES, fallback: ChatEngine | None = None, limits: Limits,
    ) -> None:  # fmt: skip
        self.places, self.most, self.limits = places, places, limits
        self._fallback, self._wanted = fallback, wanted
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Redirects are not followed and certificates are checked: httpx's defaults.
        client = httpx.AsyncClient(
            headers=headers, timeout=httpx.Timeout(None, connect=limits.connect), limits=httpx.Limits()
        )
        self.servers = [Server(url, client, limits, base) for url in urls]
        self._looked = threading.Event()
        threading.Thread(target=self._run, name="remote", daemon=True).start()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):  # by close
            asyncio.run(self._watch())

    async def _watch(self) -> None:
        """Look at every server again and again: one that is away, or back, or serves other adapters, is noticed."""
        self._loop, watch = asyncio.get_running_loop(), asyncio.current_task()
        assert watch is not None
        self._end = watch.cancel
        while True:
            await asyncio.gather(*(server.look() for server in self.servers))
            self._looked.set()
            await asyncio.sleep(self.limits.look)

    def wait(self, seconds: float) -> None:
        """Until a server answers. Raises ValueError or Unavailable when none does, or none with our prompt."""
        deadline = time.monotonic() + seconds
        self._looked.wait()
        while not any(server.up for server in self.servers) and time.monotonic() < deadline:
            if refused := [server.refused for server in self.servers if server.refused]:
                raise ValueError(refused[0])
            time.sleep(self.limits.look)
        if seconds and not any(server.up for server in self.servers):
            raise Unavailable("No engine answers. Start it, or correct ENGINE_URL.")

    @property
    def base(self) -> str:
        """The base that answers; the local one while no server does."""
        if self._fallback and not any(server.up for server in self.servers):
            return self._fallback.base
        named = next((server.base for server in self.servers if server.base), "?")
        return f"{named.rstrip('/').rsplit('/', 1)[-1]} (engine)"

    @property
    def adapters(self) -> list[str]:
        """Those of ENGINE_ADAPTERS, or all that any server has listed, then the base alone."""
        listed = dict.fromkeys(name for server in self.servers for name in server.models if name != BASE_ONLY)
        return [*(name for name in self._wanted or listed if name in listed), BASE_ONLY]

    @property
    def refused(self) -> list[str]:
        """Why some servers or adapters are not used."""
        missing = [name for name in self._wanted if name not in self.adapters]
        return [
            *(server.refused for server in self.servers if server.refused),
            *(f"No engine serves the adapter {name} of ENGINE_ADAPTERS." for name in missing),
        ]

    def digest(self, adapter: str) -> str:
        """The end of a versioned name, NAME-DIGEST; servers do not tell the digest of what they serve."""
        found = VERSION.fullmatch(adapter)
        return found[1] if found else ""

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """Answer the last turn, or with `go_on` continue it. Closing the iterator closes the connection.

        Raises ValueError for an unknown adapter or a question refused, Busy when the servers stay full, Unavailable
        when none answers or one breaks off.
        """
        for _, piece in self._speak(_Asked(turns, sampling, go_on), [adapter], cancel):
            yield piece

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """Answer with several adapters side by side, a stream for each. Raises as `stream` does."""
        return self._speak(_Asked(turns, sampling, False), adapters, cancel)

    def _speak(self, asked: _Asked, adapters: Sequence[str], cancel: threading.Event) -> Iterator[tuple[int, Piece]]:
        for adapter in adapters:
            if adapter not in self.adapters:
                raise ValueError(f"There is no adapter {adapter!r}; choose one of {', '.join(self.adapters)}.")
        pieces: Pieces = queue.SimpleQueue()
        replies = [_Said(adapter, row, pieces) for row, adapter in enumerate(adapters)]
        try:
            yield from self._remotely(asked, replies, cancel)
        except Unavailable as error:
            if not self._fallback or any(said.tokens for said in replies):
                raise
            log.warning("%s The local base answers.", error)
            yield from self._locally(self._fallback, asked, adapters, cancel)

    def _remotely(self, asked: _Asked, replies: list[_Said], cancel: threading.Event) -> Iterator[tuple[int, Piece]]:
        room = min(server.context for server in self.servers) - asked.sampling.max_new_tokens
        kept = fit(asked.turns, min(PROMPT_BYTES, room))
        work = asyncio.run_coroutine_threadsafe(self._all(replace(asked, turns=kept), replies), self._loop)
        pieces = replies[0].pieces
        work.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from _heard(pieces, cancel)
            costs = [said.cost("cancelled") for said in replies] if cancel.is_set() else work.result()
            for row, cost in enumerate(costs):
                yield row, Piece("", replace(cost, forgotten=len(asked.turns) - len(kept)))
        finally:
            work.cancel()

    @staticmethod
    def _locally(
        local: ChatEngine, asked: _Asked, adapters: Sequence[str], cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        worn = [name if name in local.adapters else local.adapters[0] for name in adapters]
        if len(worn) > 1:
            yield from local.compare(asked.turns, worn, asked.sampling, cancel)
            return
        for piece in local.stream(asked.turns, worn[0], asked.sampling, cancel, asked.go_on):
            yield 0, piece

    async def _all(self, asked: _Asked, replies: list[_Said]) -> list[Cost]:
        tasks = [asyncio.ensure_future(self._reply(asked, said)) for said in replies]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _reply(self, asked: _Asked, said: _Said) -> Cost:
        """A reply from the first server that gives one; after its first token no other is asked."""
        deadline = time.monotonic() + self.limits.patience
        for attempt in itertools.count():
            failures: list[Exception] = []
            able = [server for server in self.servers if server.up and said.adapter in server.models]
            for server in sorted(able, key=lambda server: server.running):
                try:
                    return await self._listen(server, asked, said)
                except (Busy, Unavailable) as error:
                    if said.tokens:
                        raise
                    log.warning(error)
                    failures.append(error)
            await self._pause(said, failures, attempt, deadline)
        raise AssertionError("attempts are endless")

    async def _pause(self, said: _Said, failures: list[Exception], attempt: int, deadline: float) -> None:
        """Wait before the next attempt, and say so. Raises why there is none when that would take too long."""
        busy = next((error for error in failures if isinstance(error, Busy)), None)
        wait = max(busy.seconds if busy else 0, min(self.limits.pause * 2**attempt, LONGEST_WAIT))
        wait *= random.uniform(1, 1.5)  # so that those turned away together do not come back together
        if time.monotonic() + wait > deadline or (self._fallback and not failures):
            raise busy or Unavailable(f"No engine that serves {said.adapter} answers.")
        said.pieces.put((said.row, Piece("", waiting=wait)))
        await asyncio.sleep(wait)

    async def _listen(self, server: Server, asked: _Asked, said: _Said) -> Cost:
        stopped, counted = "", 0
        server.running += 1
        try:
            with anyio.move_on_after(self.limits.whole) as whole:
                request = server.request(said.adapter, asked.turns, asked.sampling, asked.go_on)
                async with aclosing(server.reply(*request)) as heard:
                    async for text, ended, tokens in heard:
                        stopped, counted = ended or stopped, tokens or counted
                        if text:
                            said.add(text)
        except Unavailable:
            server.up = False  # until it is looked at again
            raise
        finally:
            server.running -= 1
        said.tokens = counted or said.tokens
        if whole.cancelled_caught:
            return said.cost("time")
        return said.cost("length" if stopped == "length" else "end")

    def close(self) -> None:
        """End the engine's thread, and with it whatever is being said."""
        self._loop.call_soon_threadsafe(self._end)


def _heard(pieces: Pieces, cancel: threading.Event) -> Iterator[tuple[int, Piece]]:
    """What is said, and while nothing is, an empty piece now and then: only at a piece can a visitor leave."""
    while not cancel.is_set():
        try:
            spoken = pieces.get(timeout=BEAT)
        except queue.Empty:
            yield 0, Piece("")
            continue
        if spoken is None:
            return
        yield spoken


def fit(turns: Sequence[Message], room: int) -> list[Message]:
    """The newest turns, from a question on, whose prompt is at most `room` bytes; the last question always stays.

    Bytes are a bound that holds for every server without asking it: a byte-level tokenizer, as Qwen2.5's, never makes
    more tokens than there are bytes. A question that alone is too long is refused by the server.
    """
    questions = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    kept = list(turns[questions[-1] if questions else -1 :])
    for start in reversed(questions[:-1]):
        if len(chatml(turns[start:]).encode()) > room:
            break
        kept = list(turns[start:])
    return kept
