"""The numbers and the picture of dataset/README.md: `python -m training.datacard`, after a change of the dialogues."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from training.dialogues import FOLDER, Dialogue, ours, read

CARD, FIGURE = FOLDER / "README.md", FOLDER / "lengths.png"
TABLE = re.compile(r"(?<=<!-- counts -->\n).*?(?=<!-- end of counts -->)", re.S)
LONG = 3  # exchanges


def main() -> None:
    """Write the table into the card and draw the figure beside it."""
    description = (__doc__ or "").split("\n")[0]
    argparse.ArgumentParser(prog="python -m training.datacard", description=description).parse_args()
    try:
        files = {file: read(file) for file in ours()}
        CARD.write_text(filled(CARD.read_text(encoding="utf-8"), table(files)), encoding="utf-8")
        draw(files, FIGURE)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def filled(card: str, counts: str) -> str:
    """The card with these counts. Raises ValueError when it has no place for them."""
    if not TABLE.search(card):
        raise ValueError(f"{CARD} has lost the lines around its counts. Put both back: <!-- counts -->, and its end.")
    return TABLE.sub(lambda _: counts, card)


def table(files: dict[Path, list[Dialogue]]) -> str:
    """Dialogues, replies, long dialogues and scenes of each file, and of all."""
    everything = [dialogue for dialogues in files.values() for dialogue in dialogues]
    rows = [*((f"`{file.name}`", dialogues) for file, dialogues in files.items()), ("all", everything)]
    lines = [f"| {name} | {' | '.join(_counts(dialogues))} |\n" for name, dialogues in rows]
    head = f"| file | dialogues | replies | of {LONG} or more exchanges | scenes |\n|---|---:|---:|---:|---:|\n"
    return head + "".join(lines)


def _counts(dialogues: Sequence[Dialogue]) -> tuple[str, ...]:
    replies = sum(len(dialogue.exchanges) for dialogue in dialogues)
    long = sum(len(dialogue.exchanges) >= LONG for dialogue in dialogues)
    scenes = len({dialogue.scene for dialogue in dialogues})
    return tuple(f"{count:,}" for count in (len(dialogues), replies, long, scenes))


def draw(files: dict[Path, list[Dialogue]], path: Path) -> None:
    """How long replies are, and how many dialogues a topic has. Labels are English: no Chinese font is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lengths, topics) = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=110)
    replies = [reply for dialogues in files.values() for dialogue in dialogues for _, reply in dialogue.exchanges]
    lengths.hist([len(reply) for reply in replies], bins=range(0, 111, 5))
    lengths.set(xlabel="characters of a reply", ylabel="replies")
    names, left = [file.stem for file in reversed(files)], [0] * len(files)
    for label, (least, most) in {"1 exchange": (1, 1), "2": (2, 2), f"{LONG} or more": (LONG, sys.maxsize)}.items():
        width = [sum(least <= len(d.exchanges) <= most for d in files[file]) for file in reversed(files)]
        topics.barh(names, width, left=left, label=label)
        left = [sum(pair) for pair in zip(left, width, strict=True)]
    topics.set(xlabel="dialogues")
    topics.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
