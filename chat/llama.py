"""LlamaEngine: llama.cpp in this process, for machines without an NVIDIA GPU: CPUs, and Macs by Metal.

xllamacpp embeds llama.cpp's server. The base's GGUF is served as it is, its adapters as GGUF LoRA, chosen for each
request; requests of one adapter are decoded together, each in a slot that keeps the KV cache of its last conversation.
"""

import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chat import base as bases
from chat import gguf_lora
from chat.adapter import WEIGHTS, Adapter, find
from chat.base import BASES, Located
from chat.engine import (
    BASE_ONLY,
    MAX_NEW_TOKENS,
    PROMPT_TOKENS,
    REPLY_SECONDS,
    Awaited,
    Cost,
    Piece,
    Sampling,
    check_adapters,
    whole_number,
)
from chat.fetch import Unavailable, digest
from chat.gguf_tokenizer import GgufTokenizer
from chat.machine import available_memory, usable_cores
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids, trim

log = logging.getLogger(__name__)

SLOTS = 8  # conversations at once; each keeps 72 MB of the medium base's KV cache
CONTEXT = PROMPT_TOKENS + MAX_NEW_TOKENS  # tokens of a slot
PREFILL = 256  # tokens of a prompt read at once: a reply can be cancelled, and others go on, between two of them
BEAT = 0.5  # seconds between two signs of life while nothing is said, so that a visitor who left is noticed
TOP_LOGPROBS = 16  # whose log probabilities are compared when an adapter is tried


def best_base() -> str:
    """`medium` where there is memory for it, else `small`."""
    free, needed = available_memory(), BASES["medium"].memory
    if free >= needed:
        return "medium"
    log.warning(
        "The small base answers: %.1f GB of memory are free, the medium one needs %.1f. --base medium overrules this.",
        free / 1e9, needed / 1e9,
    )  # fmt: skip
    return "small"


def load(choice: str | None = None) -> Awaited:
    """The engine of a machine without an NVIDIA GPU; its files are checked and opened in the background.

    The base is fetched and the adapters are checked before this returns. Raises Unavailable or ValueError.
    """
    num_slots = whole_number("PLACES", os.environ.get("PLACES") or str(SLOTS))
    choice = choice or best_base()
    located = bases.locate(choice, gguf=True)
    if (free := available_memory()) < located.base.memory:
        log.warning(
            "%s needs %.1f GB of memory, %.1f are free. If it is too slow, give a smaller PLACES or --base small.",
            choice, located.base.memory / 1e9, free / 1e9,
        )  # fmt: skip
    found, refused = find(located)
    adapters = [adapter for adapter in found if not adapter.dora]
    refused += [gguf_lora.NO_DORA.format(name=adapter.name) for adapter in found if adapter.dora]
    for sentence in refused:
        log.warning(sentence)

    def make() -> "LlamaEngine":
        located.verify()
        engine = LlamaEngine(located, adapters, num_slots)
        engine.refused += refused
        return engine

    return Awaited(_served_by(located), [adapter.name for adapter in adapters], make, num_slots)


def _served_by(located: Located) -> str:
    return f"{located.base.name} ({located.source}, llama.cpp)"


class LoraQueue:
    """Lets requests in by the order in which they came, those of one LoRA together.

    llama.cpp decodes the slots of one LoRA and leaves those of others standing, without a limit while new ones of the
    first come. Here a request waits until those before it are in, and those of another LoRA are done.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[object, str]] = deque()
        self._active, self._running = "", 0

    def enter(self, lora: str, cancel: threading.Event) -> bool:
        """Wait for the turn of this LoRA; False when cancelled before it came."""
        ticket = object(), lora
        with self._changed:
            self._waiting.append(ticket)
            while not (cancelled := cancel.is_set()) and not self._may_enter(ticket):
                self._changed.wait(BEAT)
            self._waiting.remove(ticket)
            if not cancelled:
                self._active, self._running = lora, self._running + 1
            self._changed.notify_all()
            return not cancelled

    def _may_enter(self, ticket: tuple[object, str]) -> bool:
        return self._waiting[0] is ticket and (not self._running or self._active == ticket[1])

    def leave(self) -> None:
        """One that entered is done."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


