"""Examples: the files that a run names, read and checked whole, and split without leaking.

python -m training.data FILE…    shows, without training, what would be learned
"""

import argparse
import hashlib
import json
import logging
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chat.download import digest, fetch
from training.formats import Example, Notes, first_of, read_examples
from training.reader import SUFFIXES, Fault, read, read_hub, suffix
from training.tokens import Encoded, base_tokenizer, encode_each, length_note, show_row

log = logging.getLogger(__name__)

# The rows in their original order; the file at the head of that repository holds them shuffled.
FULL_COMMIT = "84c3486aeee22cd6585c21771924cd538a081295"
FULL_SET = f"https://raw.githubusercontent.com/datawhalechina/self-llm/{FULL_COMMIT}/dataset/huanhuan.json"
FULL_SHA256 = "1a0172c731eee506fb58f888f5efd953f7bb183f416affecbe3f93dbb9596a34"
FULL_FILE = Path(__file__).parent.parent / "dataset" / "huanhuan.json"  # git-ignored
ROWS = ".rows"  # ends the name of a list of the full set's row numbers, one a line: its lines are not ours to ship
INFO = "dataset_info.json"  # LLaMA-Factory's list of files
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_VALIDATION_GROUP = 8  # rows; 你是谁？ and 你好 stand in the set fifty times: they are taught, not tested
VALIDATION_ROWS = 200  # held out by default, but at most a tenth of all rows


@dataclass
class Reading:
    """What the named files hold: examples, the faults of all files, and what of the rows is not learned."""

    examples: list[Example] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    skipped: int = 0  # rows with a fault
    fatal: bool = False  # whether a file has a fault behind which nothing could be read
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)  # sentences

    def add_fault(self, fault: Fault, path: str) -> None:
        place = ", ".join([path, *filter(None, [f"line {fault.line}" if fault.line else "", fault.field])])
        self.faults.append(f"{place}: {fault.args[0]}")
        self.skipped += not fault.fatal
        self.fatal |= fault.fatal

    def complaint(self) -> str:
        """All faults, the first ones in full, each on a line."""
        told = first_of(self.faults)
        return "\n".join(told if self.fatal else [*told, "--skip-bad-rows leaves these rows out."])


def load(names: Iterable[str], system: str = "hers", skip_bad_rows: bool = False) -> list[Example]:
    """Every example of the named files, in order; `huanhuan` fetches the full set, NAME.rows those rows of it.

    A dialogue gives an example for each of its replies. With `system="own"` rows train under their own system prompts;
    with `skip_bad_rows` rows with a fault are left out and counted. What is not learned is logged, each kind once.
    Raises ValueError with all faults of all files, each with file, line and field; or Unavailable.
    """
    reading = read_files(names, system)
    for note in reading.notes:
        log.warning(note)
    if reading.faults and (reading.fatal or not skip_bad_rows):
        raise ValueError(reading.complaint())
    if reading.faults:
        log.warning("%d rows are left out, the first: %s", reading.skipped, reading.faults[0])
    return reading.examples


def read_files(names: Iterable[str], system: str = "hers") -> Reading:
    """Read the named files as far as they can be read. Raises Unavailable when the full set cannot be fetched."""
    reading = Reading()
    known: dict[Path, Path] = {}  # two spellings of one file are one file
    for name in names:
        try:
            paths = _paths(name, reading.notes)
        except ValueError as error:
            reading.faults.append(str(error))
            reading.fatal = True
            continue
        for path in paths:
            if isinstance(path, Path):
                path = known.setdefault(path.resolve(), path)
            _read_into(reading, path, system)
    reading.notes = list(dict.fromkeys(reading.notes))
    return reading


def _read_into(reading: Reading, path: Path | str, system: str) -> None:
    if isinstance(path, Path) and path.suffix == ROWS:
        reading.examples += _chosen(path, reading)
        return
    notes = Notes()
    rows = read(path) if isinstance(path, Path) else read_hub(path)
    for each in read_examples(rows, str(path), notes, own_system=system == "own"):
        if isinstance(each, Fault):
            reading.add_fault(each, str(path))
        else:
            reading.examples.append(each)
    reading.dropped += notes.dropped
    if notes.dropped:
        counts = ", ".join(f"{name} ({count:,})" for name, count in notes.dropped.items())
        reading.notes.append(f"{path}: these fields are not learned: {counts}.")
    reading.notes += [f"{path}: {count:,} {remark}." for remark, count in notes.remarks.items()]


