"""How an adapter is made, from examples to a published folder. `run` tells the story; run.py is its command line."""

import logging
import time
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi

from chat import base_model, convert
from chat.adapter import RECIPE, ROOT, Adapter
from chat.checkpoints import locate
from qwen2.training_step import TrainingStep
from training import adapter_files, data, distributed, preflight, trainer
from training.evaluate import card
from training.evaluate.losses import validation_loss
from training.evaluate.measures import measure
from training.publish import checks, hub, modelscope
from training.recipe import Run
from training.tokens import encode

log = logging.getLogger(__name__)


class Timer:
    """Seconds of each part of a run; where one ends, the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def end(self, part: str) -> float:
        now = time.perf_counter()
        self.seconds[part], self.began = now - self.began, now
        return self.seconds[part]


def run(job: Run, api: HfApi | None = None) -> Adapter | None:
    """Examples, tokens, base, preflight checks, training, measures, card, the gate, and the push: the whole story.

    Of several processes the main one measures, writes and publishes, and with `save_on_each_node` the first of each
    machine measures and writes. The others return None when training is done. Raises ValueError, FileExistsError,
    Unavailable, Interrupted, PermissionError or ConnectionError, each a sentence with the remedy.
    """
    recipe = job.recipe
    output, work = job.output or ROOT / recipe.name, job.work or Path("runs") / recipe.name
    timer = Timer()

    # What would be refused in hours is refused now.
    preflight.prepare_folders(job, output, work)
    if distributed.is_main_process():
        if job.push or job.push_modelscope:
            checks.require_no_secret(work / RECIPE)  # it is published too, and may name a home folder
        if job.push:
            hub.require_permission(job.push, api or HfApi(), job.pr, private=job.private)
        if job.push_modelscope:
            modelscope.require_permission(job.push_modelscope, job.private)
    distributed.use_own_gpu()
    preflight.choose_profile(job)

    # Examples become rows of token ids and labels.
    examples, validation = data.split(data.load(recipe.dataset), recipe.validation_rows, recipe.seed)
    log.info("%d training examples, %d validation examples", len(examples), len(validation))
    timer.end("reading examples")
    checkpoint = convert.ensure_converted(locate(recipe.base))
    timer.end("finding the base")
    tokenizer = base_model.load_tokenizer(checkpoint)
    rows = encode(tokenizer, examples, recipe.max_length, recipe.terminator)
    validation_rows = encode(tokenizer, validation, recipe.max_length, recipe.terminator)
    log.info(preflight.show_row(tokenizer, rows[0]))
    log.info(preflight.check_parity(tokenizer, examples, rows))
    log.info(preflight.histogram(rows))
    timer.end("token ids")

    # The base gets a LoRA, and is tried out before the first step.
    base = base_model.load_base(checkpoint, bits=recipe.bits)
    profile = preflight.choose_profile(job, base.config)
    model = trainer.attach(base, recipe, profile)
    trainable = f"{trainer.count_trainable(model):,}"
    log.info("%s trainable parameters on %s, served by %s", trainable, checkpoint.base.name, checkpoint.source)
    timer.end("reading the base")
    log.info(preflight.check_isolation(model, rows[:4]))
    timer.end("preflight checks")

    def validate() -> dict[str, float]:
        loss = validation_loss(model, validation_rows)
        return {"heldout_loss": loss.per_token, "heldout_terminator": loss.per_terminator}

    pause = 0.0  # seconds that training waits at the end of each epoch
    if validation:
        log.info("Before:   validation loss %.3f a token, of %d rows", validate()["heldout_loss"], len(validation))
        pause = timer.end("validation loss")
    step = TrainingStep(model, recipe.max_length) if profile == "fast" else None
    if step:
        log.info(preflight.check_step(model, step, rows[: recipe.batch_size]))
    forecast = preflight.forecast(model, rows, recipe, step, pause)
    log.info("Forecast: %s, profile %s", forecast, profile)
    timer.end("forecast")

    # Training. trainer.py says where the loss is computed and how it is averaged.
    history = trainer.train(
        model, rows, recipe, work, resume=job.resume, measure=validate if validation else None, step=step,
        save_on_each_node=job.save_on_each_node,
    )  # fmt: skip
    if not distributed.writes_files(job.save_on_each_node):
        return None
    actual = replace(forecast, seconds=timer.end("training"), memory=preflight.memory_in_use())
    log.info("Actual:   %s", actual)
    del step  # its graphs hold memory that measuring needs

    # Base and adapter are measured side by side, as the adapter will be on disk.
    adapter_files.round_to_bf16(model)
    metrics = measure(model, tokenizer, recipe, examples, validation)
    timer.end("measures")
    metrics |= {
        "data": data.record(recipe.dataset),
        "steps": forecast.steps,
        "loss_curve": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "heldout_by_epoch": [
            {"epoch": round(entry["epoch"], 2), "step": entry["step"], "loss": entry["heldout_loss"],
             "terminator": entry["heldout_terminator"]}
            for entry in history if "heldout_loss" in entry
        ],
        "run": {
            "date": date.today().isoformat(), "device": adapter_files.device_name(),
            "base served by": checkpoint.source, "profile": profile,
            "rows learned": len(rows), "tokens": round(forecast.tokens),
            "forecast seconds": round(forecast.seconds, 1), "actual seconds": round(actual.seconds, 1),
            "forecast GB": round(forecast.memory / 1e9, 2), "actual GB": round(preflight.memory_in_use() / 1e9, 2),
            **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        },
    }  # fmt: skip

    # The folder is written beside its name, opened as the page would open it, and published.
    part = adapter_files.write(model, recipe, metrics, output)
    card.write(part)
    adapter = adapter_files.open_and_rename(part, output, checkpoint)
    card.update_ledger(output)
    timer.end("files, opened")
    for name, metric in metrics.items():
        if isinstance(metric, dict) and "count" in metric:
            log.info("%-26s %8.4f   (%d)", name, metric["value"], metric["count"])
    log.info("Parts:    %s", ", ".join(f"{part} {seconds:.1f} s" for part, seconds in timer.seconds.items()))
    if distributed.is_main_process():
        publish(job, adapter, api)
    return adapter


def publish(job: Run, adapter: Adapter, api: HfApi | None = None) -> None:
    """Push to each place that the job names. Raises ConnectionError at the end, after every place was tried."""
    pushes, failed = [], []
    if job.push:
        pushes.append(partial(hub.push, adapter, job.push, api or HfApi(), job.pr))
    if job.push_modelscope:
        pushes.append(partial(modelscope.push, adapter, job.push_modelscope, job.private))
    for push in pushes:
        try:
            log.info("Pushed: %s", push())
        except ConnectionError as error:
            failed.append(str(error))
    if failed:
        raise ConnectionError(" ".join(failed))
