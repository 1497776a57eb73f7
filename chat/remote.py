"""RemoteEngine: any OpenAI-compatible servers with LoRA adapters: vLLM, SGLang, Ray Serve LLM, transformers serve."""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import anyio
import httpx
from anyio.from_thread import BlockingPortal

from chat.bases import BASES
from chat.download import Unavailable
from chat.engine import BASE_ONLY, Busy, ChatEngine, Chunk, Chunks, Health, Usage, check_adapters, drain, max_num_seqs
from chat.openai_server import Request, Server, Timeouts, chatml
from chat.persona import Message
from chat.sampling import Sampling

log = logging.getLogger(__name__)

NUM_SLOTS = 32  # replies at once, unless "ENGINE_MAX_NUM_SEQS" or its old name "ENGINE_PLACES" says otherwise
PROMPT_BYTES = 8192  # longest prompt; of Chinese and of English about the 2,048 tokens that the local engines keep
STARTING = 600.0  # seconds that a server may take to load its model
LONGEST_BACKOFF = 8.0  # seconds between two attempts


def connect(
    load_here: Callable[..., ChatEngine], settings: Mapping[str, str] = os.environ, timeouts: Timeouts | None = None
) -> "RemoteEngine":
    """The engine that the settings name, once a server answers; `load_here` loads the base of ENGINE_FALLBACK.

    Raises Unavailable or ValueError.
    """
    choice = settings.get("ENGINE_FALLBACK")
    # Not on a GPU, which may be the very one that the server fills.
    fallback = load_here(choice, engine="llama" if choice in BASES else None) if choice else None
    engine = RemoteEngine(settings, timeouts or Timeouts(), fallback)
    engine.wait(0 if fallback else STARTING)
    return engine


