"""Rows to examples: the forms in which people keep dialogues, as tables; what a form cannot say here is a Fault."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from chat.persona import NAME, PASSER_BY, SCENES, SYSTEM_PROMPT, Message, her_words, with_scene
from training.reader import Fault, Number, Row

# The names under which tools keep the same thing; of one tuple a row has at most one.
TURNS = ("messages", "conversations", "conversation", "contents", "items", "dialogue", "dialog")
ROLE = ("role", "from")
TEXT = ("content", "value", "text", "parts")
PAIRS = (  # a question and its reply
    (("instruction", "query", "prompt", "question"), ("output", "response", "completion", "answer", "target")),
    (("human", "user"), ("assistant", "gpt")),
)
ADDED = ("input", "context")  # follows the question on a line of its own, or is the question where there is no other
SYSTEM = ("system", "system_prompt")
# Whether a reply is learned, as OpenAI, ms-swift, axolotl and XTuner say it; and KTO, beside a row.
LEARNED = ("weight", "loss", "loss_scale", "train", "training", "train_detail", "output_with_loss")
LIKED = ("label", "kto_tag")
PREFERRED = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_output")
MORE_THAN_TEXT = (
    "images", "image", "image_url", "videos", "video", "video_url", "audios", "audio", "input_audio", "file", "tools",
    "functions", "tool_calls", "function_call", "tool_call_id",
)  # fmt: skip
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
NESTED = ("data", "rows", "train", "examples")  # of a file that is one object with its rows in it
FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
FORMS = (
    'Give it "instruction" and "output", "messages" or "conversations"; docs/training.md shows every form that is read.'
)
GREETING = "dialogues open with her words. The page never sends those, so they are left out"
OPEN_QUESTION = "dialogues end on a question without a reply, which is left out"
NOT_LEARNED = "replies are marked as not to be learned. They are context only"
JOINED = "questions are an instruction and an input, with a line break between"


@dataclass(frozen=True)
class Example:
    """One reply to learn, and the messages before it."""

    messages: tuple[Message, ...]
    answer: str
    source: str  # the file's name
    row: int  # from 1
    path: str = ""  # of the file, or the name of a data set on the Hub
    line: int = 0  # from 1, where the row begins; 0 where the file has no lines
    system: str = SYSTEM_PROMPT

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells the reply from all others."""
        return self.path or self.source, self.row, len(self.messages)

    @property
    def where(self) -> str:
        return f"{self.path or self.source}, {f'line {self.line}' if self.line else f'row {self.row}'}"

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass
class Notes:
    """What of the rows is not learned: each field by the number of its values, and remarks by that of their rows."""

    dropped: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Turn:
    """A message, whether it may be learned, and where in its row it stands."""

    role: str
    text: str
    learned: bool
    field: str


def first_of(sentences: list[str], most: int = 20) -> list[str]:
    """The first sentences, and how many more there are."""
    return sentences[:most] + ([f"and {len(sentences) - most} more"] if len(sentences) > most else [])


def read_examples(
    rows: Iterable[Row | Fault], path: str, notes: Notes, own_system: bool = False
) -> Iterator[Example | Fault]:
    """The examples of a file's rows, in order, and a Fault in place of each row that cannot be learned as it says.

    With `own_system` a row trains under its own system prompt; without, one that differs from hers is a fault.
    """
    for number, row in enumerate(_dialogues(rows), start=1):
        if isinstance(row, Fault):
            yield row
            continue
        try:
            yield from _examples(row, path, number, notes, own_system)
        except Fault as fault:
            fault.line = row.line
            fault.field = ", ".join(filter(None, ["" if row.line else f"row {number}", fault.field]))
            yield fault


def _dialogues(rows: Iterable[Row | Fault]) -> Iterator[Row | Fault]:
    """A row a dialogue. A card, columns, rows below a name, and a chat with a message a line are taken apart."""
    log: list[dict[str, Any]] = []  # the messages of SillyTavern's chat
    first = 0
    for row in rows:
        value = row.value if isinstance(row, Row) else None
        if not isinstance(row, Row) or not isinstance(value, dict):
            yield row
        elif {"mes", "is_user"} <= value.keys():
            first = first or row.line
            if not value.get("is_system"):  # hidden from the model there, too
                own = {key: item for key, item in value.items() if key not in ("mes", "is_user", "is_system")}
                log.append({"role": "user" if value["is_user"] else "assistant", "content": value["mes"], **own})
        elif value.keys() >= {"user_name", "character_name"} and not value.keys() & {*TURNS}:
            continue  # the head of such a chat
        else:
            for each in _card(value) or _columns(value) or _nested(value) or [value]:
                yield replace(row, value=each)
    if log:
        yield Row({"messages": log}, first)


