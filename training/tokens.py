"""Example to ids and labels, through the prompt that the chat uses: only the reply is learned."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chat.prompt import prompt_ids, reply_ids, trim
from training.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label transformers leaves out of the loss


@dataclass(frozen=True)
class Encoded:
    """One row: two flat lists of one length; a label is IGNORED or the id itself."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """Tokens that enter the loss, the terminator among them."""
        return sum(label != IGNORED for label in self.labels)


def encode(tokenizer: "PreTrainedTokenizerFast", example: Example, max_length: int, terminator: str) -> Encoded:
    """Ids of prompt and reply, at most `max_length`.

    A row too long loses its oldest turns first, then the end of its reply; the terminator stays. Raises ValueError
    naming file and row when the question alone leaves no room for a reply.
    """
    reply = reply_ids(tokenizer, example.answer, terminator)
    prompt = prompt_ids(tokenizer, example.turns)
    if len(prompt) + len(reply) > max_length:
        room = max(1, max_length - max(2, min(len(reply), max_length // 2)))
        try:
            _, prompt = trim(tokenizer, example.turns, room)
        except ValueError as error:
            raise ValueError(f"{example.source}, row {example.row}: {error}") from error
        reply = [*reply[:-1][: max_length - len(prompt) - 1], reply[-1]]
    return Encoded(prompt + reply, [IGNORED] * len(prompt) + reply)
