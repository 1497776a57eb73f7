"""PEFT and transformers.Trainer on flattened batches: no padding, rows isolated by their positions.

Two profiles of one recipe: `faithful` is the stock Trainer, `fast` puts `training.fast` in the place of its step.
"""

import json
import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from chat.adapter import CONFIG, WEIGHTS
from training import fast, ranks, shards
from training.fast import Step, collate
from training.recipe import Recipe
from training.tokens import IGNORED, Encoded

log = logging.getLogger(__name__)

BEST = "best.safetensors"  # in the run's folder, when it may stop early
# What is looked for in adapter_config.json, though it be as PEFT has it by default.
TOLD = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias",
}  # fmt: skip


class Interrupted(RuntimeError):
    """The user pressed Ctrl-C; a checkpoint was written first."""


def attach(model: PreTrainedModel, recipe: Recipe, profile: str = "faithful") -> PeftModel:
    """The base with a fresh LoRA on it, in fp32 on a bf16 base; only the LoRA learns.

    PEFT's `prepare_model_for_kbit_training` is left out: all it would add is norms, embedding and head in fp32, 2.2 GB
    more for the 7B, and not what is served.
    """
    set_seed(recipe.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=list(recipe.layers),
    )
    adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    if recipe.gradient_checkpointing and profile == "faithful":  # the fast one does without
        adapted.gradient_checkpointing_enable()  # here, so that the forecast rehearses what the run will do
    return adapted


def trained_parameters(model: torch.nn.Module) -> int:
    """How many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flatten(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Rows as one row, (1, tokens): input_ids, labels, position_ids. No attention mask: with one, rows would leak."""
    flat: dict[str, torch.Tensor] = DataCollatorWithFlattening()(as_features(rows))
    return flat


def as_features(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Rows in the shape that Trainer's collators take."""
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def train(
    model: PeftModel,
    rows: Sequence[Encoded],
    recipe: Recipe,
    work: Path,
    *,
    resume: bool = False,
    at_epoch_end: Callable[[], dict[str, float]] | None = None,
    step: Step | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_each_node: bool = False,
) -> list[dict[str, float]]:
    """Train the LoRA in place; checkpoints and the TensorBoard log go to `work`. Returns Trainer's log.

    `at_epoch_end` measures, at other times too if the recipe says so; what it returns is logged. With a `step` the
    run is fast; `on_each_node` gives each machine the checkpoints. Raises Interrupted after Ctrl-C, ValueError when a
    gradient is not finite or there is nothing to resume.
    """
    collator: Any = DataCollatorWithFlattening()
    if step:
        collator = partial(collate, place=ranks.place(), count=ranks.count())
    elif ranks.count() > 1:
        collator = Share(recipe.batch_size)
    kind: Any = ShardedTrainer if ranks.sharded() else FiniteTrainer
    with shards.unseen():
        trainer = (partial(FastTrainer, step) if step else kind)(
            model=model,
            args=arguments(recipe, work, fast=step is not None, on_each_node=on_each_node),
            train_dataset=as_features(rows),
            data_collator=collator,
        )
    if not ranks.first():
        torch.manual_seed(recipe.seed + ranks.place())  # each process draws its own dropout
    stop = StopOnInterrupt()
    trainer.add_callback(HeldOut(trainer, model, at_epoch_end, stop, recipe))
    for callback in (stop, *callbacks):
        trainer.add_callback(callback)
    # PEFT looks for the base's config on the Hub at each checkpoint, to learn that no embedding was resized.
    warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", module="peft")
    trainer.train(resume_from_checkpoint=str(last_checkpoint(work)) if resume else None)
    if stop.asked:
        raise Interrupted(f"Stopped; step {trainer.state.global_step} is saved. Go on with --resume.")
    if recipe.patience and (work / BEST).exists():
        restore(model, work / BEST)
    return trainer.state.log_history


def arguments(recipe: Recipe, work: Path, fast: bool = False, on_each_node: bool = False) -> TrainingArguments:
    """A recipe as Trainer's arguments. The fast profile takes all rows of a step at once: the losses are the same.

    A batch is what all processes take together: each reads it whole, and keeps its share.
    """
    on_gpu = torch.cuda.is_available()
    made = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=recipe.rows_a_step if fast else recipe.batch_size * ranks.count(),
        gradient_accumulation_steps=1 if fast else ranks.accumulation(recipe),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1 it is a part of the steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=on_gpu,  # autocast: without it the fp32 LoRA would multiply in fp32
        use_cpu=not on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,  # of the order of the rows, the same on each process
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        save_on_each_node=on_each_node,
        report_to=["tensorboard"],
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        ddp_find_unused_parameters=False,  # the whole LoRA is used in each pass
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        logging_nan_inf_filter=False,  # it waits for the GPU at each step; FiniteTrainer looks at the gradients
    )
    # With several GPUs in sight Trainer would put DataParallel around the model, and take more rows a step.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def last_checkpoint(work: Path) -> Path:
    """The newest whole checkpoint: trainer_state.json is what Trainer writes last."""
    whole = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    if not whole:
        raise ValueError(f"{work} holds no checkpoint to resume from. Start without --resume.")
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]))


