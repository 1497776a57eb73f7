"""How fast a GPU answers: the tutorial's `generate`, transformers' static compile, and the decoder, against memory.

python -m benchmarks.decode [--base 7b|small|FOLDER] [--random] [--compile] [--tokens 100]

All in one process. A question has 60 tokens; speed is counted after the first token, for all conversations together.
The ceiling is what this GPU's memory allows one conversation: each token reads all weights once. --random takes the
7B's architecture with random weights, as fast and not 15 GB to fetch; --compile adds transformers' own compile, a
minute of warm-up.
"""

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks import models, results
from chat.sampling import Sampling
from chat.scheduler import Request, Scheduler
from qwen2.decoder import Decoder
from training.recipe import HUANHUAN

UNITS = {"tokens_per_second": "tokens/s", "first_token_ms": "ms", "tenth_turn_ms": "ms", "switch_ms": "ms",
         "of_ceiling": "%"}  # fmt: skip
QUESTION, CHAT = 60, 900  # tokens of a first question, and of a chat before its tenth
ADAPTERS = ("one", "two", "three", "four")


def model_with_adapters(base: str, random_weights: bool) -> Any:
    """The base with four adapters that change something, in its own precision."""
    model = models.build(base, random_weights, HUANHUAN, "fast").eval()
    for name in ADAPTERS:
        model.add_adapter(name, model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data, dtype=torch.bfloat16) * 0.01
    model.set_adapter("default")
    return model


def now() -> float:
    """The time at which the GPU is done with all it was asked."""
    torch.cuda.synchronize()
    return time.perf_counter()


def a_prompt(tokens: int, seed: int) -> list[int]:
    """Token ids nobody asked before."""
    drawn = random.Random(seed)
    return [drawn.randrange(150_000) for _ in range(tokens)]


@torch.inference_mode()
def generated(model: Any, tokens: int, **more: Any) -> dict[str, float]:
    """One conversation through `generate`."""
    ids = torch.tensor([a_prompt(QUESTION, 1)], device=model.device)
    common = {"attention_mask": torch.ones_like(ids), "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
              "repetition_penalty": 1.05, "eos_token_id": None, "pad_token_id": 0, **more}  # fmt: skip
    for _ in range(2):  # as long as what is measured: another length is another cache, and compiled anew
        model.generate(ids, max_new_tokens=tokens, **common)
    began = now()
    model.generate(ids, max_new_tokens=1, **common)
    first = now()
    model.generate(ids, max_new_tokens=tokens, **common)
    return {
        "tokens_per_second": round((tokens - 1) / (now() - first - (first - began)), 1),
        "first_token_ms": round(1000 * (first - began), 1),
    }


class Visitors:
    """Conversations through the scheduler, as the page has them."""

    def __init__(self, decoder: Decoder) -> None:
        self.scheduler = Scheduler(decoder, ThreadPoolExecutor(1))

    def ask(self, ids: list[int], lora_id: int, tokens: int, seed: int = 0) -> Request:
        """Begin a reply of so many tokens."""
        sampling = Sampling(max_new_tokens=tokens, seed=seed)
        request = Request(ids, lora_id, sampling, threading.Event(), lambda token: False, 600.0)
        self.scheduler.submit(request)
        return request

    def first_ms(self, ids: list[int], lora_id: int) -> float:
        """Milliseconds to the first token."""
        return 1000 * self.ask(ids, lora_id, 1).usage.result().first_token

    def together(self, count: int, adapters: int, tokens: int) -> float:
        """Tokens a second of so many conversations, with so many adapters or none in turn."""
        lora_ids = [n % (adapters + 1) - 1 for n in range(count)] if count > 1 else [0]
        asked = [self.ask(a_prompt(QUESTION, n), lora_id, tokens, n) for n, lora_id in enumerate(lora_ids)]
        usages = [request.usage.result() for request in asked]
        start = max(request.started + usage.first_token for request, usage in zip(asked, usages, strict=True))
        end = max(request.started + usage.seconds for request, usage in zip(asked, usages, strict=True))
        return count * (tokens - 1) / (end - start)


