"""A page around a scripted engine in a process of its own: `flood` and `api` start it, and ask it how it is.

python -m benchmarks.torture.page_worker LETTERS_PER_SECOND

It prints its address; then, for each line on standard input, its state as JSON.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import app
from chat.checkpoints import locate
from chat.engine import BASE_ONLY, PROMPT_TOKENS, Chunk, Usage, check_adapters
from chat.gguf_tokenizer import GgufTokenizer
from chat.prompt import trim
from chat.sampling import Sampling
from page import service

SLOTS = 32
LETTERS = 40  # of a reply
FIRST_SPECIAL = 151643  # Qwen2.5's ids from here on are its control tokens
START, END = 151644, 151645  # <|im_start|>, <|im_end|>


def reply(question: str) -> str:
    """What is answered: the question's first letters again and again, so that a crossed reply is noticed."""
    return (question[:16] * LETTERS)[:LETTERS]


class ScriptedEngine:
    """Replies at a given pace, and looks at each prompt as the real tokenizer makes it."""

    base, adapters, refused, ready, health = "scripted", ("scripted", BASE_ONLY), (), True, "ok"
    num_slots = max_num_seqs = SLOTS
    temperature = 0.7

    def __init__(self, letters_per_second: float) -> None:
        self.pause = 1 / letters_per_second if letters_per_second else 0.0
        self.tokenizer = GgufTokenizer(locate("small", gguf=True).path)
        self.running = self.asked = self.escaped = 0
        self.lock = threading.Lock()

    def wait(self) -> None:
        """It is ready."""

    def digest(self, adapter: str) -> str:
        """None."""
        return ""

    def stream(self, messages: Any, adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
               continue_final_message: bool = False) -> Iterator[Chunk]:  # fmt: skip
        """The reply to the last question, by one adapter after the other."""
        check_adapters(adapters, self.adapters)
        kept, ids = trim(self.tokenizer, messages, PROMPT_TOKENS, continue_final_message)
        with self.lock:
            self.asked += 1
            self.running += 1
            self.escaped += not self._is_closed(ids, len(kept), continue_final_message)
        try:
            question = next(each["content"] for each in reversed(messages) if each["role"] == "user")
            for row in range(len(adapters)):
                began, text = time.perf_counter(), reply(question)
                for n, letter in enumerate(text, start=1):
                    time.sleep(max(0.0, began + n * self.pause - time.perf_counter()))
                    yield Chunk(letter, row)
                yield Chunk("", row, Usage("stop", len(text), 0.0, time.perf_counter() - began))
        finally:
            with self.lock:
                self.running -= 1

    @staticmethod
    def _is_closed(ids: Sequence[int], messages: int, continued: bool) -> bool:
        """Whether the control tokens are those of the template alone: nobody opened or ended a message of his own.

        There are the system prompt and the messages; the last one is her opening, or the message that is continued.
        """
        special = [token for token in ids if token >= FIRST_SPECIAL]
        ends = messages + 1 - continued
        return special.count(START) == ends + 1 and special.count(END) == ends and len(special) == 2 * ends + 1


def main() -> None:
    """Open the page, print its address, and tell its state whenever a line comes."""
    engine = ScriptedEngine(float(sys.argv[1]))
    services: list[service.ChatService] = []
    make = service.ChatService.__init__

    def kept(self: service.ChatService, *given: Any) -> None:
        make(self, *given)
        services.append(self)

    service.ChatService.__init__ = kept  # type: ignore[method-assign,assignment]
    page = app.build_page(engine)  # type: ignore[arg-type]
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_threads=3 * SLOTS + 40, **app.LAUNCH)
    print(url, flush=True)
    for _ in sys.stdin:
        state = {
            "running": engine.running, "asked": engine.asked, "escaped": engine.escaped,
            "tickets": len(services[0].queue._tickets), "threads": threading.active_count(),
        }  # fmt: skip
        print(json.dumps(state), flush=True)


if __name__ == "__main__":
    main()