class Share:
    """One process's rows of a batch, flattened; where none are left for it, one token of which nothing is learned."""

    def __init__(self, rows: int) -> None:
        self.mine = slice(ranks.place() * rows, (ranks.place() + 1) * rows)

    def __call__(self, features: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Cut the share out."""
        blank = {"input_ids": [0], "labels": [IGNORED]}
        flat: dict[str, torch.Tensor] = DataCollatorWithFlattening()(features[self.mine] or [blank])
        return flat


class SharingTrainer(Trainer):
    """Trainer of which each process is given the whole batch, for its collator to take a share of.

    Accelerate would fill up the last batch of an epoch with rows from its beginning.
    """

    def get_train_dataloader(self) -> Any:
        """As Trainer's, without what accelerate puts in to share the batches out."""
        loader = super().get_train_dataloader()
        if ranks.count() > 1:
            dealer: Any = loader.batch_sampler
            dealer.num_processes, dealer.process_index, dealer.even_batches = 1, 0, False
        return loader

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As Trainer's, where this process wrote a state. In a run begun on another number of them it draws anew."""
        name = "rng_state.pth" if ranks.count() == 1 else f"rng_state_{ranks.place()}.pth"
        if checkpoint is None or (Path(checkpoint) / name).exists():
            super()._load_rng_state(checkpoint)
            return
        log.info("The run was begun on another number of processes: the rows are the same, dropout draws anew.")
        torch.manual_seed(fast.seed(self.args.seed, self.state.global_step, ranks.place(), ranks.count()))


class FiniteTrainer(SharingTrainer):
    """Trainer that stops on the first gradient that is not finite; clipping would spread it to every layer."""

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's, then one look at all gradients. Raises ValueError naming step and layer."""
        loss = super().training_step(model, *args, **kwargs)
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        if not named:  # DeepSpeed has taken them
            return loss
        self.sum_up([grad for _, grad in named])
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named]))
        require_finite(self.state.global_step + 1, [name for name, _ in named], norms)
        return loss

    def sum_up(self, grads: list[torch.Tensor]) -> None:
        """Nothing is left to do: DistributedDataParallel has done it."""


