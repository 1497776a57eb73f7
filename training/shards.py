"""A base in pieces, one on each process of a run (FSDP2): the settings are those of `accelerate launch`.

Only the base is cut up. It is frozen, so nothing of it is summed or saved. The LoRA, a hundredth of it, stays whole on
each process: checkpoints, clipping and the optimiser are those of a run without pieces.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import distributed
from torch.distributed.fsdp import fully_shard

USED = "ACCELERATE_USE_FSDP"  # how `accelerate launch` says that a configuration asks for FSDP


def cut(model: PeftModel) -> None:
    """Leave this process its piece of each layer. Raises ValueError for a configuration without FSDP2 or layers."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    asked = FullyShardedDataParallelPlugin()  # reads the environment
    names = asked.transformer_cls_names_to_wrap or []
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if asked.fsdp_version != 2 or not layers:
        raise ValueError("Only FSDP2 that cuts up Qwen2DecoderLayer is known. Launch with training/fsdp.yaml.")
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=asked.reshard_after_forward, ignored_params=whole)
    fully_shard(model, ignored_params=whole)  # what is outside of the layers


@contextmanager
def unseen() -> Iterator[None]:
    """Keep accelerate from cutting the model up itself: it would do so on GPUs only, and with the LoRA."""
    told = os.environ.pop(USED, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[USED] = told


def average(grads: list[torch.Tensor]) -> None:
    """Give each gradient its mean over the processes, in one all-reduce."""
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    for grad, mean in zip(
        grads, flat.div_(distributed.get_world_size()).split([g.numel() for g in grads]), strict=True
    ):
        grad.copy_(mean.view_as(grad))