def _chosen(path: Path, reading: Reading) -> list[Example]:
    """Rows of the full set, chosen by the numbers in a file."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    numbers = {line for line in lines if line and not line.startswith("#")}
    examples = {str(example.row): example for example in load(["huanhuan"])}
    if unknown := sorted(numbers - examples.keys()):
        what = f"names row {unknown[0]}; the full set has rows 1 to {len(examples)}. Correct it there."
        reading.faults.append(f"{path} {what}")
        reading.fatal = True
    return [example for row, example in examples.items() if row in numbers]


def record(names: Iterable[str]) -> list[dict[str, str]]:
    """Each file behind the names, once, and its sha256: what an adapter was trained on.

    Of a data set on the Hub it is the sha256 of its rows as they were read.
    """
    files = dict.fromkeys(path for name in names for path in _paths(name, []))
    if any(isinstance(file, Path) and file.suffix == ROWS for file in files):
        files |= dict.fromkeys(_paths("huanhuan", []))
    return [
        {"file": file.name, "sha256": digest(file)} if isinstance(file, Path) else {"file": file, "sha256": _hash(file)}
        for file in files
    ]


def _hash(name: str) -> str:
    rows = hashlib.sha256()
    for row in read_hub(name):
        rows.update(repr(row).encode("utf-8", "surrogatepass"))
    return rows.hexdigest()


def _paths(name: str, notes: list[str]) -> list[Path] | list[str]:
    """The files behind a name, or the name itself where it is one on the Hub. Raises ValueError."""
    if name == "huanhuan":
        return [fetch(FULL_SET, FULL_FILE, sha256=FULL_SHA256)]
    path = Path(name)
    if path.is_dir():
        return _files(path, notes)
    if path.is_file():
        return [path]
    if HUB_ID.fullmatch(name) and suffix(path) not in SUFFIXES:
        return [name]
    raise ValueError(
        f"{name} is no data file. Name a file ({', '.join(SUFFIXES)}), a folder of them, USER/NAME on the Hub, or "
        "huanhuan."
    )


def _files(folder: Path, notes: list[str]) -> list[Path]:
    """The data files of a folder, but not of its sub-folders. Raises ValueError when there is none."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file() and suffix(path) in SUFFIXES and path.name != INFO]
    if folder.resolve() == FULL_FILE.parent.resolve():
        return [path for path in files if path.name != FULL_FILE.name]
    if aside := [f"{path.name}/" if path.is_dir() else path.name for path in inside if path not in files]:
        notes.append(f"{folder}: these are not read: {', '.join(aside)}. Name what should be, too.")
    if not files:
        raise ValueError(f"{folder} holds no data file ({', '.join(SUFFIXES)}). Name another folder, or a file.")
    return files


def split(examples: Sequence[Example], validation_rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation (held-out) examples; no question, answer or dialogue stands on both sides.

    Whole groups are held out, in an order drawn with `seed`, until there are `validation_rows`. Of the default, and
    of a number that leaves nothing to learn, it is at most a tenth of the examples. A file that is named twice is
    learned twice as often, but held out once.
    """
    share = min(validation_rows, len(examples) // 10)
    groups = _groups(examples)
    random.Random(seed).shuffle(groups)
    for limit in (share if validation_rows == VALIDATION_ROWS else validation_rows, share):
        validation: dict[tuple[str, int, int], Example] = {}
        for group in groups:
            replies = {example.key: example for example in group}
            if len(validation) + len(replies) <= limit and len(replies) <= LARGEST_VALIDATION_GROUP:
                validation |= replies
        if training := [example for example in examples if example.key not in validation]:
            break
    return training, list(validation.values())


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
        for key in (("question", e.question.strip()), ("answer", e.answer.strip()), e.key[:2]):
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[Example]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[root(i)].append(example)
    return list(groups.values())


def main() -> None:
    """Say what would be learned, without training. Ends with status 1 and all faults when not all of it can be."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="as --dataset of training.run takes them")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON alone")
    parser.add_argument("--system", choices=("hers", "own"), default="hers", help="own: rows keep their system prompts")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows with a fault, and count them")
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a row (default %(default)s)")
    parser.add_argument("--base", default="small", help="a base's name or folder, for its tokenizer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    try:
        reading = read_files(arguments.files, arguments.system)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    rows: list[Encoded] = []
    tokenizer = base_tokenizer(arguments.base)
    if tokenizer:
        for row in encode_each(tokenizer, reading.examples, arguments.max_length, "<|im_end|>"):
            if isinstance(row, str):
                reading.faults.append(row)
                reading.skipped += 1
            else:
                rows.append(row)
    learned = len(rows) if tokenizer else len(reading.examples)
    counts = {
        "examples": len(reading.examples), "learned_replies": learned, "skipped": reading.skipped,
        "cut": sum(row.cut for row in rows) if tokenizer else None, "dropped_fields": dict(reading.dropped),
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(counts, ensure_ascii=False))
    else:
        print(_summary(reading, counts))
        if rows:
            print(show_row(tokenizer, rows[0]), length_note(rows, arguments.max_length), sep="\n")  # type: ignore[arg-type]
        elif not tokenizer:
            print(
                "Tokens were not counted: no base is on this disk. Name its folder with --base, or start app.py once."
            )
    refused = reading.fatal or not arguments.skip_bad_rows
    if reading.faults and refused:
        sys.exit(reading.complaint())
    if not learned:
        sys.exit("Nothing of it can be learned: no reply is left.")


def _summary(reading: Reading, counts: dict[str, Any]) -> str:
    """The counts and the notes, a line each."""
    files = Counter(example.path for example in reading.examples)
    lines = [f"{path}: {count:,} replies to learn" for path, count in files.items()]
    lines += reading.notes
    lines += [f"{counts['skipped']:,} rows have a fault"] if reading.skipped else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
