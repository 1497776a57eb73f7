"""LlamaEngine: llama.cpp in this process, for CPUs, and Macs by Metal.

xllamacpp embeds llama.cpp's server. Requests of one adapter, a GGUF LoRA, are decoded together, each in a slot that
keeps the KV cache of its last conversation.
"""

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chat import checkpoints, engine, gguf_lora
from chat.adapter import WEIGHTS, Adapter, find
from chat.bases import BASES
from chat.checkpoints import Checkpoint
from chat.download import Unavailable, digest
from chat.engine import BASE_ONLY, PROMPT_TOKENS, REPLY_SECONDS, Chunk, Chunks, FinishReason, Usage
from chat.gguf_tokenizer import GgufTokenizer
from chat.machine import available_memory, usable_cores
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids, trim
from chat.sampling import MAX_NEW_TOKENS, Sampling

log = logging.getLogger(__name__)

SLOTS = 8  # conversations at once; each takes 72 MB of the medium base's KV cache
CONTEXT = PROMPT_TOKENS + MAX_NEW_TOKENS  # tokens of a slot
PREFILL = 256  # tokens of a prompt computed at once: a reply can be cancelled, and others go on, between two of them
TOP_LOGPROBS = 16  # whose log probabilities are compared when an adapter is tried
PARAMETER_NAMES = {"max_new_tokens": "max_tokens", "repetition_penalty": "repeat_penalty"}  # llama.cpp's; else as ours


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


def load(choice: str | None = None) -> "LlamaEngine":
    """The engine, once the base's file is fetched and the adapters are checked. Raises Unavailable or ValueError."""
    num_slots = engine.max_num_seqs(SLOTS)
    checkpoint = checkpoints.locate(choice or best_base(), gguf=True)
    if (free := available_memory()) < checkpoint.base.memory:
        log.warning(
            "%s needs %.1f GB of memory, %.1f are free. If it is too slow, lower MAX_NUM_SEQS or give --base small.",
            checkpoint.base.name, checkpoint.base.memory / 1e9, free / 1e9,
        )  # fmt: skip
    found, refused = find(checkpoint)
    refused += [gguf_lora.NO_DORA.format(name=adapter.name) for adapter in found if adapter.dora]
    for sentence in refused:
        log.warning(sentence)
    return LlamaEngine(checkpoint, [adapter for adapter in found if not adapter.dora], num_slots, refused)


class LoraQueue:
    """Lets requests in as they came, those of one LoRA together: each waits until those before it are in, and those of
    another LoRA are done. llama.cpp itself would leave other LoRAs standing while new requests of the first one come.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._running: list[str] = []  # their LoRAs, all the same

    def enter(self, lora: str, cancel: threading.Event) -> bool:
        """Wait until requests of this LoRA may run; False when cancelled before that."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            while not (cancel.is_set() or (self._waiting[0] is ticket and set(self._running) <= {lora})):
                self._changed.wait(engine.HEARTBEAT)
            self._waiting.remove(ticket)
            if entered := not cancel.is_set():
                self._running.append(lora)
            self._changed.notify_all()
            return entered

    def leave(self) -> None:
        with self._changed:
            self._running.pop()
            self._changed.notify_all()


@dataclass(eq=False)
class _Reply:
    """A reply under way on one slot; its text goes into `chunks`."""

    row: int
    chunks: Chunks
    cancel: threading.Event
    threads: engine.InferenceThreads
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0  # seconds
    tokens: int = 0
    held: str = ""  # U+FFFD at the end: what llama.cpp writes for a character that the end of the reply cut
    finish_reason: FinishReason | None = None
    error: str | None = None

    def __call__(self, event: dict[str, Any]) -> bool:
        """Take an event of llama.cpp's stream; True frees the slot at once."""
        self.threads.progress()
        if "choices" not in event:
            self.error = str(event.get("error") or event)[:500]
            return True
        seconds = time.perf_counter() - self.started
        if self.cancel.is_set() or seconds > REPLY_SECONDS:
            self.finish_reason = "cancelled" if self.cancel.is_set() else "time"
            return True
        if "prompt_progress" in event:
            return False
        (choice,) = event["choices"]
        if choice["finish_reason"]:
            self.tokens, self.finish_reason = event["usage"]["completion_tokens"], choice["finish_reason"]
            return False
        self.tokens = event["timings"]["predicted_n"]
        self.first_token = self.first_token or seconds
        text = self.held + choice["text"]
        ready = text.rstrip("\ufffd")
        self.held = text[len(ready) :]
        if ready:
            self.chunks.put(Chunk(ready, self.row))
        return False

    def usage(self) -> Usage:
        """What it took. Raises RuntimeError when llama.cpp failed."""
        if self.error or not self.finish_reason:
            raise RuntimeError(f"llama.cpp failed: {self.error or 'the reply broke off'}")
        seconds = time.perf_counter() - self.started
        return Usage(self.finish_reason, self.tokens, self.first_token or seconds, seconds)


