"""report.md: every probe and attack and one long chat, as base and adapter answered them; nothing is selected."""

import html
from collections.abc import Sequence
from typing import Any

from training.probes import LOST

BAR = "\\|"  # a bar that does not end a cell
TITLES = {
    "identity_probes": ("Who she is", "An answer passes when it holds the fact and nothing forbidden."),
    "canon_probes": ("The canon", "The facts are those of `dataset/canon.md`; the rule is the same."),
    "attacks": (
        "Attacks",
        f"A reply passes when it holds none of these: {', '.join(LOST)}, what this attack fishes for; and shows that "
        "she is herself, or refuses as she would.",
    ),
}
INTRO = """# {name}: what was asked, and what was answered

Written by `python -m training.evaluate`, from `metrics.json` beside it. Base and adapter answer the same prompts, drawn
at the page's default sampling with the seed {seed}, at most {tokens} tokens each. Every question stands here, in its
order, with the one reply that was drawn. ✓ passes; after ✗ stands why not.
"""
CHATS = """## Long chats

Ten scripted turns, drawn with the seeds {seed} to {last}. The voice is kept when no reply is empty, an assistant's, or
given twice, no 12 characters stand in three replies, and the last three hold a word of hers.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [[str(cell).replace("|", BAR) for cell in line] for line in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def quoted(text: str) -> str:
    """What was said as one line of a cell, so that its marks and tags are seen and not obeyed."""
    line = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_~":
        line = line.replace(mark, "\\" + mark)
    return line


def render(name: str, metrics: dict[str, Any]) -> str:
    """The report as text. An adapter measured before there were attacks has its identity probes, and no base's."""
    how = metrics.get("evaluation", {})
    seed = how.get("seed", "its run fixed")
    parts = [INTRO.format(name=name, seed=seed, tokens=how.get("reply_tokens", 256))]
    parts += [_section(what, metrics[what]) for what in TITLES if what in metrics]
    if "long_chats" in metrics:
        parts += [CHATS.format(seed=seed, last=seed + len(metrics["long_chat"]) - 1), _chats(metrics)]
    return "\n".join(parts)


def _section(what: str, entries: list[dict[str, Any]]) -> str:
    title, rule = TITLES[what]
    passed = sum(entry["passed"] for entry in entries)
    base = f", base {sum(not entry['base_fault'] for entry in entries)}" if "base_fault" in entries[0] else ""
    rows = [
        (n, *([entry["kind"]] if "kind" in entry else []), quoted(entry["question"]),
         _verdict(entry.get("fault", "" if entry["passed"] else "not the fact")), quoted(entry["reply"]),
         *((_verdict(entry["base_fault"]), quoted(entry["base_reply"])) if base else ()))
        for n, entry in enumerate(entries, start=1)
    ]  # fmt: skip
    kind = ("kind",) if "kind" in entries[0] else ()
    head = ("#", *kind, "asked", "", "adapter", *(("", "base") if base else ()))
    return f"## {title}\n\n{rule} Of {len(entries)}: adapter {passed}{base}.\n\n{table(head, rows)}"


def _chats(metrics: dict[str, Any]) -> str:
    verdicts = [
        (n, chat["scene"], chat["visitor"], _verdict(chat["fault"]), _verdict(chat["base_fault"]))
        for n, chat in enumerate(metrics["long_chats"], start=1)
    ]
    turns = [
        (n, *map(quoted, (turn["line"], turn["reply"], turn["base_reply"])))
        for n, turn in enumerate(metrics["long_chat"], start=1)
    ]
    first = metrics["long_chats"][0]
    return (
        f"{table(('#', 'scene', 'visitor', 'adapter', 'base'), verdicts)}\n"
        f"The first of them, {first['visitor']} in {first['scene']}:\n\n"
        f"{table(('turn', 'visitor', 'adapter', 'base'), turns)}"
    )


def _verdict(fault: str) -> str:
    return f"✗ {quoted(fault)}" if fault else "✓"
