"""The fast profile: Trainer's loop around `qwen2.training_step`, which never waits for the GPU between two steps."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer

from qwen2.training_step import TrainingStep, collate, dropout_seed, num_target_tokens
from training.distributed import partition, rank, world_size


def collate_fast(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """`batch`: this process's rows as `TrainingStep` takes them; and two counts over the rows of all processes."""
    return {
        "batch": collate(partition(rows, rank(), world_size())),
        "num_tokens": sum(len(row["input_ids"]) for row in rows),
        "num_items_in_batch": num_target_tokens(rows),
    }


def require_finite(step: int, names: Sequence[str], norms: torch.Tensor) -> None:
    """Raise ValueError, naming step and layer, when the norm of a gradient is not finite."""
    if norms.isfinite().all():
        return
    broken = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
    raise ValueError(
        f"Step {step}: the gradient of {broken[-1]} is not finite ({len(broken)} of {len(names)} are not). "
        "Lower --learning-rate, or --resume from the last checkpoint."
    )


class WholeBatchTrainer(Trainer):
    """Trainer of which each process reads the whole batches; its collator keeps the process's share.

    Accelerate would deal the batches out itself, and fill up the last one of an epoch with rows from its beginning.
    """

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's. Raises OSError with a sentence: torch and safetensors tell a full disk each in its own words."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).split("\n")[0]
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {self.args.output_dir} "
                f"({reason}). Free some disk; --resume goes on from the one before it, if there is one."
            ) from error

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        if world_size() > 1:
            sampler = loader.batch_sampler  # accelerate's BatchSamplerShard
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader


class FastTrainer(WholeBatchTrainer):
    """Trainer whose step is `TrainingStep`.

    Of several processes each computes the gradients of its share; one all-reduce of one buffer adds them up.
    """

    def __init__(self, step: TrainingStep, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # No DistributedDataParallel around the model: it would broadcast the base and, without autograd, sum nothing.
        accelerator: Any = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
        self.step = step
        on_gpu = step.device.type == "cuda"
        self.norms = torch.zeros(len(step.names), pin_memory=on_gpu)  # of each gradient, on the CPU once it is `copied`
        self.copied = torch.cuda.Event() if on_gpu else None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Loss and gradients; meanwhile, the norms of the step before are looked at. Raises ValueError."""
        seed = dropout_seed(self.args.seed, self.state.global_step, rank(), world_size())
        loss = self.step(inputs["batch"], inputs["num_items_in_batch"], seed)
        if world_size() > 1:
            torch.distributed.all_reduce(self.step.flat_grads)
        self.require_finite()
        self.grad_norms = torch.stack(torch._foreach_norm(self.step.grads))
        self.norms.copy_(self.grad_norms, non_blocking=True)
        if self.copied:
            self.copied.record()
        return loss * world_size()  # Trainer logs the mean of the processes

    def require_finite(self) -> None:
        """Look at the gradients of the last step that ended; one just begun goes on. Raises ValueError."""
        if self.copied:
            self.copied.synchronize()
        require_finite(self.state.global_step, self.step.names, self.norms)

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.require_finite()  # nothing that came of a broken gradient is logged,
        super().log(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.require_finite()  # nor saved
        super().save_model(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer walks through the whole model for it at each step

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Private in Trainer. What torch's clip_grad_norm_ does, on the one buffer that holds all gradients."""
        norm: torch.Tensor = self.grad_norms.norm()
        self.step.flat_grads.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Private in Trainer, which would wait for the GPU here, and see one process's share only."""
        self.state.num_input_tokens_seen += inputs["num_tokens"]
