"""What the training benchmarks share: recipe and rows for a base, a model to train, and a clock for its steps."""

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from chat import base_model, convert
from chat.checkpoints import locate
from qwen2.training_step import TrainingStep
from training import data, trainer
from training.recipe import HUANHUAN, POCKET, Recipe
from training.tokens import Encoded, encode

ARCHITECTURE = Qwen2Config(  # of Qwen2.5-7B-Instruct
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32768,
)  # fmt: skip
WARM = 3  # steps not counted


def load(chosen: argparse.Namespace) -> tuple[Recipe, Any, list[Encoded]]:
    """The recipe for `chosen.base`, the tokenizer, and the rows."""
    recipe = HUANHUAN if chosen.base == "7b" else replace(POCKET, dataset=("huanhuan",))
    if chosen.dataset:
        recipe = replace(recipe, dataset=tuple(chosen.dataset))
    tokenizer = base_model.load_tokenizer(convert.ensure_converted(locate("small" if chosen.random else chosen.base)))
    rows = encode(tokenizer, data.load(recipe.dataset), recipe.max_length, recipe.terminator)
    return recipe, tokenizer, rows


def build(base: str, random_weights: bool, recipe: Recipe, profile: str) -> Any:
    """The base with a fresh LoRA; with `random_weights` the 7B's architecture."""
    if not random_weights:
        checkpoint = convert.ensure_converted(locate(base))
        return trainer.attach(base_model.load_base(checkpoint, bits=recipe.bits), recipe, profile)
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device(base_model.best_device()):
        model: PreTrainedModel = Qwen2ForCausalLM._from_config(ARCHITECTURE, dtype=torch.bfloat16)
    return trainer.attach(model, recipe, profile)


class Clock(TrainerCallback):
    """When training began and each step ended, and how many graphs of a `step` had been recorded then."""

    def __init__(self, step: TrainingStep | None = None) -> None:
        self.step, self.ends, self.recorded = step, [time.perf_counter()], [0]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        self.recorded.append(len(self.step.graphs) if self.step else 0)

    def seconds(self) -> float:
        """Mean of the steps after the warm-up in which no graph was recorded."""
        steps = zip(itertools.pairwise(self.ends), itertools.pairwise(self.recorded), strict=True)
        spent = [end - begin for (begin, end), (before, after) in steps if before == after]
        return statistics.fmean(spent[WARM:])
