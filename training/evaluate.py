"""Base against adapter: losses, probes, attacks, long chats, and how replies end and sound.

python -m training.evaluate adapters/pocket [--base small] measures and writes the numbers, report, plots and card.
"""

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from chat.adapter import CARD, METRICS, PART, ROOT
from chat.engine import PROMPT_TOKENS, Sampling
from chat.local import PAD, ends, generation_config
from chat.persona import Message, staged
from chat.prompt import reply_ids, trim
from training import chats, scores
from training.chats import CHATS, Chat
from training.data import FULL_FILE, Example
from training.probes import ATTACKS, CANON, NEUTRAL, PROBES, Attack, Probe
from training.recipe import Recipe
from training.scores import bootstrap, counted, share
from training.tokens import IGNORED, Encoded, encode
from training.trainer import flatten

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

SEED = 20_240_601
SWAPS = 200  # prompts for the swap margin, where so many script rows are held out
BASE = "_base"  # ends the name of a number that is the base's


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
def row_losses(model: Any, rows: Sequence[Encoded], batch: int = 16) -> list[Loss]:
    """The loss of each row under the model as it stands, whatever the batch."""
    was_training = model.training
    model.eval()
    losses = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        flat = {name: value.to(model.device) for name, value in flatten(part).items()}
        labels = flat.pop("labels")[0, 1:]
        logits = model(**flat, use_cache=False).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").double().cpu()
        nll = torch.cat([nll.new_zeros(1), nll])  # nothing foretells the first token
        for row, its in zip(part, nll.split([len(row.input_ids) for row in part]), strict=True):
            losses.append(Loss(its[:-1].sum().item(), row.learned - 1, its[-1].item(), 1))
    model.train(was_training)
    return losses


def total(losses: Sequence[Loss]) -> Loss:
    """Losses of rows as one, summed over tokens: Trainer's eval_loss averages batches."""
    columns = ([getattr(loss, name) for loss in losses] for name in ("text", "tokens", "terminator", "rows"))
    return Loss(*map(sum, columns))


def heldout_loss(model: Any, rows: Sequence[Encoded], batch: int = 16) -> Loss:
    """Loss of the rows together under the model as it stands."""
    return total(row_losses(model, rows, batch))


def heldout(model: Any, rows: Sequence[Encoded], held_out: Sequence[Example]) -> dict[str, Any]:
    """Loss of the held-out rows, of the script's and of our own apart, and of the terminator; nats per token."""
    losses = row_losses(model, rows)
    whole = total(losses)
    numbers = {
        "heldout_loss": _per_token(losses),
        "heldout_terminator": counted(whole.per_terminator, whole.rows),
    }
    for name, scripted in (("heldout_loss_script", True), ("heldout_loss_ours", False)):
        part = [loss for loss, e in zip(losses, held_out, strict=True) if (e.source == FULL_FILE.name) is scripted]
        numbers |= {name: _per_token(part)} if part else {}
    return numbers


def _per_token(losses: Sequence[Loss]) -> dict[str, float]:
    whole = total(losses)
    interval = bootstrap([loss.text for loss in losses], [loss.tokens for loss in losses], SEED)
    return counted(whole.per_token, whole.tokens, interval)