def _card(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The example dialogues of a character card: one text, `<START>` before each and `{{user}}:` before a message."""
    card = value["data"] if isinstance(value.get("data"), dict) else value
    if not {"first_mes", "mes_example"} <= card.keys():
        return []
    name = str(card.get("name") or NAME)
    others = {key: item for key, item in card.items() if key not in ("name", "mes_example", *SYSTEM)}
    rows = []
    for block in str(card["mes_example"]).replace("{{char}}", name).split("<START>"):
        parts = re.split(rf"^\s*({{{{user}}}}|{re.escape(name)})[:：]", block, flags=re.M)
        said = zip(parts[1::2], parts[2::2], strict=True)
        turns = [{"role": "user" if who == "{{user}}" else "assistant", "content": text.strip()} for who, text in said]
        if turns:
            rows.append({"messages": turns, "system": card.get("system_prompt"), **others})
    return rows or [{"messages": [], **others}]


def _columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table that is one object of lists of texts; none for another object."""
    pair = {name for names in PAIRS[0] for name in names} & value.keys()
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    if len(pair) < 2 or any(not isinstance(cell, str) for name in pair for cell in columns.get(name, [None])):
        return []
    if len({len(cells) for cells in columns.values()}) > 1:
        return []  # such a row is refused, as a list is no text
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _nested(value: dict[str, Any]) -> list[dict[str, Any]]:
    for name in NESTED:
        rows = value.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return rows
    return []


def _examples(row: Row, path: str, number: int, notes: Notes, own_system: bool) -> Iterator[Example]:
    value = {"messages": row.value} if isinstance(row.value, list) else row.value
    if not isinstance(value, dict):
        raise Fault(f"is no JSON object. {FORMS}")
    value = {name: item for name, item in value.items() if item is not None}
    if found := [name for name in PREFERRED if value.get(name)]:
        raise Fault("ranks one reply above another, and a reply alone is learned here. Keep the better one as "
                    '"output", or as the last of "messages", and delete the other.', found[0])  # fmt: skip
    of_page = value.keys() >= {"scene", "visitor", "messages"}
    if of_page and isinstance(value["messages"], list):
        value["messages"] = [each for each in value["messages"] if not _is_note(each)]
    learned = _learned(value, (*LEARNED, *LIKED))
    system, turns = _system(_turns(value, notes), own_system)
    if of_page:
        turns = _without_refusals(turns)
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
        notes.remarks[GREETING] += 1
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
        notes.remarks[OPEN_QUESTION] += 1
    _require_exchanges(turns)
    name = Path(path).name
    messages = _with_scene([{"role": cast("Any", turn.role), "content": turn.text} for turn in turns], value)
    for end in range(1, len(messages), 2):
        if learned and turns[end].learned:
            yield Example(tuple(messages[:end]), turns[end].text, name, number, path, row.line, system)
        else:
            notes.remarks[NOT_LEARNED] += 1


def _is_note(message: object) -> bool:
    """Whether it is a note of the page, folded up below a reply."""
    metadata = message.get("metadata") if isinstance(message, dict) else None
    return isinstance(metadata, dict) and bool(metadata.get("title"))


def _one(value: Mapping[str, Any], names: Iterable[str], where: str = "") -> str:
    """Which of the names has a value there; none gives an empty text. Raises Fault when there are two."""
    found = [name for name in names if value.get(name) is not None]
    if len(found) > 1:
        raise Fault(f"stands beside {found[1]}, which means the same. Keep one.", f"{where}{found[0]}")
    return found[0] if found else ""


def _pair(value: Mapping[str, Any], where: str = "") -> tuple[str, str]:
    """The names of a question and its reply, each empty where there is none."""
    questions, answers = next((pair for pair in PAIRS if value.keys() & {*pair[1]}), PAIRS[0])
    return _one(value, questions, where), _one(value, answers, where)


def _turns(value: dict[str, Any], notes: Notes) -> list[Turn]:
    """All messages of a row in order, a system prompt among them. Raises Fault."""
    turns = [Turn("system", _text(value[name], name), False, name) for name in SYSTEM if value.get(name)]
    used = {*SYSTEM, *LEARNED, "scene", "visitor"}
    used |= {name for name in LIKED if str(value.get(name)).lower() in FLAGS}
    if name := _one(value, TURNS):
        _drop(value, used | {name}, "", notes)
        return turns + _list(value[name], name, notes)
    (question, answer), added = _pair(value), _one(value, ADDED)
    if not answer or not (question or added):
        raise Fault(f"has {', '.join(value) or 'nothing'}: no question with its reply. {FORMS}")
    _drop(value, used | {question, added, answer, "history"}, "", notes)
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(each, list | dict) for each in history):
        raise Fault("is no list of pairs. Write it as [[question, reply], …].", "history")
    turns += _list(history, "history", notes)
    if isinstance(value[answer], list) and isinstance(value.get(question), list | None):  # TRL's conversational form
        prompt = [replace(turn, learned=False) for turn in _list(value.get(question) or [], question, notes)]
        return turns + prompt + _list(value[answer], answer, notes)
    asked = [name for name in (question, added) if name and value[name] != ""]
    if len(asked) > 1:
        notes.remarks[JOINED] += 1  # the tutorial puts nothing between; in its own file the input is always empty
    text = "\n".join(_text(value[name], name) for name in asked or [question or added])
    reply = Turn("assistant", _text(value[answer], answer), True, answer)
    return [*turns, Turn("user", text, False, question or added), reply]


