"""Turns to prompt ids, a reply to learned ids, and trimming: the one path for training and chat."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from chat.persona import Message, converse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from chat.gguf_tokenizer import GgufTokenizer

    ChatTokenizer = PreTrainedTokenizerFast | GgufTokenizer


def prompt_ids(tokenizer: "ChatTokenizer", turns: Sequence[Message], go_on: bool = False) -> list[int]:
    """Token ids of the system prompt, the turns and the opening of her reply, by the base's own template.

    With `go_on` the last turn, hers or the visitor's, is left open instead: what comes next continues it. Shape: one
    flat list. Raises ValueError when a reply is wanted and the last turn is not the visitor's.
    """
    if go_on and turns:
        text = str(tokenizer.apply_chat_template(messages(turns), tokenize=False))
        return _encode(tokenizer, [text[: text.rindex(str(tokenizer.eos_token))]])[0]
    return all_prompt_ids(tokenizer, [turns])[0]


def all_prompt_ids(tokenizer: "ChatTokenizer", conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """The same for many conversations that want a reply: together they take a third of the time. Raises alike."""
    if not all(turns and turns[-1]["role"] == "user" for turns in conversations):
        raise ValueError("A prompt must end with the visitor's turn. Add a user message at the end.")
    texts = [
        str(tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True))
        for turns in conversations
    ]
    return _encode(tokenizer, texts)


def _encode(tokenizer: "ChatTokenizer", texts: Sequence[str]) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def messages(turns: Sequence[Message]) -> list[dict[str, str]]:
    """What a template, here or on a server, is given: the system prompt, then turns that cannot open others."""
    return [{"role": turn["role"], "content": unmarked(turn["content"])} for turn in converse(turns)]


def reply_ids(tokenizer: "PreTrainedTokenizerFast", replies: Sequence[str], terminator: str) -> list[list[int]]:
    """Token ids that are learned, of each reply: its text, then the token that ends it."""
    said: list[list[int]] = tokenizer([unmarked(reply) for reply in replies], add_special_tokens=False)["input_ids"]
    end = cast("int", tokenizer.convert_tokens_to_ids(terminator))
    return [[*ids, end] for ids in said]


def unmarked(text: str) -> str:
    """Text whose `<|im_end|>` and the like stay letters, so that no visitor can open a turn of his own."""
    return text.replace("<|", "<\u200b|")


def trim(
    tokenizer: "ChatTokenizer", turns: Sequence[Message], limit: int, go_on: bool = False
) -> tuple[list[Message], list[int]]:
    """Keep the newest turns, from a question on, whose prompt is at most `limit` tokens long.

    Returns the turns kept and their prompt ids. It reads from the end, so that a forged history of any length costs
    no more than one that fits. Raises ValueError when the last question alone is too long.
    """
    questions = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    kept = list(turns[questions[-1] if questions else -1 :])
    ids = prompt_ids(tokenizer, kept, go_on)
    if len(ids) > limit:
        raise ValueError(f"The question is {len(ids)} tokens long, {limit} fit. Ask it in fewer words.")
    for start in reversed(questions[:-1]):
        longer = prompt_ids(tokenizer, turns[start:], go_on)
        if len(longer) > limit:
            break
        kept, ids = list(turns[start:]), longer
    return kept, ids
