"""How fast the chat answers: transformers' `generate` as the tutorial calls it, and ours, base and adapter.

python -m benchmarks.serve [--cpu] [--base small] [--rounds 8] [--tokens 48]

All engines are in one process and asked in turn, so that a busy machine slows all alike; ratios are medians of those
within a round. Greedy, without an end, a new question each round; the tenth turn of a chat follows nine that the same
engine has read. A GPU is measured by `benchmarks.decode`, with its flags, unless --cpu leaves it alone.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks import results
from chat import local
from chat.adapter import Adapter, find
from chat.base import Located, locate
from chat.engine import BASE_ONLY, Sampling
from chat.local import LocalEngine
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids

UNITS = {
    "tokens_per_second": "tokens/s", "first_token_ms": "ms", "tenth_turn_ms": "ms", "switch_ms": "ms",
    "faster": "times the tutorial", "sooner": "times the tutorial, new question",
}  # fmt: skip
QUESTION = (
    "{opener}今日是第{n}回来请安，外头下着小雨，路上遇见了几位姐妹，说起从前在王府的旧事，"
    "不知娘娘还记不记得那年冬天的梅花？"
)
REPLY = "难为你还记着。那年的梅花开得极好，只是如今想来，也不过是旧日光景了。"


class Clock(BaseStreamer):
    """When the prompt was handed over and when each token came; a batch's tokens come together."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def first_token_ms(self) -> float:
        """From the prompt to the first token."""
        return 1000 * (self.times[1] - self.times[0])

    @property
    def tokens_per_second(self) -> float:
        """After the first token."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


@dataclass(frozen=True)
class Engine:
    """What can be timed: put on an adapter by name, or BASE_ONLY; answer ids of shape (rows, n) as `generate` does."""

    wear: Callable[[str], None]
    generate: Callable[..., Any]


def tutorial(located: Located, adapters: list[Adapter]) -> Engine:
    """As self-llm's notebook answers: the base by transformers, the adapter by PEFT, `generate`; fp32 on a CPU."""
    from peft import PeftModel

    base: Any = local.load_base(located)
    if not adapters:
        return Engine(lambda _: None, base.generate)
    model: Any = PeftModel.from_pretrained(base, adapters[0].folder, adapters[0].name).eval()

    def wear(name: str) -> None:
        model.base_model.disable_adapter_layers() if name == BASE_ONLY else model.base_model.enable_adapter_layers()

    return Engine(wear, model.generate)


def ours(located: Located, adapters: list[Adapter]) -> Engine:
    """The engine of the page, its model asked as it asks it."""
    model: Any = LocalEngine(located, adapters).model
    return Engine(model.set_adapter, model.generate)


ENGINES: dict[str, Callable[[Located, list[Adapter]], Engine]] = {"tutorial": tutorial, "ours": ours}


@torch.inference_mode()
def answer(engine: Engine, tokenizer: Any, turns: list[Message], tokens: int) -> Clock:
    """Time one greedy answer of so many tokens."""
    ids = torch.tensor([prompt_ids(tokenizer, turns)])
    config = local.generation_config(tokenizer, Sampling(temperature=0, max_new_tokens=tokens))
    config.eos_token_id = [10**9]  # never drawn
    clock = Clock()
    engine.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[],
        streamer=clock,
    )  # fmt: skip
    return clock


def question(n: int) -> Message:
    """A question nobody asked before, of some sixty tokens with the turn around it."""
    return {"role": "user", "content": QUESTION.format(opener=OPENERS[n % len(OPENERS)], n=n)}


def chat(start: int) -> Iterator[list[Message]]:
    """The ninth turn of a chat, then its tenth."""
    turns: list[Message] = []
    for n in range(10):
        turns.append(question(start + n))
        if n >= 8:
            yield list(turns)
        turns.append({"role": "assistant", "content": REPLY})


def one_round(engine: Engine, tokenizer: Any, name: str, other: str, n: int, tokens: int) -> dict[str, float]:
    """Switch to an adapter, ask a new question, and the tenth turn of a chat."""
    engine.wear(other)
    began = time.perf_counter()
    engine.wear(name)
    switch = 1000 * (time.perf_counter() - began)
    fresh = answer(engine, tokenizer, [question(n)], tokens)
    ninth, tenth = chat(n)
    answer(engine, tokenizer, ninth, 1)
    return {
        "tokens_per_second": fresh.tokens_per_second, "first_token_ms": fresh.first_token_ms,
        "tenth_turn_ms": answer(engine, tokenizer, tenth, 1).first_token_ms, "switch_ms": switch,
    }  # fmt: skip


def measure(
    engines: dict[str, Engine], tokenizer: Any, names: list[str], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """A row for each engine and each of the names that it wears; the first round warms up and is not counted."""
    seen: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for n in range(rounds + 1):
        for name, other in zip(names, names[::-1], strict=True):
            for engine in engines:
                taken = one_round(engines[engine], tokenizer, name, other, 100 * n, tokens)
                seen[engine, name] += [taken] if n else []
    return [row(engine, name, taken, seen["tutorial", name]) for (engine, name), taken in seen.items()]


def row(engine: str, name: str, taken: list[dict[str, float]], tutorials: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the medians of what the tutorial's `generate` took in the same round, over these."""
    medians = {key: round(statistics.median(one[key] for one in taken), 3) for key in taken[0]}
    pairs = list(zip(taken, tutorials, strict=True))
    faster = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    sooner = statistics.median(b["first_token_ms"] / a["first_token_ms"] for a, b in pairs)
    return {
        "engine": engine, "batch": 1, "adapters": name, **medians, "faster": round(faster, 2),
        "sooner": round(sooner, 2),
    }  # fmt: skip


def on_cpu(picked: argparse.Namespace) -> None:
    """Measure on the CPU, keep the rows and print the table."""
    located = local.dense(locate(picked.base))
    adapters = find(located)[0][:1]
    tokenizer = local.load_tokenizer(located)
    engines = {name: make(located, adapters) for name, make in ENGINES.items()}
    names = [BASE_ONLY, *(adapter.name for adapter in adapters)]
    rows = measure(engines, tokenizer, names, picked.rounds, picked.tokens)
    prompt = len(prompt_ids(tokenizer, [question(100)]))
    name = "serve-cpu" + ("" if picked.base == "small" else f"-{Path(picked.base).name}")
    results.save(name, rows, UNITS, base=located.base.name, rounds=picked.rounds, prompt_tokens=prompt)
    print(results.table(name))


def main() -> None:
    """Measure what this machine has."""
    if "--cpu" in sys.argv:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch asks for one
    elif torch.cuda.is_available():
        from benchmarks import decode

        decode.main()
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    parser.add_argument("--base", default="small")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="of each reply")
    picked = parser.parse_args()
    on_cpu(picked)


if __name__ == "__main__":
    main()
