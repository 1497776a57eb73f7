"""A conversation as data: read once from what the page or a stranger sends, exported, read back, leafed through."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from chat import persona
from chat.engine import MAX_CHARACTERS, MAX_TURNS
from chat.persona import HINT, NAME, PASSER_BY, SCENES, SYSTEM_PROMPT, Message, her_words

PROVENANCE = "来历 · Provenance"  # title of the note below a reply; a history drops what has a title
MAX_MESSAGE = 2 * MAX_CHARACTERS  # characters of one message in a history
MAX_FILE = 1_000_000  # characters of a file that is read back
MAX_ALTERNATIVES = 9  # replies to one question that are kept
# Forms of exports, with the file name's suffix. ShareGPT and messages are for training, here or by other programs.
FORMATS = {"Markdown": "md", "JSON": "json", "ShareGPT": "sharegpt.json", "messages": "messages.json"}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ChatbotMessage = dict[str, Any]  # a message as gr.Chatbot takes it


class Refused(Exception):
    """A message she does not answer: her line, and the hint for the visitor."""

    def __init__(self, line: str, hint: str) -> None:
        super().__init__(hint)
        self.line = line


def plain_text(content: object) -> str:
    """The text of a message's content, be it a string or typed parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def read_history(history: Sequence[Any], most: int = MAX_TURNS) -> list[Message]:
    """The visitor's and her messages of a page's history, as plain text, the newest `most` of them.

    A history can be forged: other roles are dropped, lengths capped. Her greeting is dropped too, for she was trained
    on conversations that the visitor opens; so are notes on provenance.
    """
    messages: list[Message] = []
    for entry in list(history)[-2 * most :]:
        if not isinstance(entry, dict) or _has_title(entry):
            continue
        role, text = entry.get("role"), plain_text(entry.get("content")).split(HINT)[0][:MAX_MESSAGE]
        if text and (role == "user" or (role == "assistant" and messages)):
            messages.append({"role": cast("Any", role), "content": text})
    return messages[-most:]


def question(content: object) -> Message:
    """The visitor's words as a message; `check_question` tells whether she can answer it."""
    return {"role": "user", "content": plain_text(content)}


def check_question(message: Message) -> None:
    """Raise Refused when the visitor's words are none or too many."""
    if not message["content"]:
        raise Refused(persona.SILENT, "请先写几个字。 Write a few words first.")
    if len(message["content"]) > MAX_CHARACTERS:
        raise Refused(persona.LONG_WINDED, f"每句至多 {MAX_CHARACTERS} 字。 At most {MAX_CHARACTERS} characters.")


def greeting(scene: str = SCENES[0].name) -> ChatbotMessage:
    """Her first words in a scene, with openers to tap."""
    opened = persona.scene_named(scene)
    options = [{"value": opener} for opener in opened.openers]
    return {"role": "assistant", "content": opened.greeting, "options": options}


def note(facts: str) -> ChatbotMessage:
    """Facts about a reply, folded up below it."""
    return {"role": "assistant", "content": facts, "metadata": {"title": PROVENANCE, "status": "done"}}


def _has_title(entry: ChatbotMessage) -> bool:
    return bool((entry.get("metadata") or {}).get("title"))


def split_reply(history: Sequence[ChatbotMessage]) -> tuple[list[ChatbotMessage], list[ChatbotMessage]]:
    """The history up to the visitor's last question, and her reply to it with its notes; nothing asked, no reply."""
    asked = [i for i, entry in enumerate(history) if entry["role"] == "user"]
    end = asked[-1] + 1 if asked else len(history)
    return list(history[:end]), list(history[end:])


def reply_text(reply: Sequence[ChatbotMessage]) -> str:
    """Her words in a reply, without notes and hints."""
    return "".join(plain_text(entry["content"]) for entry in reply if not _has_title(entry)).split(HINT)[0]


@dataclass(frozen=True)
class Transcript:
    """A conversation read back: its scene, its visitor, and its messages as the page shows them."""

    scene: str
    visitor: str
    messages: list[ChatbotMessage]


