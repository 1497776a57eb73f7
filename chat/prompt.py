"""Turns to prompt ids, a reply to learned ids, and trimming: the one path for training and chat."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from chat.persona import Message, converse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Message]) -> list[int]:
    """Token ids of the system prompt, the turns and the opening of her reply, by the base's own template.

    Shape: one flat list. Raises ValueError when the last turn is not the visitor's.
    """
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("A prompt must end with the visitor's turn. Add a user message at the end.")
    messages = [{"role": m["role"], "content": unmarked(m["content"])} for m in converse(turns)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return cast("list[int]", ids)


def reply_ids(tokenizer: "PreTrainedTokenizerFast", reply: str, terminator: str) -> list[int]:
    """Token ids that are learned: the reply, then the token that ends it."""
    ids: list[int] = tokenizer(unmarked(reply), add_special_tokens=False)["input_ids"]
    return [*ids, cast("int", tokenizer.convert_tokens_to_ids(terminator))]


def unmarked(text: str) -> str:
    """Text whose `<|im_end|>` and the like stay letters, so that no visitor can open a turn of his own."""
    return text.replace("<|", "<\u200b|")


def trim(tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Message], limit: int) -> tuple[list[Message], list[int]]:
    """Drop the oldest turns, a question with its reply, until the prompt is at most `limit` tokens long.

    Returns the turns kept and their prompt ids. Raises ValueError when the last question alone is too long.
    """
    kept = list(turns)
    ids = prompt_ids(tokenizer, kept)
    while len(ids) > limit:
        starts = [i for i, m in enumerate(kept) if m["role"] == "user" and i > 0]
        if not starts:
            raise ValueError(f"The question is {len(ids)} tokens long, {limit} fit. Ask it in fewer words.")
        kept = kept[starts[0] :]
        ids = prompt_ids(tokenizer, kept)
    return kept, ids
