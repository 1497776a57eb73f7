"""PEFT and transformers.Trainer on flattened batches: no padding, rows kept apart by their positions.

Two profiles train one recipe: `faithful` is the stock Trainer, `FiniteTrainer` here; `fast` is the same loop around
`qwen2.training_step`, `FastTrainer` in fast_trainer.py.

The training loss is the cross-entropy of the target tokens: those of the replies, terminators included (their label is
not IGNORE_INDEX). Under `faithful` Qwen2ForCausalLM.forward computes it, by transformers' ForCausalLMLoss; under `fast`
TrainingStep does, by its kernel cross_entropy_. Both average over the optimiser step: the sum over all its rows is
divided by num_items_in_batch, the number of their target tokens. So a long reply weighs more than a short one, and
neither micro-batches nor processes make a difference: each divides its own sum by the count of all, and the gradients
are added up. evaluate/losses.py averages the validation (held-out) loss likewise, with the terminators apart.
"""

import json
import logging
import signal
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from accelerate.utils import broadcast_object_list, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from chat.files import whole
from qwen2 import IGNORE_INDEX
from qwen2.training_step import TrainingStep, dropout_seed
from training import distributed
from training.fast_trainer import FastTrainer, WholeBatchTrainer, collate_fast, require_finite
from training.recipe import Recipe
from training.tokens import Encoded

log = logging.getLogger(__name__)

Measure = Callable[[], dict[str, float]]
BEST = "best.safetensors"  # in the run's folder, when it may stop early


class Interrupted(RuntimeError):
    """The run was told to stop; a checkpoint was written first."""


def attach(model: PreTrainedModel, recipe: Recipe, profile: str = "faithful") -> PeftModel:
    """The base with a fresh LoRA on it, in fp32 on a bf16 base; only the LoRA learns.

    PEFT's `prepare_model_for_kbit_training` is left out: it would only put norms, embedding and head in fp32, which
    takes 2.2 GB more for the 7B and is not what is served.
    """
    set_seed(recipe.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora, use_dora=recipe.dora, target_modules=list(recipe.layers),
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    if recipe.gradient_checkpointing and profile == "faithful":  # the fast profile does without
        adapted.gradient_checkpointing_enable()  # here, so that the forecast rehearses what the run will do
    return adapted


def count_trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def as_features(rows: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Rows in the shape that Trainer's collators take."""
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def flatten(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Rows as one row, (1, tokens): input_ids, labels, position_ids. No attention mask: with one, rows would leak."""
    flat: dict[str, torch.Tensor] = DataCollatorWithFlattening()(as_features(rows))
    return flat


def collate(features: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """This process's rows of a batch as one row; where none are left for it, one token that is no target."""
    mine = distributed.partition(features, distributed.rank(), distributed.world_size())
    flat: dict[str, torch.Tensor] = DataCollatorWithFlattening()(mine or [{"input_ids": [0], "labels": [IGNORE_INDEX]}])
    return flat


def train(
    model: PeftModel, rows: Sequence[Encoded], recipe: Recipe, work: Path, *, resume: bool = False,
    measure: Measure | None = None, step: TrainingStep | None = None, callbacks: Sequence[TrainerCallback] = (),
    save_on_each_node: bool = False,
) -> list[dict[str, float]]:  # fmt: skip
    """Train the LoRA in place; checkpoints and the TensorBoard log go to `work`. Returns Trainer's log.

    `measure` is called at the end of each epoch, and every `recipe.eval_every` steps; what it returns is logged. With a
    `step` the profile is fast, otherwise faithful. Raises Interrupted after Ctrl-C, ValueError when a gradient is not
    finite or there is nothing to resume.
    """
    checkpoint = last_checkpoint(work) if resume else None
    trainer = (partial(FastTrainer, step) if step else FiniteTrainer)(
        model=model,
        args=training_arguments(recipe, work, step is not None, save_on_each_node),
        train_dataset=as_features(rows),  # type: ignore[arg-type]
        data_collator=collate_fast if step else collate,
    )
    seed_dropout(recipe, checkpoint)
    stop = StopOnInterrupt()
    evaluation = [EvalCallback(trainer, measure, stop, recipe)] if measure else []
    for callback in (*evaluation, stop, *callbacks):
        trainer.add_callback(callback)
    # PEFT looks for the base's config on the Hub at each checkpoint, to learn that no embedding was resized.
    warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", module="peft")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.asked:
        raise Interrupted(f"Stopped; step {trainer.state.global_step} is saved. Go on with --resume.")
    if recipe.patience and (work / BEST).exists():
        load_best(model, work / BEST)
    return trainer.state.log_history


def training_arguments(recipe: Recipe, work: Path, fast: bool = False, per_node: bool = False) -> TrainingArguments:
    """A recipe as Trainer's arguments. The fast profile takes all rows of a step at once: the losses are the same.

    A batch is what all processes take together: each reads the whole batch, and its collator keeps its share.
    """
    on_gpu = torch.cuda.is_available()
    made = TrainingArguments(
        output_dir=str(work), report_to=["tensorboard"], remove_unused_columns=False,
        per_device_train_batch_size=recipe.global_batch_size if fast else recipe.batch_size * distributed.world_size(),
        gradient_accumulation_steps=1 if fast else distributed.gradient_accumulation_steps(recipe),
        num_train_epochs=recipe.epochs, learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,  # below 1 it is a part of the steps
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=on_gpu,  # autocast: without it the fp32 LoRA would multiply in fp32
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, accelerator_config={"non_blocking": on_gpu},
        seed=recipe.seed, data_seed=recipe.seed,  # of the order of the rows, the same on each process
        logging_steps=recipe.logging_steps, include_num_input_tokens_seen="all",
        save_steps=recipe.save_steps, save_total_limit=2, save_on_each_node=per_node,
        ddp_find_unused_parameters=False,  # the whole LoRA is used in each pass
        logging_nan_inf_filter=False,  # it waits for the GPU at each step; both Trainers look at the gradients
    )  # fmt: skip
    # Private: with several GPUs in sight Trainer would put DataParallel around the model, and take more rows a step.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def last_checkpoint(work: Path) -> Path:
    """The newest checkpoint that is whole; damaged ones are named in the log. Raises ValueError without one.

    One that was never finished is passed over silently: trainer_state.json is what Trainer writes last.
    """
    damage = ""
    for checkpoint in sorted((state.parent for state in work.glob("checkpoint-*/trainer_state.json")), key=_step)[::-1]:
        if not (damage := _damage(checkpoint)):
            return checkpoint
        log.warning("%s is damaged (%s); an older one is looked for.", checkpoint, damage)
    none = f"{work} holds no {'whole ' if damage else ''}checkpoint to resume from."
    raise ValueError(f"{none} {'Delete it, and start' if damage else 'Start'} without --resume.")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _damage(checkpoint: Path) -> str:
    """The first file of a checkpoint that cannot be read; empty when all can. torch.save writes zips, with sums."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with ZipFile(path) as archive:
                    if archive.testzip():
                        return path.name
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, BadZipFile, SafetensorError):
            return path.name
    return ""


def seed_dropout(recipe: Recipe, checkpoint: Path | None) -> None:
    """Let each process draw its own dropout, and a resumed one other dropout than from its beginning.

    Trainer restores the random state that this process saved. In a run begun on another number of processes there is
    none, and its first dropout would be drawn again.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    state = "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"
    if checkpoint and not (checkpoint / state).exists():
        log.info("The run was begun on another number of processes: the rows are the same, dropout draws anew.")
        torch.manual_seed(dropout_seed(recipe.seed, _step(checkpoint), rank, world_size))
    elif rank:
        torch.manual_seed(recipe.seed + rank)


class FiniteTrainer(WholeBatchTrainer):
    """Trainer that stops on the first gradient that is not finite; clipping would spread it to every layer."""

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's, then the norms of all gradients are looked at. Raises ValueError naming step and layer."""
        loss = super().training_step(model, *args, **kwargs)
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named]))
        require_finite(self.state.global_step + 1, [name for name, _ in named], norms)
        return loss


