"""What is shown before step 1: a row as it is learned, template parity, isolation of packed rows, and the forecast."""

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from chat.prompt import all_prompt_ids
from training import ranks
from training.data import Example
from training.fast import Step, collate, seed
from training.recipe import Recipe
from training.tokens import IGNORED, Encoded
from training.trainer import as_features, flatten, trained_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BIN = 32  # tokens, of the histogram
DRAWN = 100  # batches, of which the middle one is timed and the largest shows the memory
REHEARSALS = 4  # the first one warms up
ADAM_BYTES = 8  # two fp32 moments a parameter


@dataclass(frozen=True)
class Forecast:
    """What a run will take, from a rehearsal on its own batches."""

    steps: int
    tokens: float
    seconds: float
    memory: int  # bytes: of the GPU, else of this process

    def __str__(self) -> str:
        lasts = duration(self.seconds)
        return f"{self.steps} steps, {self.tokens:,.0f} tokens, {lasts}, {self.memory / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """In minutes, or below two of them in seconds."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def show_row(tokenizer: "PreTrainedTokenizerFast", row: Encoded) -> str:
    """One row decoded: the part that is only read, the part that is learned, and the terminator by name."""
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    read = row.input_ids[: len(row.input_ids) - len(learned)]
    return (
        f"read    ({len(read)} tokens)  {tokenizer.decode(read)!r}\n"
        f"learned ({len(learned)} tokens)  {tokenizer.decode(learned[:-1])!r}\n"
        f"ends on {tokenizer.convert_ids_to_tokens(learned[-1])} ({learned[-1]})"
    )


def check_parity(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], rows: Sequence[Encoded]) -> str:
    """Every row must begin with the ids that the chat would send, and learn nothing of them. Raises ValueError."""
    whole = 0
    sent = all_prompt_ids(tokenizer, [example.turns for example in examples])
    for example, row, served in zip(examples, rows, sent, strict=True):
        if row.input_ids[: len(served)] != served:
            continue  # trimmed to fit: its prompt is a shorter one
        whole += 1
        if row.labels[: len(served)] != [IGNORED] * len(served) or row.labels[len(served)] == IGNORED:
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
    alone = torch.cat([_alone(model, row) for row in rows])
    packed = model(**flat, use_cache=False).logits[0].float()
    leaking = model(input_ids=flat["input_ids"], use_cache=False).logits[0].float()
    error, leak = (((logits - alone).norm() / alone.norm()).item() for logits in (packed, leaking))
    if not error < leak / 5:
        raise ValueError(f"Packed rows see one another: logits differ by {error:.2%}. Keep to the pinned transformers.")
    return f"packed logits equal separate ones to {error:.1e} of their norm (rows that leak: {leak:.1e})"


def _alone(model: Any, row: Encoded) -> torch.Tensor:
    ids = torch.tensor([row.input_ids], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def histogram(rows: Sequence[Encoded]) -> str:
    """How long the rows are, as bars."""
    bins = Counter(len(row.input_ids) // BIN for row in rows)
    widest = max(bins.values())
    lines = [
        f"{b * BIN:4d}-{(b + 1) * BIN - 1:<4d} {'█' * max(1, round(40 * n / widest))} {n}"
        for b, n in sorted(bins.items())
    ]
    total, learned = sum(len(row.input_ids) for row in rows), sum(row.learned for row in rows)
    return "\n".join([*lines, f"{total:,} tokens an epoch, {learned:,} of them learned ({learned / total:.1%})"])


def forecast(
    model: Any, rows: Sequence[Encoded], recipe: Recipe, step: Step | None = None, pause: float = 0.0
) -> Forecast:
    """Rehearse some passes forward and backward, without a step, and carry time and memory over to the whole run.

    `pause` is what the measuring at the end of an epoch takes, in seconds. The random state and the gradients are left
    as they were found.
    """
    drawn, size = random.Random(recipe.seed), recipe.rows_a_step if step else recipe.batch_size
    batches = [drawn.sample(rows, min(size, len(rows))) for _ in range(DRAWN)]
    batches.sort(key=lambda batch: sum(len(row.input_ids) for row in batch))
    typical, largest = batches[DRAWN // 2], batches[-1]
    rehearse = partial(_rehearse_fast, step) if step else partial(_rehearse, model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        _seconds(rehearse, largest)
        memory = memory_in_use() + ADAM_BYTES * trained_parameters(model)
        first = _seconds(rehearse, typical) if step else 0.0
        a_pass = sum(_seconds(rehearse, typical) for _ in range(REHEARSALS - 1)) / (REHEARSALS - 1)
    model.zero_grad(set_to_none=True)
    steps, passes = recipe.steps(len(rows)), 1 if step else ranks.accumulation(recipe)
    recorded = len({_shape(batch) for batch in batches}) * (first - a_pass) if step else 0.0
    tokens = sum(len(row.input_ids) for row in rows) * recipe.epochs
    return Forecast(steps, tokens, a_pass * steps * passes + recorded + pause * recipe.epochs, memory)


def _seconds(rehearse: Callable[[Sequence[Encoded]], None], rows: Sequence[Encoded]) -> float:
    began = time.perf_counter()
    rehearse(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _shape(rows: Sequence[Encoded]) -> tuple[int, int]:
    """What the fast profile records apart."""
    batch = _share(rows)
    return len(batch["input_ids"]), len(batch["picked"])


def _share(rows: Sequence[Encoded]) -> dict[str, Any]:
    return collate(as_features(rows), ranks.place(), ranks.count())


def _rehearse_fast(step: Step, rows: Sequence[Encoded]) -> None:
    batch = _share(rows)
    step(batch, batch["learned"], seed(0, 0))


def _rehearse(model: Any, rows: Sequence[Encoded]) -> None:
    model.train()
    flat = {name: value.to(model.device) for name, value in flatten(rows).items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        model(**flat, use_cache=False).loss.backward()


def memory_in_use() -> int:
    """Most bytes used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
