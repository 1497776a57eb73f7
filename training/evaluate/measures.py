"""Every number of metrics.json: the base and the adapter are asked the same, with the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from peft import PeftModel

from chat.bases import BASES
from chat.sampling import Sampling
from training.evaluate import long_chats, losses, scores, talk
from training.evaluate.long_chats import LONG_CHATS
from training.evaluate.probes import PROBE_SETS, Attack
from training.evaluate.replies import generate_long_chats, generate_replies
from training.evaluate.scores import BASE, SEED, share
from training.formats import Example
from training.recipe import Recipe
from training.tokens import encode


@dataclass(frozen=True)
class Side:
    """One side of the comparison, the base or the adapter: its numbers, and what it replied."""

    numbers: dict[str, Any]
    answers: dict[str, list[tuple[str, str]]]  # by PROBE_SETS: each reply, and what is wrong with it
    long_chats: list[list[str]]
    replies: list[str]  # to validation conversations
    talk: talk.Talk

    @property
    def passes(self) -> list[bool]:
        """Of every probe and attack, in their order."""
        return [not fault for answers in self.answers.values() for _, fault in answers]


def measure(
    model: PeftModel, tokenizer: Any, recipe: Recipe, learned: Sequence[Example], validation: Sequence[Example]
) -> dict[str, Any]:
    """Each number with its count, the base's under a name that ends in `_base`, and every reply of the report."""
    with model.disable_adapter():
        base = measure_side(model, tokenizer, recipe, learned, validation)
    adapter = measure_side(model, tokenizer, recipe, learned, validation)
    metrics = {f"{name}{BASE}": number for name, number in base.numbers.items()} | adapter.numbers
    if adapter.talk.lines:
        with model.disable_adapter():
            for name, side in ((BASE, base), ("", adapter)):
                metrics[f"talk_pmi{name}"] = talk.talk_pmi(model, tokenizer, side.talk)
        metrics |= talk.records(adapter.talk, base.talk)
    metrics |= losses.forgetting(model, tokenizer)
    metrics["sign_test_p"] = scores.paired(base.passes, adapter.passes)
    if adapter.replies:
        sides = {"base": base.replies, "adapter": adapter.replies, "her own": [e.answer for e in validation]}
        metrics["markers"] = {side: scores.markers(texts) for side, texts in sides.items()}
    metrics["evaluation"] = {
        "seed": SEED, "reply_tokens": recipe.reply_tokens, "temperature": page_temperature(recipe)
    }  # fmt: skip
    for name, (_, probes) in PROBE_SETS.items():
        metrics[name] = [
            {"question": probe.question, "reply": reply, "passed": not fault, "fault": fault}
            | {"base_reply": base_reply, "base_fault": base_fault}
            | ({"kind": probe.kind} if isinstance(probe, Attack) else {})
            for probe, (reply, fault), (base_reply, base_fault) in zip(
                probes, adapter.answers[name], base.answers[name], strict=True
            )
        ]
    if adapter.long_chats:
        chats = LONG_CHATS[: len(adapter.long_chats)]
        metrics["long_chats"] = [
            {"scene": chat.scene, "visitor": chat.visitor}
            | {"fault": long_chats.fault(replies), "base_fault": long_chats.fault(base_replies)}
            for chat, replies, base_replies in zip(chats, adapter.long_chats, base.long_chats, strict=True)
        ]
        # The first one in full: it was the first before anything was measured.
        first = zip(chats[0].lines, adapter.long_chats[0], base.long_chats[0], strict=True)
        metrics["long_chat"] = [{"line": line, "reply": a, "base_reply": b} for line, a, b in first]
    return metrics


def page_temperature(recipe: Recipe) -> float:
    """The temperature that the page chooses for the recipe's base."""
    return BASES[recipe.base].temperature if recipe.base in BASES else Sampling.temperature


def measure_side(
    model: Any, tokenizer: Any, recipe: Recipe, learned: Sequence[Example], validation: Sequence[Example]
) -> Side:
    """Measure the model as it stands. What there are no rows for is left out."""
    sampling = Sampling(temperature=page_temperature(recipe), max_new_tokens=recipe.reply_tokens, seed=SEED)
    numbers: dict[str, Any] = {}
    if validation:
        rows = encode(tokenizer, validation, recipe.max_length, recipe.terminator, recipe.end_cut_replies)
        numbers |= losses.validation_metrics(model, rows, validation)
    if pairs := losses.swap_pairs(validation):
        numbers |= losses.swap_margin(model, tokenizer, pairs, recipe)
    answers = {}
    for name, (rate, probes) in PROBE_SETS.items():
        questions: list[Any] = [[{"role": "user", "content": probe.question}] for probe in probes]
        replies = generate_replies(model, tokenizer, questions, sampling)
        answers[name] = [(text, probe.fault(text)) for probe, (text, _) in zip(probes, replies, strict=True)]
        numbers[rate] = share([not fault for _, fault in answers[name]])
    if chats := generate_long_chats(model, tokenizer, LONG_CHATS[: recipe.long_chats], sampling):
        numbers["long_chat_pass_rate"] = share([not long_chats.fault(replies) for replies in chats])
    # Validation conversations, again from the first where there are too few.
    examples = list(islice(cycle(validation), recipe.probe_replies))
    drawn = list(generate_replies(model, tokenizer, [example.messages for example in examples], sampling))
    texts = [text for text, _ in drawn]
    if drawn:
        numbers |= scores.style(drawn)
        numbers |= scores.likeness(texts, [e.answer for e in examples], [e.answer for e in learned])
    everyday = talk.generate_talk(model, tokenizer, recipe.talk_lines, sampling.temperature)
    if everyday.lines:
        numbers |= talk.talk_metrics(everyday) | {"loop_rate": talk.loop_rate([*texts, *everyday.replies])}
    return Side(numbers, answers, chats, texts, everyday)