class LlamaEngine:
    """A base and its adapters in llama.cpp. May be called from any thread."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter] = (), max_num_seqs: int = SLOTS,
                 refused: Sequence[str] = ()) -> None:  # fmt: skip
        """Return at once; a thread opens the files. `wait` and `stream` raise Unavailable, ValueError for a DoRA."""
        self.temperature = checkpoint.base.temperature
        self.base = f"{checkpoint.base.name} ({checkpoint.source}, llama.cpp)"
        self.adapters = [*(adapter.name for adapter in adapters), BASE_ONLY]
        self.refused, self.max_num_seqs, self.num_slots = list(refused), max_num_seqs, 1
        self._loras = [adapter.name for adapter in adapters]  # by llama.cpp's numbers, refused ones included
        self.unstated = {adapter.name: adapter.unstated for adapter in adapters}
        self._digests: dict[str, str] = {}
        self._lora_queue = LoraQueue()
        self._threads = engine.InferenceThreads(max_num_seqs, "llama")
        self._loading = self._threads.submit(self._load, checkpoint, adapters)

    def _load(self, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
        checkpoint.verify()
        self.tokenizer = GgufTokenizer(checkpoint.path)
        loras = [gguf_lora.cached(adapter) for adapter in adapters]
        self._server = _open_server(checkpoint.path, loras, self.max_num_seqs)
        for adapter in adapters:
            self._admit(adapter)
        self.num_slots = self.max_num_seqs

    def _admit(self, adapter: Adapter) -> None:
        """Turn an adapter down when it leaves the log probabilities as they are or makes them infinite."""
        plain, adapted = self._top_logprobs(BASE_ONLY), self._top_logprobs(adapter.name)
        if None in adapted or adapted == plain:
            fault = "makes logits that are not finite" if None in adapted else "changes no logits"
            self.adapters = [name for name in self.adapters if name != adapter.name]
            self.refused.append(f"{adapter.folder / WEIGHTS} {fault}. Train it again.")
            log.warning(self.refused[-1])
        else:
            self._digests[adapter.name] = digest(adapter.folder / WEIGHTS)[:12]

    def _top_logprobs(self, adapter: str) -> list[float | None]:
        """The model's highest log probabilities after two tokens, with an adapter or none."""
        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": OPENERS[0]}])
        body = self._body(ids[:2], adapter, Sampling(temperature=0, max_new_tokens=1))
        # llama.cpp gives them only with a token of whole characters, so one is forced; they are those from before that.
        ((letter,),) = self.tokenizer(["A"])["input_ids"]
        asked = {"stream": False, "return_progress": False, "logprobs": TOP_LOGPROBS, "logit_bias": [[letter, 1e6]]}
        answer = self._server.handle_completions({**body, **asked})
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp failed while {adapter} was tried: {answer}. Leave that adapter out.")
        (token,) = answer["choices"][0]["logprobs"]["content"]
        return [top["logprob"] for top in token["top_logprobs"]]

    @property
    def ready(self) -> bool:
        return self._loading.done()

    @property
    def health(self) -> engine.Health:
        return self._threads.health if self.ready else "loading"

    def wait(self) -> None:
        self._loading.result()

    def digest(self, adapter: str) -> str:
        return self._digests.get(adapter, "")

    def stream(self, messages: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
               continue_final_message: bool = False) -> Iterator[Chunk]:  # fmt: skip
        """As ChatEngine says; adapters answer in the order that LoraQueue lets them in.

        It stops within a token, or PREFILL tokens of the prompt. Raises RuntimeError, too, when llama.cpp fails.
        """
        yield from engine.until_loaded(self._loading, self._threads)
        engine.check_adapters(adapters, self.adapters)
        kept, ids = trim(self.tokenizer, messages, PROMPT_TOKENS, continue_final_message)
        chunks = Chunks()
        bodies = [self._body(ids, adapter, sampling) for adapter in adapters]
        replies = [self._threads.submit(self._generate, body, row, chunks, cancel) for row, body in enumerate(bodies)]
        try:
            yield from engine.drain(chunks, replies, len(messages) - len(kept), self._threads)
        finally:
            cancel.set()

    def _generate(self, body: dict[str, Any], row: int, chunks: Chunks, cancel: threading.Event) -> Usage:
        if not self._lora_queue.enter(str(body["lora"]), cancel):
            return Usage("cancelled", 0, 0, 0)
        try:
            reply = _Reply(row, chunks, cancel, self._threads)
            self._server.handle_completions(body, reply)
            return reply.usage()
        finally:
            self._lora_queue.leave()

    def _body(self, ids: Sequence[int], adapter: str, sampling: Sampling) -> dict[str, Any]:
        """A request that samples as transformers does: the same samplers in the same order, prompts penalised too."""
        return {
            "prompt": list(ids), "stream": True, "return_progress": True,
            "timings_per_token": True,  # they count tokens; one within a character makes no event
            "samplers": ["penalties", "temperature", "top_k", "top_p"],
            **{PARAMETER_NAMES.get(name, name): value for name, value in sampling.parameters().items()},
            "min_p": 0.0, "repeat_last_n": CONTEXT,
            "seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
            # Each with its scale: one that is left out would keep its last.
            "lora": [{"id": n, "scale": float(name == adapter)} for n, name in enumerate(self._loras)],
        }  # fmt: skip


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
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    on_cpu = all(device["type"] == cpu for device in xllamacpp.get_device_info())
    params.fit_params = not on_cpu  # as many layers on the GPU, if llama.cpp was built for one, as fit there
    if on_cpu:  # read rather than mapped: what is repacked for the CPU would stay in memory twice
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    threads = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = (int(threads) if threads.isdecimal() else 0) or usable_cores()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    try:
        server = xllamacpp.Server(params)
        # Its loop may not have begun yet, and a server that is dropped before that is waited for without end.
        server.handle_completions({"prompt": [0], "max_tokens": 1})
        return server
    except RuntimeError as error:
        raise Unavailable(
            f"llama.cpp cannot open {path} with {len(loras)} adapters. Free some memory, lower MAX_NUM_SEQS, give "
            "--base small, or try --engine transformers."
        ) from error
