"""Examples: read from alpaca, sharegpt or messages rows, checked by name, split without leaking."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chat.base import cache
from chat.fetch import digest, fetch
from chat.persona import PASSER_BY, SCENES, SYSTEM_PROMPT, Message, staged

# The rows in their original order; the file at the head of that repository holds them shuffled.
FULL_SET = (
    "https://raw.githubusercontent.com/datawhalechina/self-llm/"
    "84c3486aeee22cd6585c21771924cd538a081295/dataset/huanhuan.json"
)
FULL_SHA256 = "1a0172c731eee506fb58f888f5efd953f7bb183f416affecbe3f93dbb9596a34"
FULL_FILE = Path(__file__).parent.parent / "dataset" / "huanhuan.json"  # git-ignored
LARGEST_HELD_OUT_GROUP = 8  # 你是谁？ and 你好 stand in the set fifty times: they are taught, not tested
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One reply to learn, and the turns before it. `source` names the file, `row` counts from 1."""

    turns: tuple[Message, ...]
    answer: str
    source: str
    row: int

    @property
    def place(self) -> tuple[str, int, int]:
        """Where the reply stands: file, row, turn."""
        return self.source, self.row, len(self.turns)

    @property
    def question(self) -> str:
        """The visitor's last turn."""
        return self.turns[-1]["content"]


def load(names: Iterable[str]) -> list[Example]:
    """Every example of the named files, in order; `huanhuan` fetches the full set.

    A dialogue gives an example for each of its replies. Raises ValueError naming file and row, or Unavailable.
    """
    return [example for name in names for path in _paths(name) for example in _read(path)]


def record(names: Iterable[str]) -> list[dict[str, str]]:
    """Each file behind the names, once, and its sha256: what an adapter was trained on."""
    files = dict.fromkeys(path for name in names for path in _paths(name))
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
    import datasets  # here: it takes seconds to import

    try:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache() / "datasets"))
    except Exception as error:
        raise ValueError(_first_fault(path) or f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield from _examples(cast("dict[str, Any]", row), path, number)


def _first_fault(path: Path) -> str:
    """Which row the JSON reader stumbled over, for it names none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            return f"{path} is not JSON: {error}. Correct it there."
        return next((_fault(path, n) for n, row in enumerate(rows, 1) if not isinstance(row, dict)), "")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            if not isinstance(json.loads(line), dict):
                return _fault(path, number)
        except ValueError as error:
            return f"{path}, row {number} is not JSON: {error}. Correct or delete the line."
    return ""


def _fault(path: Path, number: int) -> str:
    return f"{path}, row {number} is no JSON object. Give it instruction and output, conversations, or messages."


def _examples(row: dict[str, Any], path: Path, number: int) -> Iterator[Example]:
    where = f"{path}, row {number}"
    turns = _turns(row, where)
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != SYSTEM_PROMPT:
            raise ValueError(f"{where} brings a system prompt of its own; the character has one. Delete it.")
        turns = turns[1:]
    roles = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn["role"] for turn in turns] != roles:
        raise ValueError(f"{where}: turns must alternate, a user's first and an assistant's last. Reorder them.")
    for turn in turns:
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise ValueError(f"{where}: a turn of the {turn['role']} is empty or no text. Fill it or delete the row.")
    try:
        turns = staged(turns, row.get("scene") or SCENES[0].name, row.get("visitor") or PASSER_BY)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for end in range(1, len(turns), 2):
        yield Example(tuple(turns[:end]), turns[end]["content"], path.name, number)


def _turns(row: dict[str, Any], where: str) -> list[Message]:
    if row.get("messages"):
        return [_turn(m, "role", "content", where) for m in row["messages"]]
    if row.get("conversations"):
        system = [{"from": "system", "value": row["system"]}] if row.get("system") else []
        return [_turn(m, "from", "value", where) for m in [*system, *row["conversations"]]]
    if row.get("instruction") is not None and row.get("output") is not None:
        return _alpaca(row)
    given = [name for name, value in row.items() if value]  # the JSON reader fills missing fields with None
    raise ValueError(
        f"{where} has {', '.join(given) or 'nothing'}. Give it instruction and output, conversations, or messages."
    )


def _turn(said: dict[str, Any], role: str, content: str, where: str) -> Message:
    if not isinstance(said, dict) or said.get(role) not in SPEAKERS:
        raise ValueError(f"{where}: a turn needs {role!r} (one of {', '.join(SPEAKERS)}) and {content!r}.")
    return {"role": cast("Any", SPEAKERS[said[role]]), "content": said.get(content) or ""}


def _alpaca(row: dict[str, Any]) -> list[Message]:
    said = [("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or []:
        said += [("user", question), ("assistant", answer)]
    question = f"{row['instruction']}{row.get('input') or ''}"
    said += [("user", question), ("assistant", row["output"])]
    return [{"role": cast("Any", role), "content": content} for role, content in said]


def split(examples: Sequence[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no question, answer or dialogue stands on both sides.

    Whole groups are held out, in an order drawn with `seed`, until `held_out` examples are reached. A file named
    twice is learned twice as often, but held out once.
    """
    groups = list(_groups(examples).values())
    random.Random(seed).shuffle(groups)
    kept: dict[tuple[str, int, int], Example] = {}
    for group in groups:
        lines = {examples[i].place: examples[i] for i in group}
        if len(kept) + len(lines) <= held_out and len(lines) <= LARGEST_HELD_OUT_GROUP:
            kept |= lines
    return [example for example in examples if example.place not in kept], list(kept.values())


def _groups(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Indices of examples joined by an equal question, answer or dialogue: a union-find over those three."""
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
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(examples)):
        groups[root(i)].append(i)
    return groups
