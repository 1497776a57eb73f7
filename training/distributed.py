"""Several processes of one run, as torchrun and `accelerate launch --multi_gpu` start them (DistributedDataParallel).

Each process has a whole model, computes the gradients of its share of every batch, and ends with the same weights.
"""

import os
from collections.abc import Sequence
from typing import Any

from training.recipe import Recipe


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process logs, writes and publishes for all."""
    return rank() == 0


def writes_files(save_on_each_node: bool) -> bool:
    """Whether this process writes: the main one, or the first of each machine where machines share no disk."""
    return is_main_process() or (save_on_each_node and int(os.environ.get("LOCAL_RANK", "0")) == 0)


def partition(rows: Sequence[dict[str, Any]], rank: int, world_size: int) -> list[dict[str, Any]]:
    """One process's rows of a batch: dealt by length, back and forth, so that all have about as many tokens."""
    if world_size == 1:
        return list(rows)
    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    rounds = [order[at : at + world_size] for at in range(0, len(order), world_size)]
    dealt = (each if number % 2 == 0 else each[::-1] for number, each in enumerate(rounds))
    return [each[rank] for each in dealt if rank < len(each)]


def use_own_gpu() -> None:
    """Make this process's GPU the one that "cuda" means."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def gradient_accumulation_steps(recipe: Recipe) -> int:
    """Batches that each process accumulates, so that all take the recipe's rows in a step. Raises ValueError."""
    each, left = divmod(recipe.gradient_accumulation_steps, world_size())
    if left:
        raise ValueError(
            f"{world_size()} processes cannot share {recipe.gradient_accumulation_steps} batches of a step. Give "
            f"--gradient-accumulation-steps a multiple of {world_size()}, and a --batch-size that keeps "
            f"{recipe.global_batch_size} rows a step."
        )
    return each


def require_ddp() -> None:
    """Raise ValueError where `accelerate launch` was told to use FSDP or DeepSpeed."""
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise ValueError(
            "FSDP and DeepSpeed save a LoRA little memory, and are not supported. Launch with --multi_gpu, which gives "
            "each GPU a whole base; --bits 4 makes that small."
        )
