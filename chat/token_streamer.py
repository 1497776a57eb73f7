"""TokenStreamer: the tokens of replies under way as chunks of text."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from chat.base_model import ends
from chat.engine import Chunk, Chunks, Usage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


class TokenStreamer(BaseStreamer):
    """Turns each new token into text at once; a character of several tokens waits for its last.

    `generate` calls `put` with a token for each of the `rows`, the scheduler calls `add` with one token of one row.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", rows: Sequence[int], chunks: Chunks) -> None:
        self.tokenizer, self.ends, self.chunks = tokenizer.backend_tokenizer, ends(tokenizer), chunks
        self.decoders = {row: DecodeStream(skip_special_tokens=True) for row in rows}
        self.num_tokens = dict.fromkeys(rows, 0)
        self.ended: set[int] = set()
        self.prompt_seen = False
        self.first_token = 0.0  # when it came, by time.perf_counter

    def put(self, value: "Tensor") -> None:
        """Take the prompt, then a token for each row, (rows,); rows that have ended are padded from then on."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.first_token = self.first_token or time.perf_counter()
        for row, token in zip(self.decoders, value.flatten().tolist(), strict=True):
            if row not in self.ended:
                self.add(row, token)

    def add(self, row: int, token: int) -> bool:
        """Take a token of one row; return whether it ends the row's reply."""
        self.num_tokens[row] += 1
        if token in self.ends:
            self.ended.add(row)
        if text := self.decoders[row].step(self.tokenizer, token):
            self.chunks.put(Chunk(text, row))
        return row in self.ended

    def end(self) -> None:
        """`generate` calls this last; there is no text left to put into the queue."""

    def usage(self, row: int, started: float, max_new_tokens: int, cancel: threading.Event) -> Usage:
        """Why the reply of a row ended, and what it took since `started`."""
        now, tokens = time.perf_counter(), self.num_tokens[row]
        return Usage(
            "stop" if row in self.ended
            else "cancelled" if cancel.is_set()
            else "length" if tokens >= max_new_tokens
            else "time",
            tokens, (self.first_token or now) - started, now - started,
        )  # fmt: skip