def export(history: Sequence[ChatbotMessage], scene: str, visitor: str, form: str) -> str:
    """The conversation as Markdown for people, as JSON with every note, or for training, as ShareGPT or messages."""
    if form == "Markdown":
        names = {"user": f"**{visitor}**", "assistant": f"**{NAME}**"}
        lines = [f"{names[message['role']]}：{message['content']}" for message in read_history(history, len(history))]
        return "\n\n".join([f"# {NAME} · {scene}", *lines]) + "\n"
    document: Any = {"scene": scene, "visitor": visitor}
    if form in ("ShareGPT", "messages"):
        # Other programs know neither her prompt nor our scenes: both stand in the messages, as the model gets them.
        messages = persona.with_system_prompt(persona.with_scene(_exchanges(history), scene, visitor))
        if form == "messages":
            document["messages"] = messages
        else:
            speakers = {"system": "system", "user": "human", "assistant": "gpt"}
            document["conversations"] = [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]
        document = [document]
    else:
        document["messages"] = [
            {"role": entry["role"], "content": plain_text(entry["content"])}
            | ({"metadata": note("")["metadata"]} if _has_title(entry) else {})
            for entry in history
            if isinstance(entry, dict) and entry.get("role") in SPEAKERS
        ]
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _exchanges(history: Sequence[ChatbotMessage]) -> list[Message]:
    """Each question that she answered, and her words: without greeting, notes, hints, and what stands for a reply."""
    messages: list[Message] = []
    for asked, *reply in _by_question(history):
        words = [her_words(plain_text(entry.get("content"))) for entry in reply if not _has_title(entry)]
        text, answer = plain_text(asked.get("content")), "".join(words)
        if text and answer:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return messages


def _by_question(history: Sequence[ChatbotMessage]) -> list[list[ChatbotMessage]]:
    """The history cut before each question; what stands before the first one is left out."""
    parts: list[list[ChatbotMessage]] = []
    for entry in history:
        role = entry.get("role") if isinstance(entry, dict) else None
        if role == "user":
            parts.append([entry])
        elif parts and role == "assistant":
            parts[-1].append(entry)
    return parts


def read_transcript(text: str) -> Transcript:
    """Read back what `export` wrote, Markdown aside, or what the browser kept. Raises ValueError.

    It may be forged: roles, lengths, scene and visitor are checked as a stranger's.
    """
    if len(text) > MAX_FILE:
        raise ValueError(f"这份记录太长（{len(text):,} 字）。 The transcript is too long; {MAX_FILE:,} characters fit.")
    try:
        data = json.loads(text)
        data = data[0] if isinstance(data, list) else data
        entries = data.get("messages") or data["conversations"]
        scene, visitor = data.get("scene") or SCENES[0].name, data.get("visitor") or PASSER_BY
        [cue] = persona.with_scene([{"role": "user", "content": ""}], scene, visitor)
        if entries and plain_text(entries[0].get("content", entries[0].get("value"))) == SYSTEM_PROMPT:
            entries = entries[1:]
        messages = [_checked(entry, cue["content"]) for entry in entries[: 4 * MAX_TURNS]]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            "读不懂：请选本页存出的 JSON 或 ShareGPT。 Not a transcript of this page; its JSON or ShareGPT can be read."
        ) from error
    if not messages or messages[0]["role"] != "assistant":
        messages.insert(0, greeting(scene))
    return Transcript(scene, visitor, messages)


def _checked(entry: dict[str, Any], cue: str) -> ChatbotMessage:
    """A message with nothing but its role, its text without the scene's cue and, for a note, our own title."""
    role = SPEAKERS[entry.get("role") or entry["from"]]
    text = plain_text(entry["content"] if "content" in entry else entry["value"])
    if role == "assistant" and _has_title(entry):
        return note(text)
    return {"role": role, "content": text.removeprefix(cue) if role == "user" else text}


@dataclass(frozen=True)
class Alternatives:
    """Her replies to one question: retrying adds one, a new question starts over."""

    asked: tuple[str, ...] = ()
    replies: tuple[tuple[ChatbotMessage, ...], ...] = ()
    at: int = 0

    def remember(self, history: Sequence[ChatbotMessage]) -> "Alternatives":
        """With the reply that the history ends on, unless it is there already."""
        before, reply = split_reply(history)
        if not reply or not reply_text(reply):
            return self
        asked = tuple(plain_text(entry["content"]) for entry in before)
        kept = self.replies if asked == self.asked else ()
        texts = [reply_text(each) for each in kept]
        if reply_text(reply) in texts:
            return Alternatives(asked, kept, texts.index(reply_text(reply)))
        kept = (*kept, tuple(reply))[-MAX_ALTERNATIVES:]
        return Alternatives(asked, kept, len(kept) - 1)

    def leaf(self, history: Sequence[ChatbotMessage], step: int) -> tuple[list[ChatbotMessage], "Alternatives"]:
        """The history with the next or the previous reply in place of the one shown."""
        before, reply = split_reply(history)
        if len(self.replies) < 2 or tuple(plain_text(entry["content"]) for entry in before) != self.asked:
            return [*before, *reply], self
        at = (self.at + step) % len(self.replies)
        return [*before, *self.replies[at]], replace(self, at=at)

    def __str__(self) -> str:
        return f"{self.at + 1} / {len(self.replies)}" if self.replies else "1 / 1"
