"""The files of an adapter folder: written by a run, and read again to measure it or to train on."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save as to_bytes
from transformers import PreTrainedTokenizerFast

from chat import base_model, convert
from chat.adapter import CONFIG, METRICS, RECIPE, WEIGHTS, Adapter
from chat.checkpoints import Checkpoint, locate
from chat.files import PART, replace, whole, write_text
from training import data
from training.formats import Example
from training.recipe import Recipe
from training.tokens import fitting

log = logging.getLogger(__name__)

# Fields that other programs look for in adapter_config.json, written even where they have PEFT's default.
ALWAYS_WRITTEN = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias",
}  # fmt: skip


def round_to_bf16(model: PeftModel) -> None:
    """Give the LoRA the values it will have on disk, so that what is measured is what is published."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def save(model: PeftModel, folder: Path) -> None:
    """Write the weights in bf16, but a DoRA's magnitudes, which need more than three digits, and adapter_config.json.

    A PEFT refuses fields that it does not know, so only those are written which differ from its defaults, or which
    others look for. Some programs ignore rsLoRA, so it is folded into alpha: alpha times the root of the rank, over the
    rank, is the same scale.
    """
    folder.mkdir(parents=True)
    weights = {
        name: (tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor).contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    with whole(folder / WEIGHTS) as part:
        part.write_bytes(to_bytes(weights, metadata={"format": "pt"}))
    defaults, fields = LoraConfig().to_dict(), model.peft_config["default"].to_dict() | {"inference_mode": True}
    if fields.pop("use_rslora"):
        alpha = fields["lora_alpha"] * math.sqrt(fields["r"])
        fields["lora_alpha"] = int(alpha) if alpha.is_integer() else alpha
    fields["target_modules"] = sorted(fields["target_modules"])
    written = {
        name: value
        for name, value in fields.items()
        if name in ALWAYS_WRITTEN or (value != defaults[name] and name != "peft_version")
    }
    write_text(folder / CONFIG, json.dumps(written, indent=2, sort_keys=True) + "\n")


def write(model: PeftModel, recipe: Recipe, metrics: dict[str, Any], output: Path) -> Path:
    """Write weights, configuration, recipe and metrics into a folder beside `output`, and return that folder."""
    part = output.with_name(output.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    save(model, part)
    recipe.write(part / RECIPE)
    write_json(part / METRICS, metrics)
    return part


def open_and_rename(part: Path, output: Path, checkpoint: Checkpoint) -> Adapter:
    """Open the folder that `write` returned, and only if that works give it its name. Raises as Adapter.open does."""
    Adapter.open(part, checkpoint, output.name)
    replace(part, output)
    return Adapter.open(output, checkpoint)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def reopen(
    folder: Path, base: str | None
) -> tuple[PeftModel, PreTrainedTokenizerFast, Recipe, list[Example], list[Example]]:
    """An adapter folder as model, tokenizer, recipe, training examples and validation examples.

    It is opened on `base`, or on the one its recipe names. There are no validation examples once the data have changed:
    rows that stand there now may have been learned then. Raises ValueError, OSError or Unavailable.
    """
    recipe = Recipe.read(folder / RECIPE)
    checkpoint = convert.ensure_converted(locate(base or recipe.base))
    adapter = Adapter.open(folder, checkpoint)
    if "run" not in adapter.metrics:
        raise ValueError(f"{folder} has no {METRICS} of its run, which the card needs. Copy the whole folder again.")
    examples = data.load(recipe.dataset, recipe.system, recipe.skip_bad_rows)
    examples, validation = data.split(examples, recipe.validation_rows, recipe.seed)
    if adapter.metrics.get("data", []) not in ([], data.record(recipe.dataset)):
        log.warning("%s was trained on other data than stand here now. Its numbers on held-out rows stay as they are; "
                    "train it again for new ones.", folder)  # fmt: skip
        validation = []
    tokenizer = base_model.load_tokenizer(checkpoint)
    if recipe.skip_bad_rows:
        examples, validation = (
            fitting(tokenizer, part, recipe.max_length, recipe.terminator) for part in (examples, validation)
        )
    model = PeftModel.from_pretrained(base_model.load_base(checkpoint, bits=recipe.bits), adapter.folder)
    return model, tokenizer, recipe, examples, validation


def device_name() -> str:
    """The GPU by name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
