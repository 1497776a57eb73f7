"""Messages to prompt ids, a reply to target ids, and trimming: one path for training and chat."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from chat.persona import Message, Refused, with_system_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from chat.gguf_tokenizer import GgufTokenizer

    ChatTokenizer = PreTrainedTokenizerFast | GgufTokenizer


def prompt_ids(tokenizer: "ChatTokenizer", messages: Sequence[Message],
               continue_final_message: bool = False) -> list[int]:  # fmt: skip
    """Token ids of the system prompt, the messages and the opening of her reply, by the base's own template.

    With `continue_final_message` the last message is left open instead, hers or the visitor's: what comes next
    continues it. Raises ValueError when a reply is wanted and the last message is not the visitor's.
    """
    if continue_final_message and messages:
        text = str(tokenizer.apply_chat_template(template_messages(messages), tokenize=False))
        return _encode(tokenizer, [text[: text.rindex(str(tokenizer.eos_token))]])[0]
    return all_prompt_ids(tokenizer, [messages])[0]


def all_prompt_ids(tokenizer: "ChatTokenizer", conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """The prompts of many conversations that want a reply, in a third of the time that they take one by one.

    Raises as `prompt_ids` does.
    """
    if not all(messages and messages[-1]["role"] == "user" for messages in conversations):
        raise ValueError("A prompt must end with the visitor's turn. Add a user message at the end.")
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, [str(render(template_messages(messages))) for messages in conversations])


def _encode(tokenizer: "ChatTokenizer", texts: Sequence[str]) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def template_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """What a template is given, here or on a server: the system prompt, then messages that cannot open others."""
    all_messages = with_system_prompt(messages)
    return [{"role": each["role"], "content": escape_special_tokens(each["content"])} for each in all_messages]


def reply_ids(tokenizer: "PreTrainedTokenizerFast", replies: Sequence[str], terminator: str) -> list[list[int]]:
    """The target ids of each reply: its text, then the token that ends it."""
    end = cast("int", tokenizer.convert_tokens_to_ids(terminator))
    return [[*ids, end] for ids in _encode(tokenizer, [escape_special_tokens(reply) for reply in replies])]


def escape_special_tokens(text: str) -> str:
    """Text whose `<|im_end|>` and the like stay letters, so that no visitor can open a message of his own."""
    return text.replace("<|", "<\u200b|")


def trim(tokenizer: "ChatTokenizer", messages: Sequence[Message], limit: int,
         continue_final_message: bool = False) -> tuple[list[Message], list[int]]:  # fmt: skip
    """Keep the newest messages, from a question on, whose prompt is at most `limit` tokens long.

    Returns the messages kept and their prompt ids. It tokenizes from the end, so that a forged history of any length
    costs no more than one that fits. Raises Refused when the last question alone is too long.
    """
    kept: tuple[list[Message], list[int]] | None = None
    for start in reversed([i for i, message in enumerate(messages) if message["role"] == "user"] or [-1]):
        ids = prompt_ids(tokenizer, messages[start:], continue_final_message)
        if len(ids) > limit:
            break
        kept = list(messages[start:]), ids
    if not kept:
        raise Refused(f"The question is {len(ids)} tokens long, {limit} fit. Ask it in fewer words.")
    return kept
