"""Her replies as the page shows them: what a stranger sent is checked, and nothing that goes wrong is ever raised.

An exception out of a chat function locks the visitor's text box in Gradio 6; here each becomes a line in character
and a plain hint.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import urlencode

import spaces  # before torch: it stands in for CUDA on ZeroGPU
from gradio import Error

from chat import persona
from chat.engine import BASE_ONLY, MAX_CHARACTERS, MAX_TURNS, Busy, ChatEngine, Cost, Piece, Sampling
from chat.persona import Message
from page import metrics
from page.allowance import Allowance, Exceeded
from page.line import LOOK, Full, Line

log = logging.getLogger(__name__)

WAITING = 20  # visitors in the line of one place; more are told to come back
ASIDE = "\n\n〔"  # opens a plain hint below her words; a history is cut there
LONGEST = 2 * MAX_CHARACTERS  # of a turn in a history
LARGEST_SEED = 2**31 - 1
Turns = Callable[[], Sequence[Message]]  # read late, so that a refusal on reading is caught with the rest

# ZeroGPU's refusals arrive as gr.Error, told apart by their titles.
ZERO_GPU = {
    "ZeroGPU quota exceeded": "今日的 GPU 时间已用完：登录 Hugging Face，或明日再来。 Your GPU time is used up: "
    "log in to Hugging Face, or come back tomorrow.",
    "ZeroGPU queue timeout": "GPU 正忙，请过一会儿重试。 All GPUs are busy; retry in a while.",
    "ZeroGPU worker error": "GPU 中途离开了，请重试。 The GPU was lost; press Retry.",
}
OTHERWISE = "这一句没有说完，请按「重试」。 The reply failed; press Retry."
NO_MEMORY = "显存不够了：请缩短这一句，或清空对话。 Out of memory: ask in fewer words, or clear the conversation."


class Refused(Exception):
    """A message she does not answer: her line, and the hint for the visitor."""

    def __init__(self, line: str, hint: str) -> None:
        super().__init__(hint)
        self.line = line


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a visitor set beside his words. Strangers send these too: `sampling` and `staged` refuse what is forged."""

    scene: str = persona.SCENES[0].name
    visitor: str = persona.PASSER_BY
    adapter: str
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    top_k: float = Sampling.top_k
    repetition_penalty: float = Sampling.repetition_penalty
    max_new_tokens: float = Sampling.max_new_tokens
    seed: float = -1
    """Below zero: a new one is drawn."""

    def sampling(self) -> Sampling:
        """Checked, with a seed drawn where none was given, so that any reply can be had again."""
        seed = int(self.seed)
        if seed > LARGEST_SEED:
            raise ValueError(f"The seed is {seed}; choose one up to {LARGEST_SEED}, or -1 for a new one.")
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=int(self.top_k),
            repetition_penalty=self.repetition_penalty, max_new_tokens=int(self.max_new_tokens),
            seed=secrets.randbelow(LARGEST_SEED) if seed < 0 else seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Spoken:
    """A reply so far: her words, the hint below them, and at its end what it cost and with which seed."""

    words: str
    hint: str = ""
    cost: Cost | None = None
    seed: int | None = None

    @property
    def text(self) -> str:
        """As it stands in the bubble."""
        return f"{self.words}{ASIDE}{self.hint}〕" if self.hint else self.words


