"""Preflight checks: folders and settings first, then what is checked, shown and forecast before step 1."""

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from chat.adapter import METRICS, RECIPE, check_name
from chat.base_model import require_bits
from chat.prompt import all_prompt_ids
from qwen2 import IGNORE_INDEX, supported
from qwen2.training_step import TrainingStep, batch_shape, collate, dropout_seed, num_target_tokens
from training import distributed
from training.data import Example
from training.fast_trainer import collate_fast
from training.recipe import Recipe, Run
from training.tokens import Encoded
from training.trainer import as_features, count_trainable, flatten

BIN = 32  # tokens, of the histogram
DRAWN = 100  # batches, of which the middle one is timed and the largest shows the memory
TIMED = 3  # rehearsals, after the largest batch has warmed up
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of a loss, computed in two ways; in bf16 0.2 % were measured
ADAM_BYTES = 8  # two fp32 moments a parameter


def prepare_folders(job: Run, output: Path, work: Path) -> None:
    """Refuse early what would be lost or mixed up later, and note the recipe beside its checkpoints.

    Raises ValueError or FileExistsError: a sentence with the remedy.
    """
    check_name(output.name)
    require_bits(job.recipe.bits)
    distributed.require_ddp()
    noted = work / RECIPE
    if job.resume:
        if not noted.exists():
            raise ValueError(f"{work} holds no run to resume. Start without --resume.")
        begun = Recipe.read(noted)
        if changed := [f.name for f in fields(Recipe) if getattr(begun, f.name) != getattr(job.recipe, f.name)]:
            raise ValueError(f"{work} was started with another {', '.join(changed)}. Give the same values to resume.")
        return
    if any(work.glob("checkpoint-*")):
        raise FileExistsError(
            f"{work} holds checkpoints of an earlier run. Add --resume, or delete it, or name another --work."
        )
    if output.exists() and not (output / METRICS).exists():
        raise FileExistsError(f"{output} exists and is no adapter of ours. Name another --output.")
    work.mkdir(parents=True, exist_ok=True)
    if distributed.writes_files(job.save_on_each_node):
        job.recipe.write(noted)


def choose_profile(job: Run, config: Any = None) -> str:
    """faithful or fast, once more when the base's config is known.

    Raises ValueError where fast was asked for and cannot be had, or a step cannot be shared.
    """
    recipe = job.recipe
    can_train = supported.can_train(recipe.layers, recipe.rank, recipe.dora, recipe.bits)
    unsupported = supported.unsupported(config) if config else ""
    if job.profile == "fast" and not can_train:
        raise ValueError(f"The fast profile adapts {supported.CAN_TRAIN}. Leave --profile out.")
    if job.profile == "fast" and unsupported:
        raise ValueError(f"The fast profile cannot train this base: {unsupported}. Leave --profile out.")
    auto = "fast" if can_train and not unsupported and supported.gpu_supported() else "faithful"
    profile = auto if job.profile == "auto" else job.profile
    if profile == "faithful":
        distributed.gradient_accumulation_steps(recipe)
    return profile


@dataclass(frozen=True)
class Forecast:
    """What a run will take, by a rehearsal on its own batches."""

    steps: int
    tokens: float
    seconds: float
    memory: int  # bytes: of the GPU, else of this process

    def __str__(self) -> str:
        duration = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.1f} min"
        return f"{self.steps} steps, {self.tokens:,.0f} tokens, {duration}, {self.memory / 1e9:.1f} GB"


def show_row(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> str:
    """One row decoded: the part that is only read, the part that is learned, and the terminator by name."""
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    read = row.input_ids[: len(row.input_ids) - len(learned)]
    return (
        f"read    ({len(read)} tokens)  {tokenizer.decode(read)!r}\n"
        f"learned ({len(learned)} tokens)  {tokenizer.decode(learned[:-1])!r}\n"
        f"ends on {tokenizer.convert_ids_to_tokens(learned[-1])} ({learned[-1]})"
    )


def check_parity(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], rows: Sequence[Encoded]) -> str:
    """Every row must begin with the ids that the chat would send, and learn nothing of them. Raises ValueError."""
    whole = 0
    sent = all_prompt_ids(tokenizer, [example.messages for example in examples])
    for example, row, served in zip(examples, rows, sent, strict=True):
        if row.input_ids[: len(served)] != served:
            continue  # trimmed to fit: its prompt is a shorter one
        whole += 1
        if row.labels[: len(served)] != [IGNORE_INDEX] * len(served) or row.labels[len(served)] == IGNORE_INDEX:
            raise ValueError(f"{example.source}, row {example.row}: the mask does not start at the reply. Report this.")
    if whole < 0.9 * len(rows):
        raise ValueError(f"Only {whole} of {len(rows)} rows begin as the chat would. Raise --max-length.")
    return f"{whole:,} of {len(rows):,} rows begin with exactly the ids the chat sends; the rest were trimmed to fit"


