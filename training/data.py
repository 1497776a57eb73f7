"""Examples: read from alpaca, sharegpt or messages rows, checked row by row, split without leaking."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chat.download import digest, fetch
from chat.persona import PASSER_BY, SCENES, SYSTEM_PROMPT, Message, with_scene

# The rows in their original order; the file at the head of that repository holds them shuffled.
FULL_COMMIT = "84c3486aeee22cd6585c21771924cd538a081295"
FULL_SET = f"https://raw.githubusercontent.com/datawhalechina/self-llm/{FULL_COMMIT}/dataset/huanhuan.json"
FULL_SHA256 = "1a0172c731eee506fb58f888f5efd953f7bb183f416affecbe3f93dbb9596a34"
FULL_FILE = Path(__file__).parent.parent / "dataset" / "huanhuan.json"  # git-ignored
ROWS = ".rows"  # ends the name of a list of the full set's row numbers, one a line: its lines are not ours to ship
LARGEST_VALIDATION_GROUP = 8  # rows; 你是谁？ and 你好 stand in the set fifty times: they are taught, not tested
FORMATS = "Give it instruction and output, conversations, or messages."
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One reply to learn, and the messages before it."""

    messages: tuple[Message, ...]
    answer: str
    source: str  # the file's name
    row: int  # from 1

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells the reply from all others."""
        return self.source, self.row, len(self.messages)

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


def load(names: Iterable[str]) -> list[Example]:
    """Every example of the named files, in order; `huanhuan` fetches the full set, NAME.rows those rows of it.

    A dialogue gives an example for each of its replies. Raises ValueError naming file and row, or Unavailable.
    """
    return [example for name in names for path in _paths(name) for example in _read(path)]


def record(names: Iterable[str]) -> list[dict[str, str]]:
    """Each file behind the names, once, and its sha256: what an adapter was trained on."""
    files = dict.fromkeys(path for name in names for path in _paths(name))
    if any(file.suffix == ROWS for file in files):
        files |= dict.fromkeys(_paths("huanhuan"))
    return [{"file": file.name, "sha256": digest(file)} for file in files]


def _paths(name: str) -> list[Path]:
    if name == "huanhuan":
        return [fetch(FULL_SET, FULL_FILE, sha256=FULL_SHA256)]
    path = Path(name)
    if path.is_dir():
        return sorted(file for file in path.glob("*.json*") if file.name != FULL_FILE.name and file.suffix != ".lock")
    if not path.is_file():
        raise ValueError(f"{name} is no data file. Name a .json or .jsonl file, a folder of them, or huanhuan.")
    return [path]


def _read(path: Path) -> Iterator[Example]:
    if path.suffix == ROWS:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
        numbers = {line for line in lines if line and not line.startswith("#")}
        examples = {str(example.row): example for example in load(["huanhuan"])}
        if unknown := sorted(numbers - examples.keys()):
            raise ValueError(
                f"{path} names row {unknown[0]}; the full set has rows 1 to {len(examples)}. Correct it there."
            )
        yield from (example for row, example in examples.items() if row in numbers)
        return
    content = path.read_bytes()
    is_array = content.lstrip()[:1] == b"["  # otherwise each line is a row
    rows: list[Any] = []
    for number, text in enumerate([content] if is_array else filter(bytes.strip, content.split(b"\n")), start=1):
        try:
            rows += json.loads(text) if is_array else [json.loads(text)]
        except (ValueError, RecursionError) as error:
            where = str(path) if is_array else f"{path}, row {number}"
            raise ValueError(f"{where} is not JSON: {error}. Correct it there.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is no JSON object. {FORMATS}")
        yield from _examples(row, path, number)


def _examples(row: dict[str, Any], path: Path, number: int) -> Iterator[Example]:
    where = f"{path}, row {number}"
    messages = _messages(row, where)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != SYSTEM_PROMPT:
            raise ValueError(f"{where} brings a system prompt of its own; the character has one. Delete it.")
        messages = messages[1:]
    roles = ["user", "assistant"] * (len(messages) // 2)
    if not messages or [message["role"] for message in messages] != roles:
        raise ValueError(f"{where}: messages must alternate, a user's first and an assistant's last. Reorder them.")
    for role, message in zip(roles, messages, strict=True):
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"{where}: a message of the {role} is empty or no text. Fill it or delete the row.")
    try:
        messages = with_scene(messages, row.get("scene") or SCENES[0].name, row.get("visitor") or PASSER_BY)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for end in range(1, len(messages), 2):
        yield Example(tuple(messages[:end]), messages[end]["content"], path.name, number)


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    if row.get("messages"):
        return [_message(m, "role", "content", where) for m in row["messages"]]
    if row.get("conversations"):
        system = [{"from": "system", "value": row["system"]}] if row.get("system") else []
        return [_message(m, "from", "value", where) for m in [*system, *row["conversations"]]]
    if row.get("instruction") is not None and row.get("output") is not None:
        said = [("system", row["system"])] if row.get("system") else []
        for question, answer in row.get("history") or []:
            said += [("user", question), ("assistant", answer)]
        said += [("user", f"{row['instruction']}{row.get('input') or ''}"), ("assistant", row["output"])]
        return [{"role": cast("Any", role), "content": content} for role, content in said]
    raise ValueError(f"{where} has {', '.join(row) or 'nothing'}. {FORMATS}")


def _message(given: dict[str, Any], role: str, content: str, where: str) -> Message:
    if not isinstance(given, dict) or given.get(role) not in SPEAKERS:
        raise ValueError(f"{where}: a message needs {role!r} (one of {', '.join(SPEAKERS)}) and {content!r}.")
    return {"role": cast("Any", SPEAKERS[given[role]]), "content": given.get(content) or ""}


def split(examples: Sequence[Example], validation_rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation (held-out) examples; no question, answer or dialogue stands on both sides.

    Whole groups are held out, in an order drawn with `seed`, until there are `validation_rows`. A file that is named
    twice is learned twice as often, but held out once.
    """
    groups = _groups(examples)
    random.Random(seed).shuffle(groups)
    validation: dict[tuple[str, int, int], Example] = {}
    for group in groups:
        replies = {example.key: example for example in group}
        if len(validation) + len(replies) <= validation_rows and len(replies) <= LARGEST_VALIDATION_GROUP:
            validation |= replies
    return [example for example in examples if example.key not in validation], list(validation.values())


def _groups(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples joined by an equal question, answer or dialogue: a union-find over those three."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[object, int] = {}
    for i, e in enumerate(examples):
        for key in (("question", e.question.strip()), ("answer", e.answer.strip()), (e.source, e.row)):
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[Example]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[root(i)].append(example)
    return list(groups.values())