def ours(visitors: Visitors, count: int, adapters: int, tokens: int) -> dict[str, Any]:
    """One row: the medians of three."""
    visitors.together(count, adapters, 8)
    row: dict[str, Any] = {"engine": "ours", "batch": count, "adapters": adapters}
    speeds = [visitors.together(count, adapters, tokens) for _ in range(3)]
    row["tokens_per_second"] = round(statistics.median(speeds), 1)
    if count > 1:
        return row
    fresh, tenth, same, other = [], [], [], []
    for n in range(5):
        fresh.append(visitors.first_ms(a_prompt(QUESTION, 100 + n), 0))
        chat = a_prompt(CHAT, 200 + n)
        visitors.first_ms(chat, 0)
        tenth.append(visitors.first_ms(chat + a_prompt(QUESTION, 300 + n), 0))
        same.append(visitors.first_ms(a_prompt(QUESTION, 400 + n), 0))
        other.append(visitors.first_ms(a_prompt(QUESTION, 500 + n), 1 + n % 3))
    row |= {"first_token_ms": round(statistics.median(fresh), 1), "tenth_turn_ms": round(statistics.median(tenth), 1)}
    return row | {"switch_ms": round(statistics.median(other) - statistics.median(same), 2)}


def same_alone(visitors: Visitors, count: int, tokens: int) -> int:
    """How many of so many mixed replies are, token for token, what each is alone."""
    lora_ids = [n % 5 - 1 for n in range(count)]
    prompts = [a_prompt(20 + 7 * n, 600 + n) for n in range(count)]
    together = [visitors.ask(ids, lora, tokens, n) for n, (ids, lora) in enumerate(zip(prompts, lora_ids, strict=True))]
    for request in together:
        request.usage.result()
    same = 0
    for n, (ids, lora_id) in enumerate(zip(prompts, lora_ids, strict=True)):
        alone = visitors.ask(ids, lora_id, tokens, n)
        alone.usage.result()
        same += alone.output_ids == together[n].output_ids
    return same


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    a, b = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    b.copy_(a)
    began = now()
    for _ in range(10):
        b.copy_(a)
    return 10 * 2 * 2**31 / (now() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="7b")
    parser.add_argument("--random", action="store_true", help="the 7B's architecture with random weights")
    parser.add_argument("--compile", action="store_true", help="transformers' static cache and compile, too")
    parser.add_argument("--tokens", type=int, default=100, help="of each reply")
    chosen = parser.parse_args()
    model = model_with_adapters(chosen.base, chosen.random)
    read = sum(p.numel() * p.element_size() for name, p in model.named_parameters()
               if "lora_" not in name and "embed_tokens" not in name)  # fmt: skip
    rate = bandwidth()
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any], **more: Any) -> None:
        """Print and keep what is known so far."""
        if row["batch"] == 1:
            row["of_ceiling"] = round(100 * row["tokens_per_second"] * read / rate, 1)
        rows.append(row)
        print(row, flush=True)
        results.save(name, rows, UNITS, base=chosen.base, **{"TB/s": round(rate / 1e12, 2)}, **more)

    name = f"serve-{results.kind()}"
    note({"engine": "tutorial's generate", "batch": 1, "adapters": 1, **generated(model, 24)})
    began = now()
    visitors = Visitors(Decoder(model, ADAPTERS, 32, 2560))
    for _ in visitors.scheduler.decoder.capture_graphs():
        pass
    warm_up = now() - began
    for count, adapters in ((1, 1), (8, 1), (8, 4), (32, 1), (32, 4)):
        note(ours(visitors, count, adapters, chosen.tokens))
    more: dict[str, Any] = {"ceiling tokens/s": round(rate / read, 1), "warm-up s": round(warm_up, 1)}
    more["replies alone as in company"] = f"{same_alone(visitors, 32, 40)} of 32"
    more["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if chosen.compile:
        compiled = generated(model, chosen.tokens, cache_implementation="static")
        note({"engine": "static compile", "batch": 1, "adapters": 1, **compiled}, **more)
    else:
        results.save(name, rows, UNITS, base=chosen.base, **{"TB/s": round(rate / 1e12, 2)}, **more)
    print(results.table(name), "\n", more, flush=True)


if __name__ == "__main__":
    main()
