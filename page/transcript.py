"""A conversation as data: what the browser keeps, what is exported and read back, and the replies to leaf through."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chat import persona
from chat.engine import MAX_TURNS
from chat.persona import NAME, PASSER_BY, SCENES, SYSTEM_PROMPT
from page.reply import ASIDE, plain, read_history

PROVENANCE = "来历 · Provenance"  # title of the note below a reply; a history drops what has a title
LARGEST = 1_000_000  # characters of a file that is read back
MOST = 9  # replies to one question that are kept
FORMATS = ("Markdown", "JSON", "ShareGPT")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Shown = dict[str, Any]  # a message as gr.Chatbot takes it


@dataclass(frozen=True)
class Transcript:
    """A conversation read back: where it plays, with whom, and its messages as the page shows them."""

    scene: str
    visitor: str
    messages: list[Shown]


def greeting(scene: str = SCENES[0].name) -> Shown:
    """Her first words in a scene, with openers to tap."""
    opened = persona.scene_named(scene)
    options = [{"value": opener} for opener in opened.openers]
    return {"role": "assistant", "content": opened.greeting, "options": options}


def note(facts: str) -> Shown:
    """Facts about a reply, folded up below it."""
    return {"role": "assistant", "content": facts, "metadata": {"title": PROVENANCE, "status": "done"}}


def export(history: Sequence[Shown], scene: str, visitor: str, form: str) -> str:
    """The conversation as Markdown for people, as JSON with every note, or as ShareGPT, which training can read."""
    if form == "Markdown":
        names = {"user": f"**{visitor}**", "assistant": f"**{NAME}**"}
        said = [f"{names[turn['role']]}：{turn['content']}" for turn in read_history(history)]
        return "\n\n".join([f"# {NAME} · {scene}", *said]) + "\n"
    where = {"scene": scene, "visitor": visitor}
    if form == "ShareGPT":
        speakers = {"user": "human", "assistant": "gpt"}
        said_by = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in read_history(history)]
        if said_by and said_by[-1]["from"] == "human":
            said_by.pop()  # a question without a reply teaches nothing
        return _json([{**where, "system": SYSTEM_PROMPT, "conversations": said_by}])
    messages = [
        {"role": entry["role"], "content": plain(entry["content"])} | _titled(entry)
        for entry in history
        if isinstance(entry, dict) and entry.get("role") in SPEAKERS
    ]
    return _json({**where, "messages": messages})


def read(text: str) -> Transcript:
    """Read back what `export` wrote as JSON or ShareGPT, or what the browser kept. Raises ValueError.

    It may be forged: roles, lengths, scene and visitor are checked as a stranger's.
    """
    if len(text) > LARGEST:
        raise ValueError(f"这份记录太长（{len(text):,} 字）。 The transcript is too long; {LARGEST:,} characters fit.")
    try:
        data = json.loads(text)
        data = data[0] if isinstance(data, list) else data
        said = data.get("messages") or [
            {"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in data["conversations"]
        ]
        scene, visitor = data.get("scene") or SCENES[0].name, data.get("visitor") or PASSER_BY
        persona.staged([], scene, visitor)
        shown = [_shown(entry) for entry in said[: 4 * MAX_TURNS]]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            "读不懂：请选本页存出的 JSON 或 ShareGPT。 Not a transcript of this page; its JSON or ShareGPT can be read."
        ) from error
    opened = shown if shown and shown[0]["role"] == "assistant" else [greeting(scene), *shown]
    return Transcript(scene, visitor, opened)


def _shown(entry: dict[str, Any]) -> Shown:
    role = entry["role"]
    if role not in ("user", "assistant"):
        raise ValueError(f"no such role: {role}")
    text = plain(entry["content"])
    titled = _titled(entry)
    return note(text) if titled and role == "assistant" else {"role": role, "content": text}


def _titled(entry: Shown) -> dict[str, Any]:
    title = (entry.get("metadata") or {}).get("title")
    return {"metadata": {"title": PROVENANCE, "status": "done"}} if title else {}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def cut(history: Sequence[Shown]) -> tuple[list[Shown], list[Shown]]:
    """The history up to the visitor's last question, and her reply to it with its notes; nothing asked, no reply."""
    asked = [i for i, entry in enumerate(history) if entry["role"] == "user"]
    end = asked[-1] + 1 if asked else len(history)
    return list(history[:end]), list(history[end:])


def words(reply: Sequence[Shown]) -> str:
    """What she said in a reply, without notes and hints."""
    said = [plain(entry["content"]) for entry in reply if not (entry.get("metadata") or {}).get("title")]
    return "".join(said).split(ASIDE)[0]


@dataclass(frozen=True)
class Alternatives:
    """Her replies to one question: retrying adds one, a new question begins anew."""

    asked: tuple[str, ...] = ()
    replies: tuple[tuple[Shown, ...], ...] = ()
    at: int = 0

    def remember(self, history: Sequence[Shown]) -> "Alternatives":
        """With the reply that the history ends on, unless it is there already."""
        before, reply = cut(history)
        if not reply or not words(reply):
            return self
        asked = tuple(plain(entry["content"]) for entry in before)
        kept = self.replies if asked == self.asked else ()
        said = [words(each) for each in kept]
        if words(reply) in said:
            return Alternatives(asked, kept, said.index(words(reply)))
        kept = (*kept, tuple(reply))[-MOST:]
        return Alternatives(asked, kept, len(kept) - 1)

    def leaf(self, history: Sequence[Shown], step: int) -> tuple[list[Shown], "Alternatives"]:
        """The history with the next or the previous reply in place of the one shown."""
        before, reply = cut(history)
        if len(self.replies) < 2 or tuple(plain(entry["content"]) for entry in before) != self.asked:
            return [*before, *reply], self
        at = (self.at + step) % len(self.replies)
        return [*before, *self.replies[at]], Alternatives(self.asked, self.replies, at)

    def __str__(self) -> str:
        return f"{self.at + 1} / {len(self.replies)}" if self.replies else "1 / 1"