class EvalCallback(TrainerCallback):
    """Measures every so many steps and at the end of each epoch, logs it where checkpoints keep it, and may stop."""

    def __init__(self, trainer: Trainer, measure: Measure, stop: "StopOnInterrupt", recipe: Recipe) -> None:
        self.trainer, self.measure, self.stop = trainer, measure, stop
        self.every, self.patience = recipe.eval_every, recipe.patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._evaluate(args, state, control, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.every or state.global_step % self.every:  # else that was just done
            self._evaluate(args, state, control, kwargs["model"])

    def _evaluate(self, args: Any, state: Any, control: Any, model: torch.nn.Module) -> None:
        if self.stop.asked:
            return
        self.trainer.log(broadcast_object_list([self.measure()])[0])  # all decide alike, whatever their GPUs rounded
        losses = [entry["heldout_loss"] for entry in state.log_history if "heldout_loss" in entry]
        best = losses.index(min(losses))
        since = len(losses) - 1 - best
        if self.patience and not since and args.should_save:
            save_best(model, Path(args.output_dir) / BEST)
        if self.patience and since >= self.patience:
            log.info("No better validation loss than %.3f, measured %d times: stopping.", losses[best], self.patience)
            control.should_training_stop = True


def save_best(model: torch.nn.Module, path: Path) -> None:
    """Write the LoRA's weights as they are in memory, whole or not at all."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with whole(path) as part:
        part.write_bytes(to_bytes(weights))


def load_best(model: torch.nn.Module, path: Path) -> None:
    """Give the LoRA the weights that `save_best` wrote."""
    model.load_state_dict(load_file(path), strict=False)  # which has nothing of the base


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM once: finish the step, save, stop. Twice: stop at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.usual = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        log.info("Stopping after this step; press Ctrl-C again to stop at once.")
        self.asked = True
        self.on_train_end(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, usual in self.usual.items():
            signal.signal(number, usual)
