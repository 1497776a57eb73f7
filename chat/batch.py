"""Replies given together: requests join and leave between two steps of the decoder.

What a conversation has read stays in its place until another needs that, so the next turn reads only what is new; a
place is taken up again only for the same adapter and the same first tokens.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from chat.decoder import Decoder
from chat.engine import Cost, Sampling

COMMON = 32  # tokens in common below which another's place is not worth taking: the system prompt is that long
Why = Literal["end", "length", "time", "cancelled"]


@dataclass(eq=False)
class Request:
    """A reply that is asked for; `say` is given each token, and answers whether it ends the reply."""

    ids: list[int]
    adapter: int  # -1 for none
    sampling: Sampling
    cancel: threading.Event
    say: Callable[[int], bool]
    seconds: float  # after which it ends
    started: float = field(default_factory=time.perf_counter)
    said: list[int] = field(default_factory=list)
    first: float = 0.0
    cost: "Future[Cost]" = field(default_factory=Future)

    def take(self, token: int) -> Why | None:
        """Say a token; why the reply ends with it, if it does."""
        if self.cancel.is_set():
            return "cancelled"
        self.said.append(token)
        now = time.perf_counter() - self.started
        self.first = self.first or now
        if self.say(token):
            return "end"
        if len(self.said) >= self.sampling.max_new_tokens:
            return "length"
        return "time" if now > self.seconds else None


@dataclass(eq=False)
class Place:
    """A conversation's part of the cache: what is in it, and who uses it."""

    ids: list[int] = field(default_factory=list)
    adapter: int = -1
    used: float = 0.0
    request: Request | None = None

    def common(self, request: Request) -> int:
        """First tokens that need not be read again; the last one always is."""
        if self.adapter != request.adapter:
            return 0
        pairs = zip(self.ids, request.ids[:-1], strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(request.ids) - 1))


class Batch:
    """All work is done on the one thread it is given; `submit` may be called from any."""

    def __init__(self, decoder: Decoder, thread: ThreadPoolExecutor) -> None:
        self.decoder, self.thread = decoder, thread
        self.places = [Place() for _ in range(decoder.slots)]
        self.waiting: deque[Request] = deque()
        self.unheard: deque[tuple[Any, torch.Tensor, list[tuple[Place, Request]]]] = deque()

    def submit(self, request: Request) -> "Future[Cost]":
        """Have a reply begun as soon as there is a place."""
        self.waiting.append(request)
        self.thread.submit(self._serve)
        return request.cost

    def _serve(self) -> None:
        """Until nobody waits or is spoken to. The next step is under way while the last one's tokens are told."""
        while True:
            self._admit()
            speaking = [place for place in self.places if place.request]
            try:
                if speaking:
                    tokens = self.decoder.go_on([self.places.index(place) for place in speaking])
                    self._await(tokens, speaking)
                while len(self.unheard) > bool(speaking):
                    self._hear()
            except Exception as error:  # noqa: BLE001 - whatever it is, it reaches all who were being answered
                self._fail(error)
            if not (self.waiting or self.unheard):
                return

    def _admit(self) -> None:
        for request in [request for request in list(self.waiting) if request.cancel.is_set()]:
            self.waiting.remove(request)
            request.cost.set_result(Cost("cancelled", 0, 0, 0))
        # One at a time, so that who is spoken to waits for the reading of one prompt only.
        if self.waiting and (free := [place for place in self.places if not place.request]):
            request = self.waiting.popleft()
            place = max(
                free, key=lambda place: (known if (known := place.common(request)) > COMMON else 0, -place.used)
            )
            try:
                self._begin(place, request)
            except Exception as error:  # noqa: BLE001 - nobody else is harmed
                self._give_up(place, error)

    def _begin(self, place: Place, request: Request) -> None:
        known, sampling = place.common(request), request.sampling
        place.ids, place.adapter, place.request = request.ids, request.adapter, request
        request.started = time.perf_counter()  # who waited has no less time for it
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        slot = self.places.index(place)
        self._await(self.decoder.begin(slot, request.ids, known, request.adapter, sampling, seed), [place])

    def _await(self, tokens: torch.Tensor, places: Sequence[Place]) -> None:
        there = None
        if tokens.is_cuda:
            tokens, there = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
            there.record()
        self.unheard.append((there, tokens, [(place, place.request) for place in places if place.request]))

    def _hear(self) -> None:
        there, tokens, told = self.unheard.popleft()
        if there:
            there.synchronize()
        for token, (place, request) in zip(tokens.tolist(), told, strict=True):
            if place.request is not request:
                continue
            try:
                why = request.take(token)
            except Exception as error:  # noqa: BLE001 - of who listens: nobody else is harmed
                self._give_up(place, error)
            else:
                self._end(place, request, why) if why else None

    def _end(self, place: Place, request: Request, why: Why) -> None:
        place.ids = request.ids + request.said[:-1]  # the last one was not read
        place.used, place.request = time.perf_counter(), None
        seconds = time.perf_counter() - request.started
        request.cost.set_result(Cost(why, len(request.said), request.first or seconds, seconds))

    def _fail(self, error: Exception) -> None:
        self.unheard.clear()
        for place in self.places:
            self._give_up(place, error)

    def _give_up(self, place: Place, error: Exception) -> None:
        if place.request:
            place.request.cost.set_exception(error)
        place.ids, place.request = [], None
