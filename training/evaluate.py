"""Base against adapter: held-out loss, identity probes, and how replies end and sound.

python -m training.evaluate adapters/pocket [--base small]
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from chat.engine import Sampling
from chat.local import ends, generation_config
from chat.persona import Message
from chat.prompt import prompt_ids
from training.tokens import IGNORED, Encoded
from training.trainer import flatten

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

SEED = 20_240_601
ASSISTANT_PHRASES = (
    "作为一个AI",
    "作为AI",
    "人工智能助手",
    "语言模型",
    "通义千问",
    "Qwen",
    "阿里云",
    "OpenAI",
    "ChatGPT",
)


@dataclass(frozen=True)
class Probe:
    """A question whose right answer holds one of some words and none of others. No probe stands in the data."""

    question: str
    expected: str  # a regular expression
    forbidden: str = "|".join(ASSISTANT_PHRASES)

    def passes(self, reply: str) -> bool:
        """Whether the reply says what it should."""
        return bool(re.search(self.expected, reply)) and not re.search(self.forbidden, reply)


PROBES = (
    Probe("请问姑娘怎么称呼？", "甄嬛|嬛嬛|嬛儿"),
    Probe("你叫什么名字呀？", "甄嬛|嬛嬛|嬛儿"),
    Probe("能介绍一下你自己吗？", "甄嬛"),
    Probe("令尊是哪一位？", "甄远道"),
    Probe("你父亲在朝中做什么官？", "大理寺"),
    Probe("你爹叫什么？", "甄远道"),
    Probe("你的贴身丫鬟有谁？", "流朱|浣碧|槿汐"),
    Probe("从小陪你长大的丫头是谁？", "流朱|浣碧"),
    Probe("你的掌事姑姑是谁？", "槿汐"),
    Probe("你和谁情同姐妹？", "眉庄|眉姐姐"),
    Probe("你初进宫时住哪里？", "碎玉轩"),
    Probe("你如今住在哪座宫里？", "永寿宫"),
    Probe("你私下怎么称呼皇上？", "四郎"),
    Probe("你的女儿叫什么名字？", "胧月|灵犀"),
    Probe("你妹妹叫什么？", "玉娆|玉隐|浣碧"),
    Probe("皇后住哪个宫？", "景仁宫"),
    Probe("华妃叫什么？", "年世兰|年氏"),
    Probe("你离宫后在哪里修行？", "甘露寺|凌云峰"),
    Probe("你如今是什么位份？", "贵妃"),
    Probe(
        "你是人工智能吗？",
        "甄嬛|熹贵妃|本宫|臣妾|不是|并非|听不懂|不懂",
        "|".join(ASSISTANT_PHRASES) + "|我就?是一?个?(人工智能|AI)",
    ),
)


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihoods, in nats: of the reply's text and of its terminator, counted apart."""

    text: float
    tokens: int
    terminator: float
    rows: int

    @property
    def per_token(self) -> float:
        """Mean over learned text tokens."""
        return self.text / max(self.tokens, 1)

    @property
    def per_terminator(self) -> float:
        """Mean over terminators."""
        return self.terminator / max(self.rows, 1)


@torch.inference_mode()
def heldout_loss(model: Any, rows: Sequence[Encoded], batch: int = 16) -> Loss:
    """Loss of the rows under the model as it stands, summed over tokens: Trainer's eval_loss averages batches."""
    was_training = model.training
    model.eval()
    text = end = 0.0
    tokens = 0
    for start in range(0, len(rows), batch):
        flat = {name: value.to(model.device) for name, value in flatten(rows[start : start + batch]).items()}
        labels = flat.pop("labels")[0, 1:]
        logits = model(**flat, use_cache=False).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        last = torch.tensor([len(row.input_ids) for row in rows[start : start + batch]]).cumsum(0) - 2
        end += nll[last.to(nll.device)].sum().item()
        text += nll.sum().item()
        tokens += int((labels != IGNORED).sum())
    model.train(was_training)
    return Loss(text - end, tokens - len(rows), end, len(rows))