@torch.inference_mode()
def check_isolation(model: Any, rows: Sequence[Encoded]) -> str:
    """Packed logits must equal each row's own. Raises ValueError when rows see one another.

    The relative error is compared with that of rows that do leak, so that the check is seen to be able to fail.
    """
    model.eval()
    flat = {name: value.to(model.device) for name, value in flatten(rows).items() if name != "labels"}

    def logits(input_ids: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return model(input_ids=input_ids, **kwargs, use_cache=False).logits[0].float()

    alone = torch.cat([logits(torch.tensor([row.input_ids], device=model.device)) for row in rows])
    packed, leaking = logits(**flat), logits(flat["input_ids"])
    error, leak = (((each - alone).norm() / alone.norm()).item() for each in (packed, leaking))
    if not error < leak / 5:
        raise ValueError(f"Packed rows see one another: logits differ by {error:.2%}. Keep to the pinned transformers.")
    return f"packed logits equal separate ones to {error:.1e} of their norm (rows that leak: {leak:.1e})"


@torch.no_grad()
def check_step(model: Any, step: TrainingStep, rows: Sequence[Encoded]) -> str:
    """The loss of the fast profile's first step must be that of transformers' model. Raises ValueError.

    The LoRA is new, so its B is 0 and dropout changes nothing. The gradients stay as they were.
    """
    model.eval()
    features = as_features(rows)
    fast = step(collate(features), num_target_tokens(features), dropout_seed(0, 0)).item()
    model.zero_grad(set_to_none=True)
    flat = {name: value.to(model.device) for name, value in flatten(rows).items()}
    plain = model(**flat, use_cache=False).loss.item()
    if not abs(fast - plain) <= ROUNDING[step.dtype] * max(plain, 1):
        raise ValueError(
            f"The fast profile's first loss is {fast:.4f}, that of transformers' model {plain:.4f}: it does not "
            "compute this base. Give --profile faithful, and report this."
        )
    return f"first loss of the fast profile {fast:.4f}, of transformers' model {plain:.4f}"


def histogram(rows: Sequence[Encoded]) -> str:
    """How long the rows are, as bars."""
    bins = Counter(len(row.input_ids) // BIN for row in rows)
    widest = max(bins.values())
    bars = {b: "█" * max(1, round(40 * n / widest)) for b, n in bins.items()}
    lines = [f"{b * BIN:4d}-{(b + 1) * BIN - 1:<4d} {bars[b]} {n}" for b, n in sorted(bins.items())]
    total, learned = sum(len(row.input_ids) for row in rows), sum(row.learned for row in rows)
    return "\n".join([*lines, f"{total:,} tokens an epoch, {learned:,} of them learned ({learned / total:.1%})"])


def forecast(
    model: Any, rows: Sequence[Encoded], recipe: Recipe, step: TrainingStep | None = None, pause: float = 0.0
) -> Forecast:
    """Rehearse some forward and backward passes, without an optimiser step, and scale them to the whole run.

    `pause`: seconds of the measuring at the end of an epoch. The random state and the gradients stay as they were.
    """

    def rehearse(batch: Sequence[Encoded]) -> float:
        began = time.perf_counter()
        if step:
            inputs = collate_fast(as_features(batch))
            step(inputs["batch"], inputs["num_items_in_batch"], dropout_seed(0, 0))
        else:
            model.train()
            flat = {name: value.to(model.device) for name, value in flatten(batch).items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                model(**flat, use_cache=False).loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    drawn, size = random.Random(recipe.seed), recipe.global_batch_size if step else recipe.batch_size
    batches = [drawn.sample(rows, min(size, len(rows))) for _ in range(DRAWN)]
    batches.sort(key=lambda batch: sum(len(row.input_ids) for row in batch))
    typical, largest = batches[DRAWN // 2], batches[-1]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        rehearse(largest)
        memory = memory_in_use() + ADAM_BYTES * count_trainable(model)
        first = rehearse(typical) if step else 0.0
        a_pass = sum(rehearse(typical) for _ in range(TIMED)) / TIMED
    model.zero_grad(set_to_none=True)
    steps, passes = recipe.steps(len(rows)), 1 if step else distributed.gradient_accumulation_steps(recipe)
    shapes = {batch_shape(collate_fast(as_features(batch))["batch"]) for batch in batches} if step else set()
    recording = len(shapes) * (first - a_pass)  # each shape is recorded once
    tokens = sum(len(row.input_ids) for row in rows) * recipe.epochs
    return Forecast(steps, tokens, a_pass * steps * passes + recording + pause * recipe.epochs, memory)


def memory_in_use() -> int:
    """Most bytes used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
