"""One step by one GPU and by several: the stock Trainer in DistributedDataParallel (DDP), and the fast profile.

python -m benchmarks.train --gpus 1 2 [--random] [--base 7b|small|FOLDER] [--steps 12]

Each number of GPUs gets processes of its own, which call this module; the main one writes down what they measured.
Dropout is 0, so that losses can be compared: they should be those of one GPU.
"""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks import models, results
from qwen2.training_step import TrainingStep
from training import distributed, trainer
from training.preflight import memory_in_use
from training.recipe import Recipe
from training.tokens import Encoded

ROOT = Path(__file__).parent.parent
ROWS = (16, 64)  # of a step
WAYS = {"ddp": "faithful, DDP", "fast": "fast"}
UNITS = {
    "step_seconds": "s", "tokens_per_second": "tokens/s", "efficiency": "%", "peak_gib": "GiB a GPU",
    "loss_difference": "nats",
}  # fmt: skip
WARM = {"ddp": 2, "fast": 3}  # steps not counted
SLOW = 5 / 12  # of --steps are enough for the stock Trainer, a step of which takes so much longer
LOGGED = 5  # steps a logged loss of the fast profile is the mean of: to log is to wait for the GPU


def scale(chosen: argparse.Namespace) -> None:
    """Measure each number of GPUs, then print and save the table. What fails is named and left out."""
    measured = []
    for count in chosen.gpus:
        measured += _launch(count, chosen)
    rows = compare(measured)
    name = f"scale-{results.kind()}" + ("" if chosen.base == "7b" else f"-{Path(chosen.base).name}")
    results.save(name, rows, UNITS, base=chosen.base, random=chosen.random, dropout=0)
    print(results.table(name), flush=True)


def _launch(count: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """What the processes measured, as the main one wrote it down."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        words = ["-m", "benchmarks.scale", "--out", str(out), "--base", chosen.base]
        words += ["--steps", str(chosen.steps or 12), *(["--random"] if chosen.random else [])]
        words += ["--dataset", *chosen.dataset] if chosen.dataset else []
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}  # no multicast over NVLink: not every machine has it
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
        if subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, env=environment).returncode:
            print(f"{count} GPUs failed, see above.", flush=True)
        lines: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
        return lines


def compare(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: each line beside that of one GPU with as many rows a step."""
    alone = {(line["way"], line["rows"]): line for line in measured if line["gpus"] == 1}
    table = []
    for line in measured:
        one = alone.get((line["way"], line["rows"]))
        beside: dict[str, Any] = {"efficiency": None, "loss_difference": None}
        if one:
            apart = [abs(a - b) for a, b in zip(line["losses"], one["losses"], strict=True)]
            share = one["step_seconds"] / (line["gpus"] * line["step_seconds"])
            beside = {"efficiency": round(100 * share, 1), "loss_difference": round(statistics.fmean(apart), 6)}
        numbers = {name: line[name] for name in ("step_seconds", "tokens_per_second", "peak_gib")}
        table.append(
            {"gpus": line["gpus"], "method": WAYS[line["way"]], "rows a step": line["rows"], **numbers, **beside}
        )
    return table


def measure(way: str, batch: int, chosen: argparse.Namespace, recipe: Recipe, rows: Sequence[Encoded]) -> Any:
    """One line of the table. All processes take part in it, and the main one's clock counts."""
    warm, count = WARM[way], max(distributed.world_size(), 4)
    steps = warm + (chosen.steps if way == "fast" else max(1, round(chosen.steps * SLOW)))
    recipe = replace(
        recipe, dropout=0.0, epochs=1, batch_size=batch // count, gradient_accumulation_steps=count,
        save_steps=10**9, logging_steps=LOGGED if way == "fast" else 1,
    )  # fmt: skip
    drawn = itertools.cycle(random.Random(0).sample(rows, len(rows)))
    part = list(itertools.islice(drawn, batch * steps))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ends, losses = _train(way, chosen, recipe, part)
    a_step = statistics.fmean(end - begin for begin, end in itertools.pairwise(ends[warm:]))
    tokens = sum(len(row.input_ids) for row in part) / steps
    return {
        "gpus": distributed.world_size(), "way": way, "rows": batch, "step_seconds": round(a_step, 4),
        "tokens_per_second": round(tokens / a_step), "peak_gib": round(_most(memory_in_use()) / 2**30, 1),
        "losses": losses,
    }  # fmt: skip


def _train(way: str, chosen: Any, recipe: Recipe, rows: Sequence[Encoded]) -> tuple[list[float], list[float]]:
    """When training began and each step ended, and the logged losses. The fast profile runs twice: first it records."""
    set_seed(recipe.seed)  # the same random weights on each GPU
    model = models.build(chosen.base, chosen.random, recipe, "fast" if way == "fast" else "faithful")
    step = TrainingStep(model, recipe.max_length) if way == "fast" else None
    with tempfile.TemporaryDirectory() as work:
        start = Path(work) / trainer.BEST
        if step:
            trainer.save_best(model, start)
            trainer.train(model, rows, recipe, Path(work) / "recorded", step=step)
            trainer.load_best(model, start)
        clock = models.Clock()
        history = trainer.train(model, rows, recipe, Path(work) / "timed", step=step, callbacks=[clock])
    return clock.ends, [entry["loss"] for entry in history if "loss" in entry]


def _most(memory: int) -> int:
    """The memory of the process that has used most."""
    if distributed.world_size() == 1:
        return memory
    used: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(used, memory)
    return int(max(used))


def main() -> None:
    """As one of several processes: measure the given ways."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description="Called by benchmarks.train --gpus."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--dataset", nargs="+")
    parser.add_argument("--steps", type=int, required=True)
    chosen = parser.parse_args()
    distributed.use_own_gpu()
    recipe, _, rows = models.load(chosen)
    measured = []
    for way, batch in itertools.product(WAYS, ROWS):
        measured.append(measure(way, batch, chosen, recipe, rows))
        gc.collect()  # a Trainer and its callbacks hold one another, and with them the model
        torch.cuda.empty_cache()
        if distributed.is_main_process():
            print({name: value for name, value in measured[-1].items() if name != "losses"}, flush=True)
            chosen.out.write_text(json.dumps(measured), encoding="utf-8")
    if distributed.world_size() > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
