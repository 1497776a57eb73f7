"""Whether the decoder says what `generate` says: greedy replies, token for token, on real weights.

python -m benchmarks.greedy [--base small] [--prompts 200] [--tokens 32]

Questions of our own dialogues; every second one is answered with the first adapter that fits the base, the others by
the base alone. Both sides multiply in the base's own precision, but add up in another order: where the two likeliest
tokens lie within that, they may part. Each such token is printed with the distance of the two scores under `generate`.
"""

import argparse
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import RepetitionPenaltyLogitsProcessor

from benchmarks import results
from chat import base_model, convert
from chat.adapter import find
from chat.checkpoints import locate
from chat.prompt import prompt_ids
from chat.sampling import Sampling
from chat.scheduler import Request, Scheduler
from qwen2.decoder import Decoder
from training import data

NUM_SLOTS = 8


def loaded(base: str) -> tuple[Any, Any, str]:
    """The model with the first adapter that fits it, its tokenizer, and the adapter's name."""
    checkpoint = convert.ensure_converted(locate(base))
    adapter = find(checkpoint)[0][0]
    model = base_model.load_base(checkpoint)
    adapted = PeftModel.from_pretrained(model, adapter.folder, adapter.name, autocast_adapter_dtype=False)
    return adapted.eval(), base_model.load_tokenizer(checkpoint), adapter.name


def questions(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of so many prompts, some of them long chats."""
    drawn = random.Random(0).sample(data.load(("dataset",)), count)
    return [prompt_ids(tokenizer, example.messages) for example in drawn]


def decoded(model: Any, name: str, asked: Sequence[list[int]], sampling: Sampling, ends: Sequence[int]) -> list[Any]:
    """What the decoder says to each, in company."""
    scheduler = Scheduler(Decoder(model, [name], NUM_SLOTS, 2560), ThreadPoolExecutor(1))
    requests = [
        Request(ids, n % 2 - 1, sampling, threading.Event(), lambda token: token in ends, 600.0)
        for n, ids in enumerate(asked)
    ]
    for request in requests:
        scheduler.submit(request)
    for request in tqdm(requests, desc="decoder"):
        request.usage.result()
    return [request.output_ids for request in requests]


@torch.inference_mode()
def generated(model: Any, ids: list[int], alone: bool, config: Any) -> list[int]:
    """What `generate` says; by the base alone, or with the adapter."""
    given = torch.tensor([ids], device=model.device)
    (model.base_model.disable_adapter_layers if alone else model.base_model.enable_adapter_layers)()
    out = model.generate(input_ids=given, attention_mask=torch.ones_like(given), generation_config=config)
    output_ids: list[int] = out[0, len(ids) :].tolist()
    return output_ids


@torch.inference_mode()
def distance(model: Any, ids: list[int], one: int, other: int, penalty: float) -> float:
    """By how much the scores of two next tokens differ."""
    given = torch.tensor([ids], device=model.device)
    logits = model(given).logits[:, -1].float()
    scores = RepetitionPenaltyLogitsProcessor(penalty)(given, logits)[0]
    return float((scores[one] - scores[other]).abs())


def main() -> None:
    """Compare, and print the count and each difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.greedy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="small")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()
    model, tokenizer, name = loaded(chosen.base)
    asked = questions(tokenizer, chosen.prompts)
    sampling = Sampling(max_new_tokens=chosen.tokens, temperature=0.0)
    replies = decoded(model, name, asked, sampling, base_model.ends(tokenizer))
    config = base_model.generation_config(tokenizer, sampling)
    same = 0
    for n, (ids, reply) in enumerate(zip(tqdm(asked, desc="generate"), replies, strict=True)):
        expected = generated(model, ids, n % 2 == 0, config)
        same += reply == expected
        if reply != expected:
            at = next(k for k, pair in enumerate(zip(reply, expected, strict=False)) if pair[0] != pair[1])
            apart = distance(model, ids + reply[:at], reply[at], expected[at], sampling.repetition_penalty)
            print(f"prompt {n}, token {at}: scores {apart:.4f} apart", flush=True)
    print(f"{results.machine()}, {model.dtype}: {same} of {len(asked)} replies are the same", flush=True)


if __name__ == "__main__":
    main()
