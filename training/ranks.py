"""Where this process stands among those of one run: torchrun and `accelerate launch` say so in the environment."""

import os
from collections.abc import Sequence
from typing import Any

from training.recipe import Recipe


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this one speaks, writes and publishes for all."""
    return place() == 0


def writes(on_each_node: bool) -> bool:
    """Whether this one writes: the first one, or the first of each machine where these share no disk."""
    return first() or (on_each_node and int(os.environ.get("LOCAL_RANK", "0")) == 0)


def sharded() -> bool:
    """Whether the base is to lie in pieces, one on each process: `accelerate launch` with training/fsdp.yaml."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def agreed(value: Any) -> Any:
    """The first one's value on all, so that all decide alike, whatever their GPUs rounded."""
    if count() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def stock_only() -> bool:
    """Whether `accelerate launch` was told of FSDP or DeepSpeed, which only the stock Trainer knows."""
    return sharded() or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def deal(rows: Sequence[dict[str, Any]], place: int, count: int) -> list[dict[str, Any]]:
    """This process's rows of a batch: dealt by length, to and fro, so that all have about as many tokens."""
    if count == 1:
        return list(rows)
    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    laps = [order[at : at + count] for at in range(0, len(order), count)]
    hands = (lap if number % 2 == 0 else lap[::-1] for number, lap in enumerate(laps))
    return [hand[place] for hand in hands if place < len(hand)]


def use_own_gpu() -> None:
    """Make this process's GPU the one that "cuda" means."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def accumulation(recipe: Recipe) -> int:
    """Batches that each process adds up, so that all together take the recipe's rows in a step. Raises ValueError."""
    each, left = divmod(recipe.accumulation, count())
    if left:
        raise ValueError(
            f"{count()} processes cannot share {recipe.accumulation} batches of a step. Give --accumulation a multiple "
            f"of {count()}, and a --batch-size that keeps {recipe.rows_a_step} rows a step."
        )
    return each