@dataclass(eq=False)
class _Reply:
    """A reply under way on one slot; `chunks` gets its text, tagged with its row, and None at its end."""

    row: int
    chunks: "queue.SimpleQueue[tuple[int, Piece] | None]"
    cancel: threading.Event
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    tokens: int = 0
    held: str = ""  # U+FFFD at the end: what llama.cpp writes for a character that the end of the reply cut
    finish_reason: str | None = None
    error: str | None = None

    def __call__(self, event: dict[str, Any]) -> bool:
        """Take an event of llama.cpp's stream; True frees the slot at once."""
        if "choices" not in event:
            self.error = str(event.get("error") or event)[:500]
            return True
        if self.cancel.is_set():
            self.finish_reason = "cancelled"
            return True
        if time.perf_counter() - self.started > REPLY_SECONDS:
            self.finish_reason = "time"
            return True
        if "prompt_progress" in event:
            return False
        (choice,) = event["choices"]
        if choice["finish_reason"]:
            self.tokens = event["usage"]["completion_tokens"]
            self.finish_reason = {"stop": "end"}.get(choice["finish_reason"], choice["finish_reason"])
            return False
        self.tokens = event["timings"]["predicted_n"]
        self.first_token = self.first_token or time.perf_counter() - self.started
        text = self.held + choice["text"]
        ready = text.rstrip("\ufffd")
        self.held = text[len(ready) :]
        if ready:
            self.chunks.put((self.row, Piece(ready)))
        return False

    def cost(self) -> Cost:
        """What it took. Raises RuntimeError when llama.cpp failed."""
        if self.error or not self.finish_reason:
            raise RuntimeError(f"llama.cpp failed: {self.error or 'the reply broke off'}")
        seconds = time.perf_counter() - self.started
        return Cost(self.finish_reason, self.tokens, self.first_token or seconds, seconds)  # type: ignore[arg-type]


class LlamaEngine:
    """A base and its adapters in llama.cpp. May be called from any thread."""

    ready = True

    def __init__(self, located: Located, adapters: Sequence[Adapter] = (), num_slots: int = SLOTS) -> None:
        """Open the GGUF and each adapter as GGUF LoRA. Raises Unavailable when that fails, ValueError for a DoRA."""
        self.base = _served_by(located)
        self.places = self.most = num_slots
        self.tokenizer = GgufTokenizer(located.path)
        self._loras = [adapter.name for adapter in adapters]
        self._server = _open_server(located.path, [gguf_lora.cached(adapter) for adapter in adapters], num_slots)
        self._threads = ThreadPoolExecutor(num_slots, thread_name_prefix="llama")
        self._lora_queue = LoraQueue()
        self.refused: list[str] = []
        self._served: list[str] = []
        self._digests: dict[str, str] = {}
        for adapter in adapters:
            self._admit(adapter)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that passed the gate, then the base alone."""
        return [*self._served, BASE_ONLY]

    def digest(self, adapter: str) -> str:
        """The first twelve hex digits of the weights' sha256; empty for the base alone."""
        return self._digests.get(adapter, "")

    def _admit(self, adapter: Adapter) -> None:
        """Offer an adapter, unless it leaves the log probabilities as they are or makes them infinite."""
        plain, adapted = (self._top_logprobs(name) for name in (BASE_ONLY, adapter.name))
        if None in adapted:
            self.refused.append(f"{adapter.folder / WEIGHTS} makes logits that are not finite. Train it again.")
        elif adapted == plain:
            self.refused.append(f"{adapter.folder / WEIGHTS} changes no logits. Train it again.")
        else:
            self._served.append(adapter.name)
            self._digests[adapter.name] = digest(adapter.folder / WEIGHTS)[:12]
            return
        log.warning(self.refused[-1])

    def _top_logprobs(self, adapter: str) -> list[float | None]:
        """The model's highest log probabilities after two tokens, with an adapter or none."""
        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": OPENERS[0]}])
        body = self._body(ids[:2], adapter, Sampling(temperature=0, max_new_tokens=1))
        # They are told beside a token of whole characters only, hence one is made to come; they are those before that.
        ((letter,),) = self.tokenizer(["A"])["input_ids"]
        asked = {"stream": False, "return_progress": False, "logprobs": TOP_LOGPROBS, "logit_bias": [[letter, 1e6]]}
        answer = self._server.handle_completions({**body, **asked})
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp failed while {adapter} was tried: {answer}. Leave that adapter out.")
        (token,) = answer["choices"][0]["logprobs"]["content"]
        return [top["logprob"] for top in token["top_logprobs"]]

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """Answer the last turn, a piece for each token; with `go_on` continue it.

        Closing the iterator or setting `cancel` frees the slot within a token, or within PREFILL tokens of the prompt.
        Until the first token comes an empty piece every BEAT seconds lets the iterator be closed.
        Raises ValueError for an unknown adapter or a question too long, RuntimeError when llama.cpp fails.
        """
        for _, piece in self._generate(turns, [adapter], sampling, cancel, go_on):
            yield piece

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """Answer with several adapters, one after the other as LoraQueue says. Raises as `stream` does."""
        return self._generate(turns, adapters, sampling, cancel)

    def _generate(
        self,
        turns: Sequence[Message],
        adapters: Sequence[str],
        sampling: Sampling,
        cancel: threading.Event,
        go_on: bool = False,
    ) -> Iterator[tuple[int, Piece]]:
        check_adapters(adapters, self.adapters)
        kept, ids = trim(self.tokenizer, turns, PROMPT_TOKENS, go_on)
        chunks: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
        work: list[Future[Cost]] = []
        for row, adapter in enumerate(adapters):
            work.append(self._threads.submit(self._reply, self._body(ids, adapter, sampling), row, chunks, cancel))
            work[-1].add_done_callback(lambda _: chunks.put(None))
        try:
            yield from _drained(chunks, len(work))
            for row, part in enumerate(work):
                yield row, Piece("", replace(part.result(), forgotten=len(turns) - len(kept)))
        finally:
            cancel.set()

    def _reply(
        self,
        body: dict[str, Any],
        row: int,
        chunks: "queue.SimpleQueue[tuple[int, Piece] | None]",
        cancel: threading.Event,
    ) -> Cost:
        """Generate one reply on a thread of this engine; llama.cpp calls back with each token."""
        lora = str(body["lora"])
        if not self._lora_queue.enter(lora, cancel):
            return Cost("cancelled", 0, 0, 0)
        try:
            reply = _Reply(row, chunks, cancel)
            self._server.handle_completions(body, reply)
            return reply.cost()
        finally:
            self._lora_queue.leave()

    def _body(self, ids: Sequence[int], adapter: str, sampling: Sampling) -> dict[str, Any]:
        """A request of llama.cpp's server that samples as transformers does: the same samplers in the same order.

        The repetition penalty looks at prompt and reply, as transformers' does. Every LoRA is named with its scale, as
        those left out would keep theirs.
        """
        return {
            "prompt": list(ids),
            "stream": True,
            "return_progress": True,
            "timings_per_token": True,  # they count tokens; one within a character makes no event
            "max_tokens": sampling.max_new_tokens,
            "samplers": ["penalties", "temperature", "top_k", "top_p"],
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": CONTEXT,
            "seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
            "lora": [{"id": n, "scale": float(name == adapter)} for n, name in enumerate(self._loras)],
        }


