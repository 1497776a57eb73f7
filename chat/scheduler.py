"""Continuous batching with a prefix cache: requests join and leave between two steps of the decoder.

What a conversation has read stays in its slot of the KV cache until another needs that, so that its next turn reads
only what is new. Such a prefix is taken up again only for the same adapter and the same first tokens.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from chat.engine import FinishReason, Usage
from chat.sampling import Sampling
from qwen2.decoder import Decoder, SamplingParams

MIN_PREFIX = 32  # tokens in common below which another's slot is not worth taking: the system prompt is that long


@dataclass(eq=False)
class Request:
    """A reply that is asked for. `on_token` is given each token on the inference thread; True ends the reply."""

    ids: list[int]
    lora_id: int  # the adapter's number in the decoder, -1 for none
    sampling: Sampling
    cancel: threading.Event
    on_token: Callable[[int], bool]
    max_seconds: float
    started: float = field(default_factory=time.perf_counter)
    output_ids: list[int] = field(default_factory=list)
    first_token: float = 0.0  # seconds
    usage: "Future[Usage]" = field(default_factory=Future)

    def add(self, token: int) -> FinishReason | None:
        """Take a token; why the reply ends with it, if it does."""
        if self.cancel.is_set():
            return "cancelled"
        self.output_ids.append(token)
        seconds = time.perf_counter() - self.started
        self.first_token = self.first_token or seconds
        if self.on_token(token):
            return "stop"
        if len(self.output_ids) >= self.sampling.max_new_tokens:
            return "length"
        return "time" if seconds > self.max_seconds else None

    def finish(self, reason: FinishReason) -> None:
        """Hand out the usage."""
        seconds = time.perf_counter() - self.started
        self.usage.set_result(Usage(reason, len(self.output_ids), self.first_token or seconds, seconds))


@dataclass(eq=False)
class Slot:
    """A conversation's part of the KV cache: the tokens in it, and the request that uses it."""

    number: int
    ids: list[int] = field(default_factory=list)
    lora_id: int = -1
    last_used: float = 0.0
    request: Request | None = None

    def num_cached(self, request: Request) -> int:
        """How many first tokens need not be read again; the last one always is."""
        if self.lora_id != request.lora_id:
            return 0
        pairs = zip(self.ids, request.ids[:-1], strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(request.ids) - 1))

    def preference(self, request: Request) -> tuple[int, float]:
        """How well it suits a request: by what it has cached of it, else the one that was not used for longest."""
        cached = self.num_cached(request)
        return cached if cached > MIN_PREFIX else 0, -self.last_used

    def drop(self, error: BaseException) -> None:
        """Give the request up, and what was cached with it."""
        if self.request:
            self.request.usage.set_exception(error)
        self.ids, self.request = [], None


class Scheduler:
    """All work is done on the one thread it is given; `submit` may be called from any."""

    def __init__(self, decoder: Decoder, thread: ThreadPoolExecutor) -> None:
        self.decoder, self.thread = decoder, thread
        self.slots = [Slot(number) for number in range(decoder.num_slots)]
        self.waiting: deque[Request] = deque()
        # Steps whose tokens may still be on their way from the GPU, with the slots and requests they are for.
        self.pending: deque[tuple[Any, torch.Tensor, list[tuple[Slot, Request]]]] = deque()

    def submit(self, request: Request) -> "Future[Usage]":
        """Begin a reply as soon as there is a slot."""
        self.waiting.append(request)
        self.thread.submit(self._run)
        return request.usage

    def _run(self) -> None:
        """Until nobody waits or generates. The next step is under way while the last one's tokens are handed out."""
        while True:
            self._admit()
            running = [slot for slot in self.slots if slot.request]
            try:
                if running:
                    self._fetch(self.decoder.decode_step([slot.number for slot in running]), running)
                while len(self.pending) > bool(running):
                    self._hand_out()
            except BaseException as error:  # noqa: BLE001 - whatever it is, it reaches all whose replies are running
                self.pending.clear()
                for slot in self.slots:
                    slot.drop(error)
            if not (self.waiting or self.pending):
                return

    def _admit(self) -> None:
        for request in [request for request in list(self.waiting) if request.cancel.is_set()]:
            self.waiting.remove(request)
            request.usage.set_result(Usage("cancelled", 0, 0, 0))
        free = [slot for slot in self.slots if not slot.request]
        if not self.waiting or not free:
            return
        # One at a time, so that running replies wait for the prefill of one prompt only.
        request = self.waiting.popleft()
        slot, sampling = max(free, key=lambda slot: slot.preference(request)), request.sampling
        num_cached = slot.num_cached(request)
        slot.ids, slot.lora_id, slot.request = request.ids, request.lora_id, request
        request.started = time.perf_counter()  # waiting takes nothing off max_seconds
        params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        try:
            token = self.decoder.prefill(slot.number, request.ids, num_cached, request.lora_id, params, seed)
            self._fetch(token, [slot])
        except BaseException as error:  # noqa: BLE001 - nobody else is harmed
            slot.drop(error)

    def _fetch(self, tokens: torch.Tensor, slots: Sequence[Slot]) -> None:
        arrived = None
        if tokens.is_cuda:
            tokens, arrived = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self.pending.append((arrived, tokens, [(slot, slot.request) for slot in slots if slot.request]))

    def _hand_out(self) -> None:
        arrived, tokens, receivers = self.pending.popleft()
        if arrived:
            arrived.synchronize()
        for token, (slot, request) in zip(tokens.tolist(), receivers, strict=True):
            if slot.request is not request:
                continue
            try:
                reason = request.add(token)
            except Exception as error:  # noqa: BLE001 - of on_token: nobody else is harmed
                slot.drop(error)
                continue
            if reason:
                slot.ids = request.ids + request.output_ids[:-1]  # the last one was not read
                slot.last_used, slot.request = time.perf_counter(), None
                request.finish(reason)