def swaps(held_out: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Her replies of the held-out script, each beside the same prompt with another's line of nearly the same length.

    The other's line is one that was spoken to her: a question of another row.
    """
    script = [example for example in held_out if example.source == FULL_FILE.name][:SWAPS]
    order, pairs = random.Random(SEED), []
    for hers in script:
        lines = [e.question for e in script if e.question not in (hers.question, hers.answer)]
        order.shuffle(lines)  # among lines of one length, chance decides
        if lines:
            other = min(lines, key=lambda line, hers=hers: abs(len(line) - len(hers.answer)))  # type: ignore[misc]
            pairs.append((hers, replace(hers, answer=other)))
    return pairs


def swap_margin(model: Any, tokenizer: Any, pairs: Sequence[tuple[Example, Example]], recipe: Recipe) -> dict[str, Any]:
    """By how many nats per token her own replies are likelier than the others' lines: the mean over prompts."""
    hers, others = (
        row_losses(model, encode(tokenizer, side, recipe.max_length, recipe.terminator))
        for side in zip(*pairs, strict=True)
    )
    margins = [other.per_token - own.per_token for own, other in zip(hers, others, strict=True)]
    interval = bootstrap(margins, [1.0] * len(margins), SEED)
    return {"swap_margin": counted(sum(margins) / len(margins), len(margins), interval)}


def neutral(tokenizer: Any) -> list[Encoded]:
    """The neutral sentences as a base reads text: no prompt, no template, all of it in the loss but the first token."""
    ids = reply_ids(tokenizer, NEUTRAL, PAD)
    return [Encoded(row, [IGNORED, *row[1:]]) for row in ids]


def forgetting(model: "PeftModel", tokenizer: Any) -> dict[str, Any]:
    """Loss of the neutral sentences, and by how many nats per token the adapter raises it."""
    rows = neutral(tokenizer)
    with model.disable_adapter():
        before = row_losses(model, rows)
    after = row_losses(model, rows)
    rises = [a.text - b.text for a, b in zip(after, before, strict=True)]
    tokens = [loss.tokens for loss in after]
    return {
        f"neutral_loss{BASE}": _per_token(before),
        "neutral_loss": _per_token(after),
        "forgetting": counted(sum(rises) / sum(tokens), sum(tokens), bootstrap(rises, tokens, SEED)),
    }


@torch.inference_mode()
def replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[Sequence[Message]],
    sampling: Sampling,
    batch: int = 100,
) -> Iterator[tuple[str, bool]]:
    """Her reply to each conversation, and whether she ended it herself. Trimmed as on the page, padded on the left."""
    torch.manual_seed(SEED if sampling.seed is None else sampling.seed)
    was_training = model.training
    model.eval()
    config = generation_config(tokenizer, sampling)
    config.max_time = None  # a batch takes as long as it takes
    stop = torch.tensor(ends(tokenizer))
    for start in tqdm(range(0, len(asked), batch), desc="replies", unit="batch", disable=len(asked) <= batch):
        prompts = [trim(tokenizer, turns, PROMPT_TOKENS)[1] for turns in asked[start : start + batch]]
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


def talk(model: Any, tokenizer: Any, scripts: Sequence[Chat], sampling: Sampling) -> list[list[str]]:
    """Her replies in each chat, all chats together turn by turn; turn n, counted from 0, has the seed SEED + n."""
    told: list[list[Message]] = [[] for _ in scripts]
    for n in range(len(scripts[0].lines) if scripts else 0):
        for turns, chat in zip(told, scripts, strict=True):
            turns.append({"role": "user", "content": chat.lines[n]})
        asked = [staged(turns, chat.scene, chat.visitor) for turns, chat in zip(told, scripts, strict=True)]
        said = replies(model, tokenizer, asked, replace(sampling, seed=SEED + n))
        for turns, (text, _) in zip(told, said, strict=True):
            turns.append({"role": "assistant", "content": text})
    return [[turn["content"] for turn in turns if turn["role"] == "assistant"] for turns in told]


# What is asked of both sides → the number it gives.
ASKED: dict[str, tuple[str, Sequence[Probe | Attack]]] = {
    "identity_probes": ("identity_pass_rate", PROBES),
    "canon_probes": ("canon_pass_rate", CANON),
    "attacks": ("attack_pass_rate", ATTACKS),
}


@dataclass(frozen=True)
class Side:
    """One side of the comparison, the base or the adapter: its numbers, and what it said."""

    numbers: dict[str, Any]
    probed: dict[str, list[tuple[str, str]]]  # as ASKED: each reply, and what is wrong with it
    talks: list[list[str]]
    drawn: list[str]  # replies to held-out conversations

    @property
    def passes(self) -> list[bool]:
        """Of every probe and attack, in their order."""
        return [not fault for answers in self.probed.values() for _, fault in answers]


def listen(model: Any, tokenizer: Any, recipe: Recipe, learned: Sequence[Example], held_out: Sequence[Example]) -> Side:
    """Measure the model as it stands. What there are no rows for is left out."""
    sampling = Sampling(max_new_tokens=recipe.reply_tokens, seed=SEED)
    numbers: dict[str, Any] = {}
    if held_out:
        rows = encode(tokenizer, held_out, recipe.max_length, recipe.terminator)
        numbers |= heldout(model, rows, held_out)
    if pairs := swaps(held_out):
        numbers |= swap_margin(model, tokenizer, pairs, recipe)
    probed = {}
    for what, (number, probes) in ASKED.items():
        said = replies(model, tokenizer, [[{"role": "user", "content": p.question}] for p in probes], sampling)
        probed[what] = [(text, probe.fault(text)) for probe, (text, _) in zip(probes, said, strict=True)]
        numbers[number] = share([not fault for _, fault in probed[what]])
    talks = talk(model, tokenizer, CHATS[: recipe.long_chats], sampling)
    numbers |= {"long_chat_pass_rate": share([not chats.fault(said) for said in talks])} if talks else {}
    # held-out conversations, again from the first where there are too few
    asked = [held_out[i % len(held_out)] for i in range(recipe.probe_replies if held_out else 0)]
    drawn = list(replies(model, tokenizer, [e.turns for e in asked], sampling))
    texts = [text for text, _ in drawn]
    if drawn:
        numbers |= scores.style(drawn)
        numbers |= scores.likeness(texts, [e.answer for e in asked], [e.answer for e in learned])
    return Side(numbers, probed, talks, texts)


