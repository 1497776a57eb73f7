"""Speed of the chat on this machine: time to first token and tokens a second, adapter on against base alone.

python -m benchmarks.cpu_chat [--base small] [--tokens 64] [--rounds 5]

Short Chinese turns through LocalEngine, greedy. The two are asked by turns in one process, so that a busy machine
slows both alike; the ratio is of medians. The limit is memory bandwidth: each token reads every weight once.
"""

import argparse
import statistics
import threading
import time
from typing import cast

import torch

from chat.engine import BASE_ONLY, Cost, Sampling
from chat.local import LocalEngine, load
from chat.persona import OPENERS, Message


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_chat", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="small")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    began = time.perf_counter()
    engine = cast(LocalEngine, load(chosen.base).wait())
    print(f"{engine.base}: loaded in {time.perf_counter() - began:.1f} s, {torch.get_num_threads()} threads")
    costs = measure(engine, chosen.tokens, chosen.rounds)
    table(engine, costs)


def measure(engine: LocalEngine, tokens: int, rounds: int) -> dict[str, list[Cost]]:
    """What each reply cost, by adapter; the first round warms up and is not counted."""
    costs: dict[str, list[Cost]] = {BASE_ONLY: [], engine.adapters[0]: []}
    sampling = Sampling(temperature=0, max_new_tokens=tokens)
    for turn in range(rounds + 1):
        for adapter, kept in costs.items():
            cost = ask(engine, OPENERS[turn % len(OPENERS)], adapter, sampling)
            if turn:
                kept.append(cost)
    return costs


def ask(engine: LocalEngine, question: str, adapter: str, sampling: Sampling) -> Cost:
    """The cost of one reply to one short question, a new conversation each."""
    turns: list[Message] = [{"role": "user", "content": question}]
    *_, last = engine.stream(turns, adapter, sampling, threading.Event())
    assert last.cost is not None
    return last.cost


def bandwidth() -> float:
    """Bytes a second at which all threads read memory: a sum over 1 GB, the best of five."""
    block = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.numel() * block.element_size() / min(times)


def table(engine: LocalEngine, costs: dict[str, list[Cost]]) -> None:
    """Print medians, the ratio to the base, and how far the memory would let us go."""
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    limit = bandwidth() / weights
    plain = _speed(costs[BASE_ONLY])
    print("| answering | first token, s | tokens/s | ratio to base | of the limit |\n|---|---|---|---|---|")
    for adapter, some in costs.items():
        first = statistics.median(cost.first_token for cost in some)
        speed = _speed(some)
        print(f"| {adapter} | {first:.2f} | {speed:.1f} | {speed / plain:.2f} | {speed / limit:.0%} |")
    print(f"limit: {limit * weights / 1e9:.1f} GB/s read over {weights / 1e9:.2f} GB of weights = {limit:.1f} tokens/s")


def _speed(costs: list[Cost]) -> float:
    return statistics.median(cost.tokens_per_second for cost in costs if cost.tokens > 1)


if __name__ == "__main__":
    main()
