"""A conversation as data: what a stranger or the browser sends, read once into plain messages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from chat import persona
from chat.engine import MAX_CHARACTERS, MAX_TURNS
from chat.persona import HINT, PASSER_BY, SCENES, Message, Refused

MAX_MESSAGE = 2 * MAX_CHARACTERS  # characters of one message in a history
MAX_REQUEST = 1_000_000  # characters of what the browser sends
MAX_ID = 64  # characters of each id of the browser's
Mode = Literal["ask", "continue", "suggest"]


def plain_text(content: object) -> str:
    """The text of a message's content, be it a string or typed parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def read_history(history: Sequence[Any]) -> list[Message]:
    """The visitor's and her messages of a history, as plain text.

    A history can be forged: other roles are dropped, lengths capped. Her greeting is dropped too, for she was trained
    on conversations that the visitor opens.
    """
    messages: list[Message] = []
    for entry in list(history)[-2 * MAX_TURNS :]:
        if not isinstance(entry, dict):
            continue
        role, text = entry.get("role"), plain_text(entry.get("content")).split(HINT)[0][:MAX_MESSAGE]
        if text and (role == "user" or (role == "assistant" and messages)):
            messages.append({"role": cast("Any", role), "content": text})
    return messages[-MAX_TURNS:]


def question(content: object) -> Message:
    """The visitor's words as a message; `check_question` tells whether she can answer it."""
    return {"role": "user", "content": plain_text(content)}


def check_question(message: Message) -> None:
    """Raise Refused when the visitor's words are none or too many."""
    if not message["content"]:
        raise Refused("请先写几个字。 Write a few words first.", persona.SILENT)
    if len(message["content"]) > MAX_CHARACTERS:
        raise Refused(f"每句至多 {MAX_CHARACTERS} 字。 At most {MAX_CHARACTERS} characters.", persona.LONG_WINDED)


@dataclass(frozen=True)
class TalkRequest:
    """What the browser sends for one reply. `ids` names talk, turn and reply there; they are handed back unread."""

    mode: Mode
    messages: list[Message]  # the last one is the visitor's question, or with "continue" her reply so far
    scene: str
    visitor: str
    ids: dict[str, str]
    persona: object = None  # as it came; `Persona.parse` reads it

    @classmethod
    def parse(cls, text: str) -> "TalkRequest":
        """Read it as a stranger's, which it may be. Raises ValueError, which quotes none of it."""
        try:
            if len(text) > MAX_REQUEST:
                raise ValueError
            data = json.loads(text)
            json.dumps(data, ensure_ascii=False).encode()  # no lone surrogate
            mode, messages = str(data["mode"]), read_history(data["messages"])
            ids = {key: str(data.get(key, ""))[:MAX_ID] for key in ("talk", "turn", "reply")}
            where = {key: str(data.get(key, default)) for key, default in _DEFAULTS.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("这不是本页写的请求。 This is not a request of this page.") from None
        if mode not in get_args(Mode) or (mode == "continue" and [m["role"] for m in messages[-2:]] != PAIR):
            raise ValueError("没有可接着说的话。 There is no reply to continue.")
        if mode != "continue":
            messages.append(question(data.get("question", "")))
        return cls(cast("Mode", mode), messages, ids=ids, persona=data.get("persona"), **where)


PAIR = ["user", "assistant"]
_DEFAULTS = {"scene": SCENES[0].name, "visitor": PASSER_BY}