def measure(
    model: "PeftModel", tokenizer: Any, recipe: Recipe, learned: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    """Every number of metrics.json, each with its count, and every reply that the report shows.

    The base answers the same prompts with the same seeds; its numbers end in `_base`.
    """
    with model.disable_adapter():
        base = listen(model, tokenizer, recipe, learned, held_out)
    worn = listen(model, tokenizer, recipe, learned, held_out)
    metrics = {f"{name}{BASE}": number for name, number in base.numbers.items()} | worn.numbers
    metrics |= forgetting(model, tokenizer)
    metrics["sign_test_p"] = scores.paired(base.passes, worn.passes)
    if worn.drawn:
        hers = [example.answer for example in held_out]
        sides = {"base": base.drawn, "adapter": worn.drawn, "her own": hers}
        metrics["markers"] = {side: scores.markers(texts) for side, texts in sides.items()}
    metrics["evaluation"] = {"seed": SEED, "reply_tokens": recipe.reply_tokens}
    return metrics | _answers(base, worn) | _talks(base, worn)


def _answers(base: Side, worn: Side) -> dict[str, Any]:
    """Each probe and attack with both replies and verdicts, under the names of ASKED."""
    return {
        what: [
            {"question": probe.question, "reply": reply, "passed": not fault, "fault": fault}
            | {"base_reply": base_reply, "base_fault": base_fault}
            | ({"kind": probe.kind} if isinstance(probe, Attack) else {})
            for probe, (reply, fault), (base_reply, base_fault) in zip(
                probes, worn.probed[what], base.probed[what], strict=True
            )
        ]
        for what, (_, probes) in ASKED.items()
    }


def _talks(base: Side, worn: Side) -> dict[str, Any]:
    """The verdict on each long chat, and the first one in full: it was the first before anything was measured."""
    both = list(zip(CHATS, worn.talks, base.talks, strict=False))  # a recipe may ask for the first few only
    if not both:
        return {}
    first, hers, bases = both[0]
    return {
        "long_chats": [
            {"scene": chat.scene, "visitor": chat.visitor, "fault": chats.fault(a), "base_fault": chats.fault(b)}
            for chat, a, b in both
        ],
        "long_chat": [
            {"line": line, "reply": a, "base_reply": b} for line, a, b in zip(first.lines, hers, bases, strict=True)
        ],
    }


def again(folder: Path, base: str | None = None, drawn: int | None = None) -> dict[str, Any]:
    """Measure an adapter folder as its own run did, and write numbers, report, plots and card; `drawn` replies.

    What the run alone knows (its curve, data, seconds) is kept. Raises ValueError, OSError or Unavailable.
    """
    from training import card
    from training.run import device, reopen

    model, tokenizer, recipe, learned, held_out = reopen(folder, base)
    recipe = recipe if drawn is None else replace(recipe, probe_replies=drawn)
    metrics = measure(model, tokenizer, recipe, learned, held_out)
    metrics["evaluation"] |= {"date": date.today().isoformat(), "device": device()}
    whole = json.loads((folder / METRICS).read_text(encoding="utf-8")) | metrics
    part = folder / (METRICS + PART)
    part.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / METRICS)
    card.write(folder)
    if folder.parent.resolve() == ROOT:
        (ROOT / CARD).write_text(card.ledger(ROOT), encoding="utf-8")
    return metrics


def main() -> None:
    """Evaluate adapter folders again; print their numbers and write their files."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="adapters/NAME")
    parser.add_argument("--base", help="by default the one its recipe names")
    parser.add_argument("--replies", type=int, help="to draw for stop rate, chrF, copies; by default as its recipe")
    chosen = parser.parse_args()
    for folder in chosen.folders:
        try:
            metrics = again(folder, chosen.base, chosen.replies)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(str(error))
        numbers = {name: n for name, n in metrics.items() if isinstance(n, dict) and "count" in n}
        print(json.dumps({folder.name: numbers}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
