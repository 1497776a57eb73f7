"""Losses of a model as it stands: of validation rows, of her lines against another's, of neutral text. All in nats."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from chat.base_model import PAD
from chat.prompt import reply_ids
from qwen2 import IGNORE_INDEX
from training.data import FULL_FILE
from training.evaluate.probes import NEUTRAL
from training.evaluate.scores import BASE, SEED, bootstrap, counted
from training.formats import Example
from training.recipe import Recipe
from training.tokens import Encoded, encode
from training.trainer import flatten

SWAPS = 200  # prompts for the swap margin, where the validation rows hold so many of the script


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihoods, in nats: of the reply's text and of its terminator, counted apart."""

    text: float
    tokens: int
    terminator: float
    rows: int

    @property
    def per_token(self) -> float:
        return self.text / max(self.tokens, 1)

    @property
    def per_terminator(self) -> float:
        return self.terminator / max(self.rows, 1)


@torch.inference_mode()
def row_losses(model: Any, rows: Sequence[Encoded], batch_size: int = 16) -> list[Loss]:
    """The loss of each row; `batch_size` rows share a forward pass, which changes no result."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
        flat = {name: value.to(model.device) for name, value in flatten(batch).items()}
        labels = flat.pop("labels")[0, 1:]
        logits = model(**flat, use_cache=False).logits[0, :-1].float()
        nll = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none").double().cpu()
        nll = torch.cat([nll.new_zeros(1), nll])  # the first token has no prediction
        for row, of_row in zip(batch, nll.split([len(row.input_ids) for row in batch]), strict=True):
            ends = int(row.ends)  # a reply that was cut has no terminator
            text = of_row[: len(of_row) - ends].sum().item()
            losses.append(Loss(text, row.learned - ends, of_row[-1].item() * ends, ends))
    model.train(was_training)
    return losses


def total(losses: Sequence[Loss]) -> Loss:
    """Losses of rows as one, summed over tokens: Trainer's eval_loss averages batches."""
    columns = ([getattr(loss, name) for loss in losses] for name in ("text", "tokens", "terminator", "rows"))
    return Loss(*map(sum, columns))


def validation_loss(model: Any, rows: Sequence[Encoded], batch_size: int = 16) -> Loss:
    """Loss of the rows together."""
    return total(row_losses(model, rows, batch_size))


def validation_metrics(model: Any, rows: Sequence[Encoded], examples: Sequence[Example]) -> dict[str, Any]:
    """Loss per token of the validation rows, of the script's and of our own apart, and of the terminator."""
    losses = row_losses(model, rows)
    whole = total(losses)
    numbers = {"heldout_loss": _per_token(losses), "heldout_terminator": counted(whole.per_terminator, whole.rows)}
    for name, of_script in (("heldout_loss_script", True), ("heldout_loss_ours", False)):
        part = [loss for loss, e in zip(losses, examples, strict=True) if (e.source == FULL_FILE.name) is of_script]
        numbers |= {name: _per_token(part)} if part else {}
    return numbers


def _per_token(losses: Sequence[Loss]) -> dict[str, float]:
    whole = total(losses)
    interval = bootstrap([loss.text for loss in losses], [loss.tokens for loss in losses])
    return counted(whole.per_token, whole.tokens, interval)


def swap_pairs(examples: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Her replies of the script, each beside the same prompt with another's line of nearly the same length.

    The other's line is one that was spoken to her: a question of another row.
    """
    script = [e for e in examples if e.source == FULL_FILE.name][:SWAPS]
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
        encode(tokenizer, side, recipe.max_length, recipe.terminator, recipe.end_cut_replies)
        for side in zip(*pairs, strict=True)
    )
    losses = zip(row_losses(model, hers), row_losses(model, others), strict=True)
    margins = [other.per_token - own.per_token for own, other in losses]
    interval = bootstrap(margins, [1.0] * len(margins))
    return {"swap_margin": counted(sum(margins) / len(margins), len(margins), interval)}


def encode_neutral(tokenizer: Any) -> list[Encoded]:
    """The neutral sentences as a base reads text: no prompt, no template, all of it in the loss but the first token."""
    return [Encoded(ids, [IGNORE_INDEX, *ids[1:]]) for ids in reply_ids(tokenizer, NEUTRAL, PAD)]


def forgetting(model: PeftModel, tokenizer: Any) -> dict[str, Any]:
    """Loss of the neutral sentences, and by how many nats per token the adapter raises it."""
    rows = encode_neutral(tokenizer)
    with model.disable_adapter():
        before = row_losses(model, rows)
    after = row_losses(model, rows)
    rises = [a.text - b.text for a, b in zip(after, before, strict=True)]
    tokens = [loss.tokens for loss in after]
    return {
        f"neutral_loss{BASE}": _per_token(before),
        "neutral_loss": _per_token(after),
        "forgetting": counted(sum(rises) / sum(tokens), sum(tokens), bootstrap(rises, tokens)),
    }