class Replies:
    """Every way to make her speak, behind one line and one allowance. None of them raises."""

    def __init__(self, engine: ChatEngine) -> None:
        self.engine = engine
        waiting = max(WAITING, 2 * engine.most)  # who waits for so many places is not long in coming
        self.line = Line(lambda: engine.places, waiting)
        self.visitors = max(2 * WAITING, engine.most + waiting)  # inside at once
        self.allowance = Allowance()
        self.opened = time.monotonic()
        self._answer = cast("Callable[..., Iterator[Piece]]", on_gpu(_answering(engine)))
        self._compare = cast("Callable[..., Iterator[tuple[int, Piece]]]", on_gpu(_comparing(engine)))

    def reply(
        self, turns: Turns, chosen: Chosen, visitor: str, said: str = "", go_on: bool = False
    ) -> Iterator[Spoken]:
        """Her answer to the last turn as it grows; with `go_on` she continues that turn, of which `said` is shown."""

        def speak(heard: list[Message], sampling: Sampling) -> Iterator[tuple[int, Piece]]:
            for piece in self._answer(heard, chosen.adapter, sampling, go_on):
                metrics.count(chosen.adapter, piece.cost)
                yield 0, piece

        for (spoken,) in self._guarded(turns, chosen, visitor, [said], speak):
            yield spoken

    def compare(
        self, turns: Turns, chosen: Chosen, visitor: str, adapters: Sequence[str]
    ) -> Iterator[tuple[Spoken, ...]]:
        """The same question to several adapters at once: all replies as they grow."""

        def speak(heard: list[Message], sampling: Sampling) -> Iterator[tuple[int, Piece]]:
            for row, piece in self._compare(heard, list(adapters), sampling):
                metrics.count(adapters[row], piece.cost)
                yield row, piece

        yield from self._guarded(turns, chosen, visitor, [""] * len(adapters), speak)

    def _guarded(
        self,
        turns: Turns,
        chosen: Chosen,
        visitor: str,
        said: list[str],
        speak: Callable[[list[Message], Sampling], Iterator[tuple[int, Piece]]],
    ) -> Iterator[tuple[Spoken, ...]]:
        """Stand in line, speak, and turn whatever goes wrong into words."""
        so_far = [Spoken(words) for words in said]
        try:
            for shown in self._in_turn(turns, chosen, visitor, so_far, speak):
                yield tuple(shown)
        except Exception as error:  # noqa: BLE001 - whatever it is, the visitor's text box must not lock
            metrics.fail(error)
            line, hint = excuse(error)
            yield tuple(replace(spoken, words=spoken.words or line, hint=hint) for spoken in so_far)
        except GeneratorExit:
            metrics.left.inc()
            raise

    def _in_turn(
        self,
        turns: Turns,
        chosen: Chosen,
        visitor: str,
        so_far: list[Spoken],
        speak: Callable[[list[Message], Sampling], Iterator[tuple[int, Piece]]],
    ) -> Iterator[list[Spoken]]:
        heard = persona.staged(turns(), chosen.scene, chosen.visitor)
        sampling = chosen.sampling()
        self.allowance.admit(visitor)
        with self.line.ticket() as ticket:
            with metrics.waiting.track_inprogress():
                for ahead, seconds in self.line.wait(ticket):
                    waiting = f"前面还有 {ahead} 位，约 {seconds:.0f} 秒。 {ahead} ahead of you, about {seconds:.0f} s."
                    yield _meanwhile(so_far, persona.CROWDED, waiting)
                for seconds in self._until_ready():
                    waiting = (
                        f"模型正在装载，已 {seconds:.0f} 秒。 The model is being loaded, for {seconds:.0f} s so far."
                    )
                    yield _meanwhile(so_far, persona.DRESSING, waiting)
            with metrics.speaking.track_inprogress(), self.line.timed():
                for row, piece in speak(heard, sampling):
                    if piece.waiting:
                        waiting = (
                            f"引擎正忙，{piece.waiting:.0f} 秒后再问。 It is busy; next try in {piece.waiting:.0f} s."
                        )
                        yield _meanwhile(so_far, persona.CROWDED, waiting)
                        continue
                    so_far[row] = _grown(so_far[row], piece, sampling)
                    if piece.cost:
                        self.allowance.spend(visitor, piece.cost.tokens)
                    yield so_far

    def _until_ready(self) -> Iterator[float]:
        """While the engine is being loaded: the seconds since the page was built, again and again."""
        while not self.engine.ready:
            yield time.monotonic() - self.opened
            time.sleep(LOOK)


def _meanwhile(so_far: list[Spoken], line: str, hint: str) -> list[Spoken]:
    """What stands in the bubbles while a visitor waits: her line where nothing was said yet, and the reason."""
    return [replace(spoken, words=spoken.words or line, hint=hint) for spoken in so_far]


def _answering(engine: ChatEngine) -> Callable[..., Iterator[Piece]]:
    def answer(turns: list[Message], adapter: str, sampling: Sampling, go_on: bool) -> Iterator[Piece]:
        yield from engine.stream(turns, adapter, sampling, threading.Event(), go_on)

    return answer


def _comparing(engine: ChatEngine) -> Callable[..., Iterator[tuple[int, Piece]]]:
    def compare(turns: list[Message], adapters: list[str], sampling: Sampling) -> Iterator[tuple[int, Piece]]:
        yield from engine.compare(turns, adapters, sampling, threading.Event())

    return compare