def _list(value: object, where: str, notes: Notes) -> list[Turn]:
    if not isinstance(value, list):
        raise Fault(f"is {_kind(value)}, not a list of messages. {FORMS}", where)
    return [turn for i, each in enumerate(value) for turn in _turn(each, f"{where}[{i}]", notes)]


def _turn(each: object, where: str, notes: Notes) -> list[Turn]:
    """A message, or a question with its reply. Raises Fault."""
    if isinstance(each, list) and len(each) == 2:
        who = ("user", "assistant")
        return [Turn(who[i], _text(text, f"{where}[{i}]"), True, f"{where}[{i}]") for i, text in enumerate(each)]
    if not isinstance(each, dict):
        raise Fault(f'is {_kind(each)}, no message. Give it "role" and "content", or "from" and "value".', where)
    each = {name: item for name, item in each.items() if item is not None}
    learned = _learned(each, LEARNED, f"{where}.")
    if role := _one(each, ROLE, f"{where}."):
        names = [(_role(each[role], f"{where}.{role}"), _one(each, TEXT, f"{where}.") or TEXT[0])]
    else:
        question, answer = _pair(each, f"{where}.")
        question, system = question or _one(each, ADDED, f"{where}."), _one(each, SYSTEM, f"{where}.")
        if not question or not answer:
            has = f"has {', '.join(each) or 'nothing'}"
            raise Fault(f'{has}. A message needs "role" and "content", or "from" and "value".', where)
        names = [("system", system)] if system else []
        names += [("user", question), ("assistant", answer)]
    used = {role, *(name for _, name in names)}
    used |= {*LEARNED} if learned and names[-1][0] == "assistant" else {n for n in LEARNED if not _learned(each, [n])}
    _drop(each, used, f"{where}.", notes)
    return [
        Turn(who, _text(each.get(name), f"{where}.{name}"), learned, f"{where}.{name}")
        for who, name in names
        if who != "system" or each.get(name)
    ]


def _role(given: object, where: str) -> str:
    role = given.strip().lower() if isinstance(given, str) else ""
    if role in TOOL_ROLES:
        raise Fault("is a tool's part, and tools are not learned here. Delete the row.", where)
    if role not in ROLES:
        raise Fault(f"is {given!r}. Name one of {', '.join(ROLES)}.", where)
    return ROLES[role]


