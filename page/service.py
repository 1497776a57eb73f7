"""A message's way from the page to the engine and back: `ChatService.generate`, top to bottom.

An exception out of a chat function locks the visitor's text box in Gradio 6. So nothing that goes wrong is raised
here: it becomes a line in character and a plain hint.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import spaces  # before torch: it stands in for CUDA on ZeroGPU
from gradio import Error

from chat import persona
from chat.engine import Busy, ChatEngine, Chunk, Stalled, Usage
from chat.persona import HINT, Message, Refused
from chat.sampling import PARAMETERS, Sampling
from page import metrics
from page.conversation import check_question
from page.rate_limiter import Exceeded, RateLimiter
from page.waiting_queue import POLL_SECONDS, Full, WaitingQueue

log = logging.getLogger(__name__)

MAX_WAITING = 20  # visitors in the queue of one slot; more are told to come back
MAX_SEED = 2**31 - 1
# Seconds between two events of a reply: for one visitor, more for each other one, and at most.
MIN_INTERVAL, INTERVAL_PER_REPLY, MAX_INTERVAL = 0.03, 0.006, 0.25
# What a visitor sets by a number, with its default: every sampling parameter, and the seed; -1 draws a new one.
NUMBERS: dict[str, float] = {name: getattr(Sampling, name) for name in PARAMETERS} | {"seed": -1}

# ZeroGPU's refusals arrive as gr.Error, told apart by their titles.
ZERO_GPU = {
    "ZeroGPU quota exceeded": "今日的 GPU 时间已用完：登录 Hugging Face，或明日再来。 Your GPU time is used up: "
    "log in to Hugging Face, or come back tomorrow.",
    "ZeroGPU queue timeout": "GPU 正忙，请过一会儿重试。 All GPUs are busy; retry in a while.",
    "ZeroGPU worker error": "GPU 中途离开了，请重试。 The GPU was lost; press Retry.",
    "ZeroGPU pending credits exceeded": "你的 GPU 额度都在别处用着：等那些任务结束，再来问。 Your GPU credits are all "
    "taken by other tasks of yours: ask again when they have ended.",
    "ZeroGPU illegal duration": "要用的 GPU 时间超过了所许：在「声音与文采」里把最长回话调短。 "
    "More GPU time was asked for than is allowed: lower the longest reply under Voice and sampling.",
    "ZeroGPU client error": "没有得到 GPU：请过几分钟再问，或刷新这一页。 No GPU was given: "
    "ask again in some minutes, or reload the page.",
}
OTHERWISE = "这一句没有说完，请按「重试」。 The reply failed; press Retry."
FINISHED = {
    "length": "话到此处已满，可按「接着说」。 Cut at the length limit; press Continue.",
    "time": "时候到了，可按「接着说」。 Cut at the time limit; press Continue.",
}
STALLED = "引擎没有响应，请过几分钟再问。 The engine does not respond; ask again in some minutes."
NO_MEMORY = "内存或显存不够了：请缩短这一句，或清空对话。 Out of memory: ask in fewer words, or clear the conversation."


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a visitor set beside his words. Strangers set it too: `sampling` and `with_scene` refuse what is forged."""

    adapter: str
    scene: str = persona.SCENES[0].name
    visitor: str = persona.PASSER_BY
    numbers: Mapping[str, float | None] = field(default_factory=dict)  # by their names in NUMBERS
    persona: object = None  # as it came

    @classmethod
    def of(cls, scene: str, visitor: str, adapter: str, *numbers: float | None) -> "ChatRequest":
        """From the values of the page's inputs, in their order."""
        return cls(scene=scene, visitor=visitor, adapter=adapter, numbers=dict(zip(NUMBERS, numbers, strict=True)))

    def sampling(self) -> Sampling:
        """Checked, with a seed drawn where none was given, so that any reply can be had again. Raises Refused."""
        numbers = dict(self.numbers)
        seed = -1 if (given := numbers.pop("seed", None)) is None else given
        if not isinstance(seed, int | float) or not -math.inf < seed <= MAX_SEED:
            raise Refused(f"The seed is not a number up to {MAX_SEED}, nor -1 for a new one.")
        return Sampling.parse(numbers, seed=secrets.randbelow(MAX_SEED) if seed < 0 else int(seed))


@dataclass(frozen=True)
class Reply:
    """A reply so far: her words, the hint below them, and at its end what it took and with which seed."""

    text: str
    hint: str = ""
    usage: Usage | None = None
    seed: int | None = None

    @property
    def shown(self) -> str:
        """As it stands in the bubble."""
        return f"{self.text}{HINT}{self.hint}〕" if self.hint else self.text


