"""Replies and losses to numbers, each with its count: plain arithmetic, no model."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu import CHRF

from training.evaluate.probes import ASSISTANT_PHRASES

SEED = 20_240_601  # of every draw and resample
BASE = "_base"  # ends the name of a number that is the base's
RESAMPLES = 2000  # of rows, for an interval
COPY = 8  # characters from which a reply that stands in the data is a copy: 嗯 and 谢皇上 are anybody's
# How she speaks of herself and of whom; in pinyin on the plot, for matplotlib brings no Chinese letters.
MARKERS = {
    "本宫": "běngōng", "臣妾": "chénqiè", "我": "wǒ", "皇上": "huángshang", "娘娘": "niángniang", "姐姐": "jiějie",
    "便": "biàn", "罢": "bà", "倒": "dào", "您": "nín",
}  # fmt: skip


def counted(value: float, count: int, interval: tuple[float, float] | None = None) -> dict[str, float]:
    """A number as metrics.json holds it, to four decimals; `low` and `high` bound it with 95 % confidence."""
    bounds = {"low": round(interval[0], 4), "high": round(interval[1], 4)} if interval else {}
    return {"value": round(value, 4), "count": count, **bounds}


def share(passed: Sequence[bool]) -> dict[str, float]:
    """How many of how many, as a number from 0 to 1."""
    return counted(sum(passed) / max(len(passed), 1), len(passed))


def bootstrap(sums: Sequence[float], weights: Sequence[float], seed: int = SEED) -> tuple[float, float]:
    """The middle 95 % of sum(sums) / sum(weights) over resampled rows (Efron's percentiles)."""
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    ratios = np.array(sums)[drawn].sum(1) / np.array(weights)[drawn].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of so uneven a split if either side were as likely: the exact binomial. Ties are left out before."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / float(2**n))


def paired(base: Sequence[bool], adapter: Sequence[bool]) -> dict[str, float]:
    """p of the sign test over pairs that differ, and how many do."""
    better = sum(a and not b for a, b in zip(adapter, base, strict=True))
    worse = sum(b and not a for a, b in zip(adapter, base, strict=True))
    return counted(sign_test(better, worse), better + worse)


def distinct(texts: Sequence[str], n: int) -> dict[str, float]:
    """The share of distinct runs of `n` neighbouring characters over all texts (Li et al. 2016, by character)."""
    runs = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return counted(len(set(runs)) / max(len(runs), 1), len(runs))


def style(replies: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """How replies end and sound, from each reply and whether she ended it herself."""
    texts = [text for text, _ in replies]
    return {
        "stop_rate": share([ended for _, ended in replies]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "assistant_phrase_rate": share([any(phrase in text for phrase in ASSISTANT_PHRASES) for text in texts]),
    }


def likeness(texts: Sequence[str], references: Sequence[str], learned: Sequence[str]) -> dict[str, Any]:
    """How near replies come to what stands in the data: chrF (0 to 100), their length, and copies of `learned`."""
    answers = "\n".join(learned)
    long = [text.strip() for text in texts if len(text.strip()) >= COPY]
    return {
        "chrf": counted(CHRF().corpus_score(list(texts), [list(references)]).score, len(texts)),
        "length_ratio": counted(sum(map(len, texts)) / max(sum(map(len, references)), 1), len(texts)),
        "copy_rate": share([text in answers for text in long]),
    }


def markers(texts: Sequence[str]) -> dict[str, float]:
    """The share of texts that hold each marker."""
    return {marker: share([marker in text for text in texts])["value"] for marker in MARKERS}