def _drained(chunks: "queue.SimpleQueue[tuple[int, Piece] | None]", replies: int) -> Iterator[tuple[int, Piece]]:
    """What comes out of a queue into which each reply puts None at its end, and a sign of life while nothing does."""
    while replies:
        try:
            chunk = chunks.get(timeout=BEAT)
        except queue.Empty:
            yield 0, Piece("")
            continue
        if chunk:
            yield chunk
        else:
            replies -= 1


def _open_server(path: Path, loras: Sequence[Path], num_slots: int) -> Any:
    """llama.cpp's server in this process.

    The prompt cache in RAM stays off: it is not keyed by LoRA, and would answer one adapter with another's keys and
    values. The server listens on loopback even when it is called directly: a key that nobody knows, and routes that
    are off, keep others on this machine from it; the routes that need no key tell neither a path nor a word.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(path), {"chat"}
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 0.0) for lora in loras]
    params.n_parallel, params.n_ctx, params.kv_unified = num_slots, num_slots * CONTEXT, False
    params.n_batch = params.n_ubatch = PREFILL
    params.cache_ram_mib, params.cache_idle_slots = 0, False
    params.warmup, params.verbosity = False, -1
    params.api_keys, params.hostnames = [secrets.token_hex()], ["127.0.0.1"]
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = params.ui = False
    on_cpu = all(
        device["type"] == xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
        for device in xllamacpp.get_device_info()
    )
    params.fit_params = not on_cpu  # as many layers on the GPU, if llama.cpp was built for one, as fit there
    if on_cpu:  # read rather than mapped: what is repacked for the CPU would stay in memory twice
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = (
        int(threads)
        if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(threads)
        else usable_cores()
    )
    try:
        server = xllamacpp.Server(params)
        # Its loop may not have begun yet, and a server that is dropped before that is waited for without end.
        server.handle_completions({"prompt": [0], "max_tokens": 1})
        return server
    except RuntimeError as error:
        raise Unavailable(
            f"llama.cpp cannot open {path} with {len(loras)} adapters. Free some memory, give a smaller PLACES or "
            "--base small, or try --engine transformers."
        ) from error