class RemoteEngine:
    """Servers with the same base. Its own thread runs a task for each reply; cancelling it closes the connection."""

    ready = True  # `connect` has waited for a server

    temperature = Sampling.temperature

    def __init__(self, settings: Mapping[str, str], timeouts: Timeouts, fallback: ChatEngine | None = None) -> None:
        self._timeouts, self._fallback = timeouts, fallback
        self.unstated: Mapping[str, Sequence[str]] = {}  # servers do not tell
        self._wanted = settings.get("ENGINE_ADAPTERS", "").replace(",", " ").split()
        self.num_slots = self.max_num_seqs = max_num_seqs(NUM_SLOTS, "ENGINE_", settings)
        key, base = settings.get("ENGINE_KEY"), settings.get("ENGINE_BASE", "")
        client = httpx.AsyncClient(  # which follows no redirect and checks certificates, by default
            headers={"Authorization": f"Bearer {key}"} if key else {}, limits=httpx.Limits(),  # none
            timeout=httpx.Timeout(None, connect=timeouts.connect),
        )  # fmt: skip
        urls = settings["ENGINE_URL"].replace(",", " ").split()
        self.servers = [Server(url, client, timeouts, base) for url in urls]
        polled: Future[BlockingPortal] = Future()
        threading.Thread(target=anyio.run, args=(self._run, polled), name="remote", daemon=True).start()
        self._portal = polled.result()

    async def _run(self, polled: "Future[BlockingPortal]") -> None:
        """Poll every server again and again: one that is away, or back, or serves other adapters, is noticed."""
        async with BlockingPortal() as portal:
            while True:
                async with anyio.create_task_group() as group:
                    for server in self.servers:
                        group.start_soon(server.poll)
                if not polled.done():
                    polled.set_result(portal)
                await anyio.sleep(self._timeouts.poll)

    def wait(self, seconds: float = 0) -> None:
        """Wait so long for a server to answer. Raises ValueError when one is refused, Unavailable when none answers."""
        deadline = time.monotonic() + seconds
        while seconds and not any(server.up for server in self.servers):
            if refused := [server.refused for server in self.servers if server.refused]:
                raise ValueError(refused[0])
            if time.monotonic() > deadline:
                raise Unavailable("No engine answers. Start it, or correct ENGINE_URL.")
            time.sleep(self._timeouts.poll)

    @property
    def health(self) -> Health:
        if any(server.up for server in self.servers):
            return "ok"
        return self._fallback.health if self._fallback else "unavailable"

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
        refused = [server.refused for server in self.servers if server.refused]
        return [*refused, *(f"No engine serves the adapter {name} of ENGINE_ADAPTERS." for name in missing)]

    def digest(self, adapter: str) -> str:
        """The end of an adapter published as NAME-DIGEST; servers do not tell the digest of what they serve."""
        found = re.fullmatch(r".*-([0-9a-f]{8,12})", adapter)
        return found[1] if found else ""

    def stream(self, messages: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
               continue_final_message: bool = False) -> Iterator[Chunk]:  # fmt: skip
        """As ChatEngine says: Busy when the servers stay full, Unavailable when none answers or one breaks off."""
        check_adapters(adapters, self.adapters)
        room = min(server.max_model_len for server in self.servers) - sampling.max_new_tokens
        kept = fit(messages, min(PROMPT_BYTES, room))
        dropped, chunks = len(messages) - len(kept), Chunks()
        asked = enumerate(adapters)
        requests = [Request(kept, name, sampling, continue_final_message, row, chunks) for row, name in asked]
        tasks = [self._portal.start_task_soon(self._generate, request) for request in requests]
        running = dict(enumerate(requests))
        try:
            for chunk in drain(chunks, tasks, dropped):
                if chunk.usage:
                    del running[chunk.row]
                yield chunk
                if cancel.is_set():
                    break
            for row, request in running.items():
                yield Chunk("", row, replace(request.usage("cancelled"), dropped_messages=dropped))
            return
        except Unavailable as error:
            if not self._fallback or any(request.first_token for request in requests):
                raise
            log.warning("%s The local base answers.", error)
        finally:
            for task in tasks:
                task.cancel()
        local = self._fallback
        served = [name if name in local.adapters else local.adapters[0] for name in adapters]
        yield from local.stream(messages, served, sampling, cancel, continue_final_message)

    async def _generate(self, request: Request) -> Usage:
        """A reply from the first server that gives one; after its first token no other is asked."""
        deadline, backoff = time.monotonic() + self._timeouts.retries, self._timeouts.backoff
        while True:
            failures: list[Busy | Unavailable] = []
            able = [server for server in self.servers if server.up and request.adapter in server.models]
            for server in sorted(able, key=lambda server: server.running):
                try:
                    return await server.generate(request)
                except (Busy, Unavailable) as error:
                    server.up = server.up and isinstance(error, Busy)  # until the next poll
                    if request.first_token:
                        raise
                    log.warning(error)
                    failures.append(error)
            busy = next((error for error in failures if isinstance(error, Busy)), None)
            # At random, so that those turned away together do not come back together.
            seconds = max(busy.retry_after if busy else 0, backoff) * random.uniform(1, 1.5)
            if time.monotonic() + seconds > deadline or (self._fallback and not failures):
                raise busy or Unavailable(f"No engine that serves {request.adapter} answers.")
            request.chunks.put(Chunk("", request.row, retry_after=seconds))
            await anyio.sleep(seconds)
            backoff = min(2 * backoff, LONGEST_BACKOFF)

    def close(self) -> None:
        """End the engine's thread, and with it all replies."""
        self._portal.call(self._portal.stop, True)


def fit(messages: Sequence[Message], room: int) -> list[Message]:
    """The newest messages, from a question on, whose prompt is at most `room` bytes; the last question always stays.

    A byte-level tokenizer, as Qwen2.5's, never makes more tokens than bytes. A server refuses what alone is too long.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"] or [-1]
    while starts[1:] and len(chatml(messages[starts[-2] :]).encode()) <= room:
        starts.pop()
    return list(messages[starts[-1] :])