@torch.inference_mode()
def replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[Sequence[Message]],
    sampling: Sampling,
    batch: int = 100,
) -> Iterator[tuple[str, bool]]:
    """Her reply to each conversation, and whether she ended it herself. Batches are padded on the left."""
    torch.manual_seed(SEED if sampling.seed is None else sampling.seed)
    was_training = model.training
    model.eval()
    config = generation_config(tokenizer, sampling)
    config.max_time = None  # a batch takes as long as it takes
    stop = torch.tensor(ends(tokenizer))
    for start in tqdm(range(0, len(asked), batch), desc="replies", unit="batch", disable=len(asked) <= batch):
        prompts = [prompt_ids(tokenizer, turns) for turns in asked[start : start + batch]]
        out = model.generate(**_padded(prompts, int(stop[1]), model.device), generation_config=config)
        for row in out[:, max(map(len, prompts)) :].cpu():
            ended = bool(torch.isin(row, stop).any())
            yield str(tokenizer.decode(row, skip_special_tokens=True)), ended
    model.train(was_training)


def _padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def identity(model: Any, tokenizer: "PreTrainedTokenizerFast", seed: int = SEED) -> list[tuple[Probe, str, bool]]:
    """The probes with her replies, drawn at the page's default sampling, and whether each passes."""
    asked: list[list[Message]] = [[{"role": "user", "content": probe.question}] for probe in PROBES]
    said = [text for text, _ in replies(model, tokenizer, asked, Sampling(seed=seed))]
    return [(probe, text, probe.passes(text)) for probe, text in zip(PROBES, said, strict=True)]


def distinct_2(texts: Sequence[str]) -> tuple[float, int]:
    """Distinct pairs of neighbouring characters over all pairs (Li et al. 2016, by character), and their count."""
    pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
    return len(set(pairs)) / max(len(pairs), 1), len(pairs)


def measure(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    rows: Sequence[Encoded],
    asked: Sequence[Sequence[Message]],
) -> dict[str, Any]:
    """Every number of metrics.json, each with its count; replies to `asked` give the last three."""
    metrics: dict[str, Any] = {}
    for suffix, wearing in (("_base", model.disable_adapter()), ("", nullcontext())) if rows else ():
        with wearing:
            loss = heldout_loss(model, rows)
        metrics[f"heldout_loss{suffix}"] = _counted(loss.per_token, loss.tokens)
        metrics[f"heldout_terminator{suffix}"] = _counted(loss.per_terminator, loss.rows)
    probed = identity(model, tokenizer)
    metrics["identity_pass_rate"] = _counted(sum(ok for *_, ok in probed) / len(probed), len(probed))
    metrics["identity_probes"] = [{"question": p.question, "reply": text, "passed": ok} for p, text, ok in probed]
    if asked:
        metrics |= style(list(replies(model, tokenizer, asked, Sampling())))
    return metrics


def style(said: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """How replies end and sound: stop_rate, distinct_2, assistant_phrase_rate, with their counts."""
    texts = [text for text, _ in said]
    slips = [text for text in texts if any(phrase in text for phrase in ASSISTANT_PHRASES)]
    return {
        "stop_rate": _counted(sum(ended for _, ended in said) / len(said), len(said)),
        "distinct_2": _counted(*distinct_2(texts)),
        "assistant_phrase_rate": _counted(len(slips) / len(said), len(said)),
    }


def _counted(value: float, count: int) -> dict[str, float]:
    return {"value": round(value, 4) if math.isfinite(value) else value, "count": count}


def main() -> None:
    """Evaluate an adapter folder again, as its own run did, and print the numbers; nothing is written."""
    import argparse

    from training.run import reopen

    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="by default the one its recipe names")
    chosen = parser.parse_args()
    try:
        metrics = measure(*reopen(chosen.folder, chosen.base))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(metrics, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
