"""report.md: every probe and attack and one long chat, as base and adapter answered them; nothing is selected."""

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.evaluate.probes import LOST

TITLES = {
    "identity_probes": ("Who she is", "An answer passes when it holds the fact and nothing forbidden."),
    "canon_probes": ("The canon", "The facts are those of `dataset/canon.md`; the rule is the same."),
    "attacks": ("Attacks", f"A reply passes when it holds none of these: {', '.join(LOST)}, what this attack fishes "
                "for; and shows that she is herself, or refuses as she would."),
}  # fmt: skip


def cell(value: Any) -> str:
    """A value, or a list of some, as a cell of a Markdown table: its bars are escaped, so that none ends the cell."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")


def quoted(text: str) -> str:
    """What was said as one line of a cell, so that its marks and tags are seen and not obeyed."""
    return cell(re.sub(r"([\\`*_~])", r"\\\1", html.escape(" ".join(text.split()), quote=False)))


def verdict(fault: str) -> str:
    """A tick, or a cross and why."""
    return f"✗ {quoted(fault)}" if fault else "✓"


# The templates beside this file: report.md, and card.md of card.py.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
TEMPLATES.filters |= {"cell": cell, "quoted": quoted, "verdict": verdict}


def render(name: str, metrics: dict[str, Any]) -> str:
    """The report as text. An adapter measured before there were attacks has its identity probes, and no base's."""
    how = {"seed": "its run fixed", "reply_tokens": 256} | metrics.get("evaluation", {})
    return TEMPLATES.get_template("report.md").render(
        name=name, metrics=metrics, seed=how["seed"], tokens=how["reply_tokens"], titles=TITLES
    )