def on_gpu(stream: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A stream as ZeroGPU wants it: a plain generator that asks for a GPU, briefly. Elsewhere a no-op."""

    def seconds(turns: list[Message], adapter: object, sampling: Sampling, *_: Any) -> int:
        return min(25, 5 + sampling.max_new_tokens // 20)

    return cast("Callable[..., Iterator[Any]]", spaces.GPU(stream, duration=seconds))


def _grown(spoken: Spoken, piece: Piece, sampling: Sampling) -> Spoken:
    words = spoken.words + piece.text
    return Spoken(words, _aside(piece.cost), piece.cost, sampling.seed) if piece.cost else Spoken(words)


def _aside(cost: Cost) -> str:
    notes = []
    if cost.stopped == "length":
        notes.append("话到此处已满，可按「接着说」。 Cut at the length limit; press Continue.")
    if cost.forgotten:
        notes.append(f"最早的 {cost.forgotten} 句她已记不得了。 The oldest {cost.forgotten} messages no longer fit.")
    return " ".join(notes)


def excuse(error: Exception) -> tuple[str, str]:
    """Her line for what went wrong, and a plain hint; what is not the visitor's doing is logged, without his words."""
    if isinstance(error, Refused):
        return error.line, str(error)
    if isinstance(error, Full | Busy):
        return persona.CROWDED, "候着的人太多，请过一会儿再问。 Too many are waiting; ask again in a while."
    if isinstance(error, Exceeded):
        return persona.BREATHLESS, "问得太急，请歇一分钟再问。 Too many messages; wait a minute."
    if isinstance(error, Error):  # a ValueError too, so it is asked for first
        return persona.UNWELL, ZERO_GPU.get(error.title, OTHERWISE)
    if isinstance(error, ValueError):
        return persona.UNWELL, f"此问不成：{error}"
    log.exception("A reply failed")
    return persona.UNWELL, NO_MEMORY if type(error).__name__ == "OutOfMemoryError" else OTHERWISE


def question(message: object) -> Message:
    """The visitor's words as a turn. Raises Refused when they are none or too many."""
    text = plain(message)
    if not text:
        raise Refused(persona.SILENT, "请先写几个字。 Write a few words first.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(persona.LONG_WINDED, f"每句至多 {MAX_CHARACTERS} 字。 At most {MAX_CHARACTERS} characters.")
    return {"role": "user", "content": text}


def read_history(history: Sequence[Any]) -> list[Message]:
    """The visitor's and her turns of a page's history, as plain text.

    Content comes as a string or as typed parts. A history can be forged: other roles are dropped, lengths capped. Her
    greeting is dropped too, for she was trained on conversations that the visitor opens; so are notes on provenance.
    """
    turns: list[Message] = []
    for entry in list(history)[-2 * MAX_TURNS :]:
        if not isinstance(entry, dict) or (entry.get("metadata") or {}).get("title"):
            continue
        role, text = entry.get("role"), plain(entry.get("content")).split(ASIDE)[0][:LONGEST]
        if text and (role == "user" or (role == "assistant" and turns)):
            turns.append({"role": cast("Any", role), "content": text})
    return turns[-MAX_TURNS:]


def plain(content: object) -> str:
    """The text of a message's content, be it a string or typed parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def provenance(engine: ChatEngine, chosen: Chosen, spoken: Spoken, asked: str | None) -> str:
    """What said this reply and how to have it again, in Markdown; `asked` is the question when it was the first."""
    assert spoken.cost is not None
    cost, digest = spoken.cost, engine.digest(chosen.adapter)
    stops = {
        "end": "自己说完 ended",
        "length": "到长度上限 length limit",
        "cancelled": "被打断 stopped",
        "time": "超时 time limit",
    }
    facts = [
        f"声音 Adapter: {chosen.adapter}" + (f" (sha256 {digest}…)" if digest else ""),
        f"底座 Base: {engine.base}",
        f"种子 Seed: {spoken.seed}",
        f"{cost.tokens} tokens · 首字 first token {cost.first_token:.2f} s · {cost.tokens_per_second:.1f} tokens/s",
        f"收尾 Stop: {stops[cost.stopped]}",
    ]
    if asked is not None:
        facts.append(f"[同样的一问 · The same again](?{link(chosen, spoken.seed, asked)})")
    return "  \n".join(facts)


def link(chosen: Chosen, seed: int | None, asked: str) -> str:
    """The query that fills in the page for the same reply."""
    default = Chosen(adapter=chosen.adapter)
    changed = {name: value for name, value in vars(chosen).items() if value != getattr(default, name)}
    return urlencode({**changed, "adapter": chosen.adapter, "seed": seed, "q": asked})


def about(engine: ChatEngine) -> str:
    """The line below the chat before anything was said: which adapter and base will answer."""
    missing = "" if engine.adapters[0] != BASE_ONLY else " · 尚无适配器，只有底座与提示词 No adapter for this base yet"
    lost = len(engine.refused)
    if lost:
        missing += f" · 有 {lost} 个适配器打不开，详见日志 {lost} adapters could not be opened; the log says why"
    return f"{engine.adapters[0]} · {engine.base}{missing}"


def status(engine: ChatEngine, chosen: Chosen, spoken: Spoken) -> str:
    """The line below the chat: who answers, and at its end how fast."""
    line = f"{chosen.adapter} · {engine.base}"
    if not spoken.cost:
        return line
    cost = spoken.cost
    return f"{line} · 首字 {cost.first_token:.1f} s · {cost.tokens} tokens · {cost.tokens_per_second:.1f} tokens/s"
