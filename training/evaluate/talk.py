"""Everyday talk: 120 lines that people type and 12 talks of six turns, answered at the page's defaults.

Rules and the base's own likelihoods measure it here; readers who do not know the adapter mark it in `blind`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chat.persona import Message
from chat.sampling import Sampling
from training.evaluate.long_chats import LINES, TALKS, LongChat
from training.evaluate.losses import row_losses
from training.evaluate.replies import generate_long_chats, generate_replies
from training.evaluate.scores import SEED, bootstrap, counted, share
from training.formats import Example
from training.tokens import encode

OTHERS = 20  # lines that a reply's own line is compared with
LOOP = re.compile(r"(.{2,}?)\1\1", re.DOTALL)  # a phrase of two or more characters three times running
# Formulas of the script to a person of rank; no such person speaks in these lines.
STOCK = re.compile(
    r"万福金安|给(皇上|皇后|太后|娘娘)请安|谢(皇上|皇后|太后|娘娘)(恩典|隆恩|赏)|臣妾(遵旨|告退|不敢|明白)|参见"
)


@dataclass(frozen=True)
class Talk:
    """What one side answered: (reply, whether she ended it herself) to each line, and her replies in each talk."""

    lines: list[tuple[str, bool]]
    talks: list[list[str]]

    @property
    def replies(self) -> list[str]:
        """All of them."""
        return [reply for reply, _ in self.lines] + [reply for talk in self.talks for reply in talk]


def loops(text: str) -> bool:
    """Whether a phrase of two or more characters stands three times running; dots and dashes do not count."""
    return bool(LOOP.search(re.sub(r"[….—~～-]+", "", text)))


def generate_talk(model: Any, tokenizer: Any, count: int, temperature: float = Sampling.temperature) -> Talk:
    """Answer the first `count` lines, and with all of them the talks too, at the page's defaults for their base."""
    questions: list[list[Message]] = [[{"role": "user", "content": line}] for line in LINES[:count]]
    sampling = Sampling(temperature=temperature, seed=SEED)
    lines = list(generate_replies(model, tokenizer, questions, sampling))
    chats = [LongChat(lines) for lines in TALKS] if count >= len(LINES) else []
    return Talk(lines, generate_long_chats(model, tokenizer, chats, sampling))


def talk_metrics(talk: Talk) -> dict[str, Any]:
    """What plain rules say of the replies."""
    replies = [reply for reply, _ in talk.lines]
    times = Counter(replies)
    return {
        "talk_cut_rate": share([not ended for _, ended in talk.lines]),
        "talk_repeat_rate": share([times[reply] > 1 for reply in replies]),
        "talk_stock_rate": share([bool(STOCK.search(reply)) for reply in replies]),
    }


def talk_pmi(base: Any, tokenizer: Any, talk: Talk) -> dict[str, float]:
    """By how many nats a token the own line explains a reply better than OTHERS other lines do: the mean over replies.

    Pointwise mutual information under the bare base: log p(reply | line), less the log of the mean of p(reply | other
    line) (Li et al. 2016, arXiv:1510.03055, with the marginal estimated from the other lines).
    """
    values = []
    for n, (reply, _) in enumerate(talk.lines):
        if not reply.strip():
            values.append(0.0)
            continue
        asked = [LINES[n], *(LINES[(n + 1 + k) % len(LINES)] for k in range(OTHERS))]
        examples = [Example(({"role": "user", "content": line},), reply, "talk.json", n + 1) for line in asked]
        own, *others = row_losses(base, encode(tokenizer, examples, 1024, "<|im_end|>"), batch_size=len(asked))
        least = min(loss.text for loss in others)
        marginal = math.log(sum(math.exp(least - loss.text) for loss in others) / len(others)) - least
        values.append((-own.text - marginal) / max(own.tokens, 1))
    return counted(sum(values) / len(values), len(values), bootstrap(values, [1.0] * len(values)))


def records(adapter: Talk, base: Talk) -> dict[str, Any]:
    """Every line and turn with both replies, as metrics.json keeps them for the readers."""
    pairs = zip(LINES, adapter.lines, base.lines, strict=False)
    talks = zip(TALKS, adapter.talks, base.talks, strict=False)
    return {
        "talk_lines": [{"line": line, "reply": reply, "base_reply": other} for line, (reply, _), (other, _) in pairs],
        "talks": [
            [{"line": line, "reply": a, "base_reply": b} for line, a, b in zip(lines, hers, bases, strict=True)]
            for lines, hers, bases in talks
        ],
    }


def loop_rate(replies: Sequence[str]) -> dict[str, float]:
    """The share of replies that loop."""
    return share([loops(reply) for reply in replies])