def _drop(value: Mapping[str, Any], used: set[str], where: str, notes: Notes) -> None:
    """Note each field that is not used. Raises Fault for one without which the text means something else."""
    for name, item in value.items():
        if name in used or item in ("", "[]", [], {}):
            continue
        if name in MORE_THAN_TEXT:
            raise Fault("means more than text, and text alone is learned here. Delete the row, or this field if the "
                        "text stands without it.", f"{where}{name}")  # fmt: skip
        notes.dropped[name] += 1


def _learned(value: Mapping[str, Any], names: Iterable[str], where: str = "") -> bool:
    """Whether none of the fields keeps a reply from being learned. Raises Fault for a value between yes and no."""
    for name in names:
        if name not in value:
            continue
        flag = FLAGS.get(str(value[name]).strip().lower())
        if flag is None and name not in LIKED:  # a label may also be a class
            what = f"is {value[name]}; a reply is learned or not. Write 1 or 0, true or false."
            raise Fault(what, f"{where}{name}")
        if flag is False:
            return False
    return True


def _kind(value: object) -> str:
    kinds = {bool: "true or false", Number: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _text(value: object, where: str) -> str:
    """A text, a number as it is written, or the joined texts of typed parts. Raises Fault."""
    if isinstance(value, list) and value:
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = Number(value)
    if isinstance(value, Number) and value.strip("-").lower() in ("nan", "infinity", "inf"):
        raise Fault(f"is {value}. Write the text that is meant, or delete the row.", where)
    if value is not None and not isinstance(value, str):
        raise Fault(f"is {_kind(value)}, not text. Write it as text, or delete the row.", where)
    if not value or not value.strip():
        raise Fault("is empty. Fill it or delete the row.", where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise Fault(f"holds half a character, {half}: an emoji that was cut. Correct it.", where) from error
    return str(value)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        raise Fault("is a text in a list. Write one text without the list.", where)
    kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
    if kind not in ("text", "input_text", "output_text"):
        raise Fault(f"is {kind}, and text alone is learned here. Delete the row, or give text.", where)
    return _text(cast("dict[str, Any]", part).get("text"), f"{where}.text")


def _system(turns: list[Turn], own_system: bool) -> tuple[str, list[Turn]]:
    """The system prompt, and the turns behind it. Raises Fault."""
    prompts: list[Turn] = []
    for i, turn in enumerate(turns):
        if turn.role != "system":
            continue
        if i > len(prompts):
            raise Fault("is a system prompt amid the dialogue; one at its head is learned. Delete it.", turn.field)
        if prompts and turn.text.strip() != prompts[0].text.strip():
            raise Fault("is another system prompt than the one before it. Keep one.", turn.field)
        prompts.append(turn)
    rest = turns[len(prompts) :]
    if not prompts or prompts[0].text.strip() == SYSTEM_PROMPT:
        return SYSTEM_PROMPT, rest
    if not own_system:
        raise Fault("is a system prompt of its own. --system own trains the row under it; without that field the row "
                    "trains under hers.", prompts[0].field)  # fmt: skip
    return prompts[0].text, rest


def _without_refusals(turns: list[Turn]) -> list[Turn]:
    """The turns of the page's JSON without hints, and without the exchanges in which she could not reply."""
    kept: list[Turn] = []
    for turn in turns:
        text = her_words(turn.text) if turn.role == "assistant" else turn.text
        if text:
            kept.append(replace(turn, text=text))
        elif kept and kept[-1].role == "user":
            kept.pop()
    return kept


def _require_exchanges(turns: list[Turn]) -> None:
    """Raise Fault unless questions and replies take turns."""
    if not turns:
        raise Fault("holds no question with a reply. Give both, or delete the row.")
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            what = f"is the {turn.role}'s second message in a row. Join the two, or add what was said between."
            raise Fault(what, turn.field)


def _with_scene(messages: list[Message], value: Mapping[str, Any]) -> list[Message]:
    """The messages with the row's scene and visitor before each question, where they do not stand there already."""
    scene, visitor = value.get("scene") or SCENES[0].name, value.get("visitor") or PASSER_BY
    try:
        [empty] = with_scene([{"role": "user", "content": ""}], scene, visitor)
    except (ValueError, TypeError) as error:
        raise Fault(f"{error} Correct it, or give the field another name.", "scene and visitor") from error
    cue = empty["content"]
    return [
        {**each, "content": cue + each["content"]}
        if each["role"] == "user" and not each["content"].startswith(cue)
        else each
        for each in messages
    ]
