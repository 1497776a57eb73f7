"""What the 7B takes in 16, 8 and 4 bits: memory and speed of the chat and of training, an adapter on it.

python -m benchmarks.bits [--base 7b|FOLDER] [--random] [--bits 16 8 4] [--steps 6]

Chat: a question of 60 tokens answered by `generate`, as the page does in fewer bits than 16, then the longest prompt
that the page takes; GB are the peak of what tensors took. Training: some steps of the faithful profile, the tutorial's
recipe. --random writes the 7B's architecture with random weights to a temporary folder first, 15 GB.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from benchmarks import models, results, train
from benchmarks.decode import a_prompt, generated
from chat import base_model, convert
from chat.checkpoints import locate
from chat.engine import PROMPT_TOKENS
from training import data
from training.recipe import HUANHUAN
from training.tokens import encode
from training.trainer import attach

UNITS = {
    "weights_gb": "GB", "load_seconds": "s", "tokens_per_second": "tokens/s", "first_token_ms": "ms", "chat_gb": "GB",
    "step_seconds": "s", "run_seconds": "s", "training_gb": "GB", "forecast": "of the actual",
}  # fmt: skip


def write_random_base(folder: Path) -> None:
    """The files of a base with the 7B's architecture, random weights, and the small base's tokenizer."""
    with torch.device(base_model.best_device()):
        model = Qwen2ForCausalLM._from_config(models.ARCHITECTURE, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    base_model.load_tokenizer(convert.ensure_converted(locate("small"))).save_pretrained(folder)


def chat(base: str, bits: int) -> dict[str, Any]:
    """Load the base and answer with a fresh adapter on it."""
    began = time.perf_counter()
    model: Any = base_model.load_base(convert.ensure_converted(locate(base)), bits=bits)
    seconds = time.perf_counter() - began
    weights = torch.cuda.memory_allocated()
    model = attach(model, replace(HUANHUAN, gradient_checkpointing=False)).eval()
    row: dict[str, Any] = {"bits": bits, "weights_gb": round(weights / 1e9, 2), "load_seconds": round(seconds, 1)}
    row |= generated(model, 48)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.tensor([a_prompt(PROMPT_TOKENS, 2)], device=model.device)
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return row | {"chat_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def training(base: str, bits: int, steps: int) -> dict[str, Any]:
    """Some steps of the tutorial's recipe, carried over to the whole run."""
    chosen = argparse.Namespace(base=base, random=False, steps=steps, whole=False)
    recipe = replace(HUANHUAN, bits=bits)
    tokenizer = base_model.load_tokenizer(convert.ensure_converted(locate(base)))
    rows = encode(tokenizer, data.load(recipe.dataset), recipe.max_length, recipe.terminator)
    taken = train.measure("faithful", chosen, recipe, rows, tokenizer)
    peak = round(taken["peak_gib"] * 2**30 / 1e9, 1)
    return {name: taken[name] for name in ("step_seconds", "run_seconds", "forecast")} | {"training_gb": peak}


def measure(base: str, arguments: argparse.Namespace) -> None:
    """A row for each number of bits, kept as soon as it is known."""
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        row = chat(base, bits)
        train.clear()
        rows.append(row | training(base, bits, arguments.steps))
        train.clear()
        print(rows[-1], flush=True)
        results.save(f"bits-{results.kind()}", rows, UNITS, base=arguments.base, prompt_tokens=PROMPT_TOKENS)
    print(results.table(f"bits-{results.kind()}"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="7b")
    parser.add_argument("--random", action="store_true", help="the 7B's architecture with random weights")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--steps", type=int, default=6, help="of training")
    arguments = parser.parse_args()
    if arguments.random:
        with tempfile.TemporaryDirectory() as folder:
            write_random_base(Path(folder))
            measure(folder, arguments)
    else:
        measure(arguments.base, arguments)


if __name__ == "__main__":
    main()