class ChatService:
    """The one way to every reply, through one queue and one rate limiter."""

    def __init__(self, engine: ChatEngine) -> None:
        self.engine = engine
        longest = max(MAX_WAITING, 2 * engine.max_num_seqs)  # a queue before so many slots moves fast
        self.queue = WaitingQueue(lambda: engine.num_slots, longest)
        self.max_visitors = max(2 * MAX_WAITING, engine.max_num_seqs + longest)  # inside at once
        self.rate_limiter = RateLimiter()
        self.opened = time.monotonic()
        self.numbers = NUMBERS | {"temperature": engine.temperature}  # the defaults on this page

        def stream(
            messages: list[Message], adapters: Sequence[str], sampling: Sampling, continue_final_message: bool
        ) -> Iterator[Chunk]:
            yield from engine.stream(messages, adapters, sampling, threading.Event(), continue_final_message)

        # ZeroGPU wants a plain generator function, and for how many seconds it needs a GPU: few, as they are taken
        # from the visitor's quota. Elsewhere `spaces.GPU` returns the function as it is.
        self._stream: Callable[..., Iterator[Chunk]] = spaces.GPU(
            stream, duration=lambda messages, adapters, sampling, *_: min(25, 5 + sampling.max_new_tokens // 20)
        )

    def generate(
        self,
        messages: Sequence[Message],
        request: ChatRequest,
        visitor_id: str,
        adapters: Sequence[str] = (),
        continue_final_message: bool = False,
    ) -> Iterator[tuple[Reply, ...]]:
        """Yield the replies as they grow: one to the last message by each of `adapters`, or by the request's own.

        With `continue_final_message` the last message, hers or the visitor's, is continued, and the reply opens with
        it. While a visitor waits, the hint says for what. Raises nothing; closing the iterator stops the model.
        """
        adapters = list(adapters or [request.adapter])
        replies = [Reply(messages[-1]["content"] if continue_final_message else "")] * len(adapters)
        try:
            if not continue_final_message:
                check_question(messages[-1])
            messages = persona.with_scene(
                messages, request.scene, request.visitor, persona.Persona.parse(request.persona)
            )
            sampling = request.sampling()
            self.rate_limiter.admit(visitor_id)
            with self.queue.ticket() as ticket:
                with metrics.waiting.track_inprogress():
                    for ahead, left in self.queue.wait(ticket):
                        hint = f"前面还有 {ahead} 位，约 {left:.0f} 秒。 {ahead} ahead of you, about {left:.0f} s."
                        yield _with_hint(replies, persona.CROWDED, hint)
                    while not self.engine.ready:
                        loading = f"{time.monotonic() - self.opened:.0f}"
                        hint = f"模型正在装载，已 {loading} 秒。 The model is being loaded, for {loading} s so far."
                        yield _with_hint(replies, persona.DRESSING, hint)
                        time.sleep(POLL_SECONDS)
                with metrics.generating.track_inprogress(), self.queue.timed():
                    due, events = 0.0, 0
                    for chunk in self._stream(messages, adapters, sampling, continue_final_message):
                        if chunk.retry_after:
                            pause = f"{chunk.retry_after:.0f}"
                            hint = f"引擎正忙，{pause} 秒后再问。 It is busy; next try in {pause} s."
                            yield _with_hint(replies, persona.CROWDED, hint)
                            continue
                        reply = Reply(replies[chunk.row].text + chunk.text)
                        if chunk.usage:
                            reply = Reply(reply.text, _final_hint(chunk.usage, reply.text), chunk.usage, sampling.seed)
                            metrics.count(adapters[chunk.row], chunk.usage)
                            self.rate_limiter.spend(visitor_id, chunk.usage.tokens)
                        replies[chunk.row] = reply
                        if chunk.text and time.monotonic() < due:
                            continue  # it leaves with what comes until then
                        yield tuple(replies)
                        events += 1
                        due = time.monotonic() + event_interval(self.queue.served, events)
        except Exception as error:  # noqa: BLE001 - whatever it is, the visitor's text box must not lock
            metrics.errors.labels(type(error).__name__).inc()
            yield _with_hint(replies, *error_message(error))
        except GeneratorExit:
            metrics.left.inc()
            raise


def event_interval(generating: int, events: int) -> float:
    """Seconds from one event of a reply to the next, in which its text is gathered.

    Each event costs the server and the browser the same, however short its text is. So they are rarer when many
    replies are generated, but never over a quarter of a second apart; the first words come sooner.
    """
    return min(MAX_INTERVAL, MIN_INTERVAL + INTERVAL_PER_REPLY * generating) * min(1, events / 4)


def _with_hint(replies: Sequence[Reply], line: str, hint: str) -> tuple[Reply, ...]:
    """The replies with a hint below them; where there is no text yet, her line stands in for it."""
    return tuple(replace(reply, text=reply.text or line, hint=hint) for reply in replies)


def _final_hint(usage: Usage, text: str) -> str:
    hints = [FINISHED[usage.finish_reason]] if usage.finish_reason in FINISHED else []
    if not text and usage.finish_reason != "cancelled":
        hints = [OTHERWISE]
    if dropped := usage.dropped_messages:
        hints.append(f"最早的 {dropped} 句她已记不得了。 The oldest {dropped} messages no longer fit.")
    return " ".join(hints)


def error_message(error: Exception) -> tuple[str, str]:
    """Her line for what went wrong, and a plain hint: one of ours, never the text of an error that others raised.

    What is not the visitor's doing is logged, without his words.
    """
    if isinstance(error, Refused):
        return error.line, f"此问不成：{error}" if error.line == persona.UNWELL else str(error)
    if isinstance(error, Full | Busy):
        return persona.CROWDED, "候着的人太多，请过一会儿再问。 Too many are waiting; ask again in a while."
    if isinstance(error, Exceeded):
        return persona.BREATHLESS, "问得太急，请歇一分钟再问。 Too many messages; wait a minute."
    if isinstance(error, Stalled):
        log.error(error)
        return persona.UNWELL, STALLED
    if isinstance(error, Error):
        return persona.UNWELL, ZERO_GPU.get(error.title, OTHERWISE)
    log.exception("A reply failed")
    return persona.UNWELL, NO_MEMORY if _out_of_memory(error) else OTHERWISE


def _out_of_memory(error: Exception) -> bool:
    """On a GPU torch has a class for it, on a CPU a RuntimeError; numpy and Python have MemoryError."""
    named = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return named or isinstance(error, MemoryError)
