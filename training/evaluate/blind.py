"""Blind reading of everyday talk: sheets without names for readers, and their marks back into metrics.json.

python -m training.evaluate.blind write FOLDER adapters/pocket adapters/medium    FOLDER/sheet.md and key.json
python -m training.evaluate.blind read FOLDER marks1.txt marks2.txt               prints the numbers, writes them

Replies of all adapters and their bases are shuffled together.
"""

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chat.adapter import METRICS
from chat.files import write_text
from training.evaluate import card
from training.evaluate.scores import BASE, SEED, bootstrap, counted, share

SHEET, KEY = "sheet.md", "key.json"
MARKS = (0, 1, 2)
MARKING = """Each item is what a visitor typed to 甄嬛 of 《甄嬛传》, and a reply. Write a line `NUMBER MARK` for each:
2: answers this line, in her voice. 1: hangs together, but misses the line or is flat. 0: does not hang together, loops,
contradicts itself, or has an assistant's voice. The items at the end are talks of six turns: one mark for a talk."""
Item = tuple[str, str, bool, int, str]  # adapter folder, "" or BASE, whether it is a talk, its number, the text shown


def items(folder: Path) -> list[Item]:
    """What an adapter and its base said to the lines and in the talks, as a reader sees it. Raises ValueError."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if "talk_lines" not in metrics:
        raise ValueError(f"{folder} was measured without everyday talk. Run python -m training.evaluate on it first.")
    found: list[Item] = []
    for side, key in (("", "reply"), (BASE, "base_reply")):
        for is_talk, entries in ((False, [[one] for one in metrics["talk_lines"]]), (True, metrics["talks"])):
            for n, turns in enumerate(entries):
                shown = (f"> 客：{turn['line']}\n>\n> 她：{turn[key].strip() or '（无言）'}\n>" for turn in turns)
                found.append((str(folder), side, is_talk, n, "\n".join(shown)))
    return found


def write(output: Path, folders: Sequence[Path]) -> int:
    """Write the sheet and its key; how many items it has."""
    shuffled = [item for folder in folders for item in items(folder)]
    random.Random(SEED).shuffle(shuffled)
    shuffled.sort(key=lambda item: item[2])  # single lines first, then the talks
    output.mkdir(parents=True, exist_ok=True)
    sheet = "\n\n".join(f"## {number}\n\n{item[4]}" for number, item in enumerate(shuffled, start=1))
    write_text(output / SHEET, f"{MARKING}\n\n{sheet}\n")
    write_text(output / KEY, json.dumps(shuffled, ensure_ascii=False, indent=1) + "\n")
    return len(shuffled)


def read_marks(path: Path, count: int) -> list[int]:
    """A reader's marks in the order of the sheet. Raises ValueError for one that is missing, or is no mark."""
    lines = re.findall(r"^\s*(\d+)[\s:.,]+(\d+)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    found = {int(number): int(mark) for number, mark in lines}
    missing = [n for n in range(1, count + 1) if found.get(n) not in MARKS]
    if len(lines) != len(found):
        raise ValueError(f"{path} marks an item twice. Leave one line for each.")
    if missing:
        raise ValueError(f"{path} has no mark of {MARKS} for {len(missing)} items, the first is {missing[0]}.")
    return [found[n] for n in range(1, count + 1)]


def read(folder: Path, readers: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The numbers of each adapter by its folder, the base's ending in `_base`, as metrics.json takes them."""
    key: list[Item] = [tuple(item) for item in json.loads((folder / KEY).read_text(encoding="utf-8"))]
    marks = [read_marks(path, len(key)) for path in readers]
    agreement = share([len(set(given)) == 1 for given in zip(*marks, strict=True)])
    by_side: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    zeros: dict[tuple[str, str, bool], list[bool]] = defaultdict(list)
    for (adapter, side, is_talk, *_), *given in zip(key, *marks, strict=True):
        by_side[adapter, side, is_talk].append(sum(given) / len(given))
        zeros[adapter, side, is_talk] += [mark == 0 for mark in given]
    numbers: dict[str, dict[str, Any]] = defaultdict(lambda: {"talk_agreement": agreement})
    for (adapter, side, is_talk), given in by_side.items():
        mean = counted(sum(given) / len(given), len(given), bootstrap(given, [1.0] * len(given)))
        numbers[adapter][f"{'six_turn_mark' if is_talk else 'talk_mark'}{side}"] = mean
        if not is_talk:
            numbers[adapter][f"talk_zero_rate{side}"] = share(zeros[adapter, side, is_talk])
    return numbers


def main() -> None:
    """Write a sheet, or read marks back."""
    from training.adapter_files import write_json

    parser = argparse.ArgumentParser(prog="python -m training.evaluate.blind", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writing, reading = commands.add_parser("write"), commands.add_parser("read")
    writing.add_argument("folder", type=Path, help="for the sheet and its key")
    writing.add_argument("adapters", type=Path, nargs="+", metavar="adapters/NAME")
    reading.add_argument("folder", type=Path)
    reading.add_argument("marks", type=Path, nargs="+", help="one file for each reader")
    arguments = parser.parse_args()
    try:
        if arguments.command == "write":
            print(f"{write(arguments.folder, arguments.adapters)} items: {arguments.folder / SHEET}")
            return
        for name, numbers in read(arguments.folder, arguments.marks).items():
            adapter = Path(name)
            metrics = json.loads((adapter / METRICS).read_text(encoding="utf-8")) | numbers
            write_json(adapter / METRICS, metrics)
            card.write(adapter)
            card.update_ledger(adapter)
            print(json.dumps({name: numbers}, ensure_ascii=False, indent=1))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
