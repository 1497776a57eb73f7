"""Example to ids and labels, through the prompt that the chat uses: only the reply is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chat.prompt import all_prompt_ids, reply_ids, trim
from qwen2 import IGNORE_INDEX
from training.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Encoded:
    """One row: two flat lists of one length; a label is IGNORE_INDEX or the id itself."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """Target tokens: those that enter the loss, the terminator among them."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode(
    tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], max_length: int, terminator: str
) -> list[Encoded]:
    """Ids of prompt and reply of each example, at most `max_length`.

    A row too long loses its oldest messages first, then the end of its reply; the terminator stays. Raises ValueError
    naming file and row when the question alone leaves no room for a reply.
    """
    if not examples:
        return []
    prompts = all_prompt_ids(tokenizer, [example.messages for example in examples])
    replies = reply_ids(tokenizer, [example.answer for example in examples], terminator)
    rows = []
    for example, prompt, reply in zip(examples, prompts, replies, strict=True):
        if len(prompt) + len(reply) > max_length:
            room = max(1, max_length - max(2, min(len(reply), max_length // 2)))
            try:
                _, prompt = trim(tokenizer, example.messages, room)
            except ValueError as error:
                raise ValueError(f"{example.source}, row {example.row}: {error}") from error
            reply = [*reply[:-1][: max_length - len(prompt) - 1], reply[-1]]
        rows.append(Encoded(prompt + reply, [IGNORE_INDEX] * len(prompt) + reply))
    return rows
