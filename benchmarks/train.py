"""How fast a run trains: the tutorial's script, the faithful profile and the fast one, on one machine in one call.

python -m benchmarks.train [--base 7b|small|FOLDER] [--random] [--steps 20] [--whole]
python -m benchmarks.train --curves [--base small]
python -m benchmarks.train --gpus 1 2 [--random]

The tutorial's script is written anew (padded 4 x 4, gradient checkpointing, no autocast) and, like the faithful one,
run for some steps and carried over to the whole run; with --whole the fast profile runs it all. --random takes the 7B's
architecture with random weights: as fast, and not 15 GB to fetch. --curves compares the losses of 200 steps; --gpus
spreads one step over so many GPUs (benchmarks/scale.py).
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks import models, results, scale
from benchmarks.models import WARM, Clock
from qwen2.training_step import TrainingStep
from training import trainer
from training.preflight import forecast, memory_in_use
from training.recipe import Recipe
from training.tokens import Encoded

UNITS = {
    "step_seconds": "s", "run_seconds": "s", "total_seconds": "s", "peak_gib": "GiB", "tokens_per_second": "tokens/s",
    "of_ceiling": "%", "forecast": "of the actual",
}  # fmt: skip


def tutorial(model: Any, rows: Sequence[Encoded], recipe: Recipe, work: Path, clock: Clock, tokenizer: Any) -> None:
    """As self-llm's script trains: every batch padded, layers computed twice, LoRA products in fp32."""
    model.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=1,
        learning_rate=recipe.learning_rate, gradient_checkpointing=True, save_strategy="no", logging_steps=10,
        report_to=[], remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    Trainer(
        model=model,
        args=arguments,
        train_dataset=[{**row, "attention_mask": [1] * len(row["input_ids"])} for row in trainer.as_features(rows)],  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[clock],
    ).train()


def measure(
    profile: str, chosen: argparse.Namespace, recipe: Recipe, rows: Sequence[Encoded], tokenizer: Any
) -> dict[str, Any]:
    """One row of the table."""
    steps = recipe.steps(len(rows))
    whole = profile == "fast" and chosen.whole
    part = (
        rows
        if whole
        else random.Random(0).sample(rows, min(len(rows), recipe.global_batch_size * (chosen.steps + WARM)))
    )
    recipe = replace(recipe, epochs=recipe.epochs if whole else 1, save_steps=10**9)
    model = models.build(chosen.base, chosen.random, recipe, profile)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = TrainingStep(model, recipe.max_length) if profile == "fast" else None
    expected = None if profile == "tutorial" else forecast(model, part, recipe, step)
    clock = Clock(step)
    with tempfile.TemporaryDirectory() as work:
        if profile == "tutorial":
            tutorial(model, part, recipe, Path(work), clock, tokenizer)
        else:
            trainer.train(model, part, recipe, Path(work), step=step, callbacks=[clock])
        torch.cuda.synchronize() if torch.cuda.is_available() else None
    total = time.perf_counter() - began
    a_step = clock.seconds()
    warm_up = total - a_step * (len(clock.ends) - 1)
    tokens = statistics.fmean(len(row.input_ids) for row in rows) * recipe.global_batch_size
    return {
        "profile": profile, "step_seconds": round(a_step, 4), "run_seconds": round(a_step * steps, 1),
        "total_seconds": round(warm_up + a_step * steps, 1), "peak_gib": round(memory_in_use() / 2**30, 1),
        "tokens_per_second": round(tokens / a_step), "steps_measured": len(clock.ends) - 1,
        "forecast": round(expected.seconds / (clock.ends[-1] - clock.ends[0]), 2) if expected else None,
    }  # fmt: skip


def clear() -> None:
    """Give back what a measurement held."""
    gc.collect()  # a Trainer refers to itself, and keeps its model
    torch.cuda.empty_cache()


def ceiling() -> float:
    """FLOP/s of a large bf16 product on this GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - began)


def table(chosen: argparse.Namespace, recipe: Recipe, rows: Sequence[Encoded], tokenizer: Any) -> None:
    """Measure the profiles and print them beside the floor: 4 FLOP a weight and token at the ceiling's rate."""
    lines = []
    for profile in chosen.profiles:
        lines.append(measure(profile, chosen, recipe, rows, tokenizer))
        print(lines[-1], flush=True)
        clear()
    more: dict[str, Any] = {"rows learned": len(rows), "steps": recipe.steps(len(rows)), "base": chosen.base}
    if torch.cuda.is_available():
        rate, weights = ceiling(), 7.07e9 if chosen.base == "7b" else 0.494e9
        tokens = statistics.fmean(len(row.input_ids) for row in rows) * recipe.global_batch_size
        floor = 4 * weights * tokens / rate
        for line in lines:
            line["of_ceiling"] = round(100 * floor / line["step_seconds"], 1)
        more |= {"ceiling TFLOP/s": round(rate / 1e12), "floor seconds a step": round(floor, 4)}
    name = f"train-{results.kind()}" + ("" if chosen.base == "7b" else f"-{chosen.base}")
    results.save(name, lines, UNITS, **more)
    print(results.table(name), "\n", more, flush=True)


class Redraw(TrainerCallback):
    """Other draws of the dropout, from the first step on; the order of the rows stays."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Seed anew."""
        torch.manual_seed(7)


def curves(chosen: argparse.Namespace, recipe: Recipe, rows: Sequence[Encoded]) -> None:
    """Losses of 200 steps: fast and a faithful run with other dropout, each against the faithful run."""
    recipe = replace(recipe, epochs=1, logging_steps=5, save_steps=10**9)
    losses = {}
    for name, profile, callbacks in (
        ("faithful", "faithful", []), ("faithful, other dropout", "faithful", [Redraw()]), ("fast", "fast", []),
    ):  # fmt: skip
        model = models.build(chosen.base, chosen.random, recipe, profile)
        step = TrainingStep(model, recipe.max_length) if profile == "fast" else None
        with tempfile.TemporaryDirectory() as work:
            part = rows[: 200 * recipe.global_batch_size]
            history = trainer.train(model, part, recipe, Path(work), step=step, callbacks=callbacks)
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
        print(name, "last losses", losses[name][-3:], flush=True)
    for name in ("faithful, other dropout", "fast"):
        apart = [a - b for a, b in zip(losses[name], losses["faithful"], strict=True)]
        mean, size = statistics.fmean(apart), statistics.fmean(map(abs, apart))
        print(
            f"{name}: mean difference {mean:+.4f}, mean size {size:.4f}, of losses about {losses['faithful'][-1]:.2f}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="7b" if torch.cuda.is_available() else "small")
    parser.add_argument("--random", action="store_true", help="the 7B's architecture with random weights")
    parser.add_argument("--dataset", nargs="+", help="other files than the recipe's")
    parser.add_argument("--steps", type=int, help="of a profile that is not run whole: 20, or 12 with --gpus")
    parser.add_argument("--whole", action="store_true", help="run the fast profile to its end")
    parser.add_argument("--profiles", nargs="+", default=["tutorial", "faithful", "fast"])
    parser.add_argument("--curves", action="store_true", help="compare losses, not speeds")
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs to spread one step over")
    chosen = parser.parse_args()
    if chosen.gpus:
        scale.scale(chosen)
        return
    chosen.steps = chosen.steps or 20
    recipe, tokenizer, rows = models.load(chosen)
    if chosen.curves:
        curves(chosen, recipe, rows)
    else:
        table(chosen, recipe, rows, tokenizer)


if __name__ == "__main__":
    main()