class ShardedTrainer(FiniteTrainer):
    """FiniteTrainer on a base that lies in pieces on the processes, each with the whole LoRA."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_from_ddp(self)
        shards.cut(kwargs["model"])

    def sum_up(self, grads: list[torch.Tensor]) -> None:
        """The mean, as Trainer has multiplied the loss by the number of processes."""
        if self.accelerator.sync_gradients:
            shards.average(grads)


def keep_from_ddp(trainer: Trainer) -> None:
    """Have the model prepared without DistributedDataParallel around it: gradients are summed up here."""
    accelerator: Any = trainer.accelerator
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)


def require_finite(step: int, names: Sequence[str], norms: torch.Tensor) -> None:
    """Raise ValueError, naming step and layer, when the norm of a gradient is not finite."""
    if norms.isfinite().all():
        return
    broken = [name for name, norm in zip(names, norms.tolist(), strict=True) if not math.isfinite(norm)]
    raise ValueError(
        f"Step {step}: the gradient of {broken[-1]} is not finite ({len(broken)} of {len(names)} are not). "
        "Lower --learning-rate, or --resume from the last checkpoint."
    )


class FastTrainer(SharingTrainer):
    """The same loop around a step of `training.fast`, without waiting for the GPU between two steps.

    Of several processes each computes the gradients of its share; their sum is one all-reduce of one buffer.
    """

    def __init__(self, step: Step, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        keep_from_ddp(self)
        self.step = step
        on_gpu = step.device.type == "cuda"
        self.norms = torch.zeros(len(step.names), pin_memory=on_gpu)  # of each gradient, here once it is `known`
        self.known = torch.cuda.Event() if on_gpu else None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Loss and gradients; while they are computed, a look at those of the step before. Raises ValueError."""
        count = ranks.count()
        drawn = fast.seed(self.args.seed, self.state.global_step, ranks.place(), count)
        loss = self.step(inputs, inputs["learned"], drawn)
        if count > 1:
            torch.distributed.all_reduce(self.step.flat_grads)
        self._require_finite()
        self.gradients = torch.stack(torch._foreach_norm(self.step.grads))
        self.norms.copy_(self.gradients, non_blocking=True)
        if self.known:
            self.known.record()
        return loss * count  # Trainer logs the mean of the processes

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """As torch's clip_grad_norm_, on the one buffer that holds all gradients."""
        norm: torch.Tensor = self.gradients.norm()
        self.step.flat_grads.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _require_finite(self) -> None:
        if self.known:
            self.known.synchronize()  # with the step before; the one just begun goes on
        require_finite(self.state.global_step, self.step.names, self.norms)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save:
            self._require_finite()  # nothing broken is written
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        self.state.num_input_tokens_seen += inputs["tokens"]  # Trainer's own way waits for the GPU

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it walks through the whole model at each step."""
        return 0


class HeldOut(TrainerCallback):
    """Measures every so many steps and at the end of each epoch, logs it where checkpoints keep it, and may stop."""

    def __init__(
        self,
        trainer: Trainer,
        model: torch.nn.Module,
        measure: Callable[[], dict[str, float]] | None,
        stop: "StopOnInterrupt",
        recipe: Recipe,
    ) -> None:
        self.trainer, self.measure, self.stop, self.model = trainer, measure, stop, model
        self.every, self.patience = recipe.eval_every, recipe.patience

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where `eval_every` says so."""
        if self.every and state.global_step % self.every == 0:
            self._look(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, unless that was just done."""
        if not self.every or state.global_step % self.every:
            self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        if not self.measure or self.stop.asked:
            return
        self.trainer.log(ranks.agreed(self.measure()))
        losses = [entry["heldout_loss"] for entry in state.log_history if "heldout_loss" in entry]
        best = losses.index(min(losses))
        if self.patience and best == len(losses) - 1 and self.trainer.args.should_save:
            keep(self.model, Path(str(self.trainer.args.output_dir)) / BEST)
        if self.patience and len(losses) - 1 - best >= self.patience:
            log.info("No better held-out loss than %.3f for %d looks: stopping.", losses[best], self.patience)
            control.should_training_stop = True


def keep(model: torch.nn.Module, path: Path) -> None:
    """Write the LoRA's weights as they are, whole or not at all."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    part = path.with_name(path.name + ".part")
    save_file(weights, part)
    os.replace(part, path)


def restore(model: torch.nn.Module, path: Path) -> None:
    """Give the LoRA the weights of `keep`."""
    _give(model, load_file(path))


def _give(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


def whole(model: PeftModel, load_base: Callable[[], PreTrainedModel], recipe: Recipe) -> PeftModel:
    """The same LoRA on a base that this process can use alone: read anew, if the one it was trained on is in pieces."""
    if not ranks.sharded():
        return model
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model = attach(load_base(), recipe)
    _give(model, learned)
    return model


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C once: finish the step, save, stop. Twice: stop at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take over Ctrl-C."""
        self.usual = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        log.info("Stopping after this step; press Ctrl-C again to stop at once.")
        self.asked = True
        signal.signal(signal.SIGINT, self.usual)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, self.usual)


def round_to_bf16(model: PeftModel) -> None:
    """Give the LoRA the values it will have on disk, so that what is measured is what is shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and the weights in bf16, but a DoRA's magnitudes, which need more than three digits."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    weights = {
        name: (tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor).contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    write_config(config, folder)


def write_config(config: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json so that old and new PEFTs, and programs that are none, open it alike.

    A PEFT refuses fields that it does not know, so that only those are written which differ from its defaults, or
    which others look for. rsLoRA, which some pass over, is folded into alpha: alpha times the root of the rank, over
    the rank, is the same scale.
    """
    usual, fields = LoraConfig().to_dict(), config.to_dict() | {"inference_mode": True}
    if fields.pop("use_rslora"):
        alpha = config.lora_alpha * math.sqrt(config.r)
        fields["lora_alpha"] = int(alpha) if alpha.is_integer() else alpha
    fields["target_modules"] = sorted(fields["target_modules"])
    told = {
        name: value
        for name, value in fields.items()
        if name in TOLD or (value != usual[name] and name != "peft_version")
    }
    (folder / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
