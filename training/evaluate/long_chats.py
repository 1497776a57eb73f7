"""Twenty long chats of ten scripted messages, some in a scene with a visitor, and the rule for a voice that is kept."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from chat.persona import PASSER_BY, SCENES
from training.evaluate.probes import ASSISTANT, read

VOICE = "本宫|臣妾|嫔妾|哀家|莫愁|甄嬛|嬛|我|皇上|四郎|娘娘"  # she speaks of herself, or as one does at court
LAST = 3  # replies at the end in which the voice must still be heard; one alone may be a mere nod
SPAN, OFTEN = 12, 3  # a span of so many characters in so many replies is a tune she is stuck in


@dataclass(frozen=True)
class LongChat:
    """What a visitor says, turn by turn, whatever she replies."""

    lines: Sequence[str]
    scene: str = SCENES[0].name
    visitor: str = PASSER_BY


LONG_CHATS = tuple(LongChat(**row) for row in read("long_chats.json"))
# Everyday talk, of talk.py: single lines, and talks of six turns.
LINES, TALKS = (read("talk.json")[name] for name in ("lines", "talks"))


def fault(replies: Sequence[str]) -> str:
    """Why the voice of these replies, one chat's in order, is not kept; empty when it is."""
    if not all(reply.strip() for reply in replies):
        return "an empty reply"
    if found := re.search(ASSISTANT, "\n".join(replies)):
        return f"says {found[0]}"
    if len(set(replies)) < len(replies):
        return "the same reply twice"
    spans = Counter(span for reply in replies for span in {reply[i : i + SPAN] for i in range(len(reply) - SPAN + 1)})
    if repeated := next((span for span, count in spans.items() if count >= OFTEN), ""):
        return f"says {repeated} over and over"
    return "" if re.search(VOICE, "\n".join(replies[-LAST:])) else "no voice at the end"
