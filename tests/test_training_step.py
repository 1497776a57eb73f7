"""The fast profile is the faithful one computed otherwise: same rows, losses, weights and distribution of dropout."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3Config

from chat.adapter import WEIGHTS
from chat.base_model import load_base
from chat.checkpoints import locate, read_json
from qwen2 import supported, training_step
from tests.conftest import TAUGHT
from training import distributed, fast_trainer, preflight, trainer
from training.data import load
from training.pipeline import run
from training.recipe import TINY
from training.tokens import encode

EXACT = replace(
    TINY, batch_size=2, gradient_accumulation_steps=2, epochs=3, learning_rate=1e-3, logging_steps=1, save_steps=100
)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")


@pytest.fixture
def attach(checkpoint):
    """A function that puts a fresh LoRA on the tiny base, with B drawn so that A has gradients from the start."""

    def make(recipe):
        model = trainer.attach(load_base(checkpoint), recipe)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    return make


def train(model, rows, recipe, work, profile):
    step = training_step.TrainingStep(model, recipe.max_length) if profile == "fast" else None
    history = trainer.train(model, rows, recipe, work, step=step)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_without_dropout_losses_and_weights_are_those_of_the_stock_trainer(attach, rows, tmp_path):
    stock, weights = train(attach(EXACT), rows[:7], EXACT, tmp_path / "faithful", "faithful")
    ours, other = train(attach(EXACT), rows[:7], EXACT, tmp_path / "fast", "fast")
    assert len(stock) == len(ours) == EXACT.steps(7) == 6
    assert ours == pytest.approx(stock, abs=1e-5)
    assert all(torch.allclose(weights[name], other[name], atol=1e-5) for name in weights)
    assert stock[-1] < stock[0]


def test_both_see_the_same_rows_at_each_step(attach, rows, tmp_path, monkeypatch):
    seen = {"faithful": [], "fast": []}

    def listen(profile, collator):
        def call(*given, **known):
            seen[profile] += [tuple(row["input_ids"]) for row in given[-1]]
            return collator(*given, **known)

        return call

    monkeypatch.setattr(fast_trainer, "collate", listen("fast", training_step.collate))
    stock = trainer.DataCollatorWithFlattening
    monkeypatch.setattr(stock, "__call__", listen("faithful", stock.__call__))
    for profile in seen:
        train(attach(EXACT), rows[:7], EXACT, tmp_path / profile, profile)
    assert seen["faithful"] == seen["fast"] and len(seen["fast"]) == 7 * 3


def test_a_batch_is_the_sum_of_its_rows_so_none_sees_another(attach, rows):
    step = training_step.TrainingStep(attach(EXACT), 384)
    features, items = trainer.as_features(rows[:4]), sum(row.learned for row in rows[:4])
    together = step(training_step.collate(features), items, 0)
    alone = [step(training_step.collate([row]), items, 0) for row in features]
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone), abs=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_shares_of_processes_add_up_to_the_step_of_one(attach, rows, world_size):
    step = training_step.TrainingStep(attach(EXACT), 384)
    features = trainer.as_features(rows[:4])
    items = training_step.num_target_tokens(features)
    loss, grads = step(training_step.collate(features), items, 0), step.flat_grads.clone()
    assert items == sum(row.learned for row in rows[:4])
    shares = [training_step.collate(distributed.partition(features, rank, world_size)) for rank in range(world_size)]
    assert sum(step(share, items, 0).item() for share in shares) == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(step.flat_grads, 2 * grads, atol=1e-5)  # they were added to those of the whole


def test_rows_are_partitioned_so_that_all_have_about_as_many_tokens():
    rows = [{"input_ids": [0] * length} for length in range(100, 164)]
    tokens = [sum(len(row["input_ids"]) for row in distributed.partition(rows, rank, 4)) for rank in range(4)]
    assert sum(tokens) == sum(range(100, 164)) and max(tokens) == min(tokens)
    assert distributed.partition(rows, 0, 1) == rows


def test_no_two_steps_or_processes_draw_the_same_dropout():
    drawn = {training_step.dropout_seed(42, step, rank, 4) for step in range(100) for rank in range(4)}
    assert len(drawn) == 400 and min(b - a for a, b in itertools.pairwise(sorted(drawn))) >= 28 * training_step.SALTS


def test_dropout_follows_the_same_distribution(attach, rows):
    recipe = replace(EXACT, dropout=0.1)
    model, draws = attach(recipe), 120
    features, items = trainer.as_features(rows[:2]), sum(row.learned for row in rows[:2])
    flat, batch = trainer.flatten(rows[:2]), training_step.collate(features)
    model.train()
    with torch.no_grad():
        stock = torch.stack([model(**flat, use_cache=False).loss for _ in range(draws)])
    step = training_step.TrainingStep(model, 384)
    ours = torch.stack([step(batch, items, training_step.dropout_seed(1, number)) for number in range(draws)])
    error = math.sqrt((stock.var() + ours.var()) / draws)
    assert abs(stock.mean() - ours.mean()) < 4 * error
    assert 0.7 < (ours.std() / stock.std()).item() < 1.4
    assert len(set(ours.tolist())) == draws


def test_a_gradient_that_is_not_finite_stops_the_fast_run_and_nothing_broken_is_saved(attach, rows, tmp_path):
    model = attach(EXACT)
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"][0, 0] = 1e38
    with pytest.raises(ValueError, match=r"Step 1: the gradient of .*lora.* is not finite.*--resume"):
        train(model, rows, replace(EXACT, save_steps=1), tmp_path, "fast")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_fast_run_resumes_exactly_and_serves_what_it_learned(tiny_run, monkeypatch):
    fields = {
        "epochs": 6,
        "dropout": 0.1,
        "validation_rows": 0,
        "probe_replies": 0,
        "long_chats": 0,
        "reply_tokens": 1,
        "save_steps": 5,
    }
    straight = replace(tiny_run(name="straight", **fields), profile="fast")
    run(straight)

    def stop_at_seven(self, args, state, control, **_):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        if self.asked:
            control.should_save = control.should_training_stop = True

    broken = replace(tiny_run(name="broken", **fields), profile="fast")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.StopOnInterrupt, "on_step_end", stop_at_seven)
        with pytest.raises(trainer.Interrupted, match="step 7 is saved"):
            run(broken)
    run(replace(broken, resume=True))
    whole, resumed = (load_file(job.output / WEIGHTS) for job in (straight, broken))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_fast_refuses_what_it_does_not_compute(tiny_run):
    with pytest.raises(ValueError, match="seven layers"):
        run(replace(tiny_run(layers=("q_proj", "v_proj")), profile="fast"))


OTHER_BASES = {
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "layer_types ['sliding_attention'": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "rope_parameters {'rope_type': 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    },
    "attention_dropout 0.5": {"attention_dropout": 0.5},
}


@pytest.fixture
def other_base(tiny_base, tmp_path):
    """A function that makes the tiny base with other values in its config."""

    def make(fields):
        folder = shutil.copytree(tiny_base, tmp_path / "other")
        config = read_json(folder / "config.json")
        del config["layer_types"]
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return make


@pytest.mark.parametrize("reason", OTHER_BASES)
def test_a_base_that_is_computed_in_another_way_is_not_trained_fast(reason, other_base, tiny_run, monkeypatch):
    folder = other_base(OTHER_BASES[reason])
    job = replace(tiny_run(), profile="fast")
    job = replace(job, recipe=replace(job.recipe, base=str(folder)))
    with pytest.raises(ValueError, match=re.escape(reason) + ".*Leave --profile out") as refused:
        run(job)
    assert str(refused.value).startswith("The fast profile cannot train this base") and not job.output.exists()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        supported.require_supported(config, {})
    monkeypatch.setattr(supported, "gpu_supported", lambda: True)
    assert preflight.choose_profile(replace(job, profile="auto")) == "fast"
    assert preflight.choose_profile(replace(job, profile="auto"), config) == "faithful"


def test_another_model_is_not_trained_fast():
    assert supported.unsupported(Qwen3Config()) == "our Qwen2 is no qwen3"


@pytest.mark.parametrize("fields", [OTHER_BASES["hidden_act 'gelu'"], OTHER_BASES["layer_types ['sliding_attention'"]])
def test_the_first_loss_shows_a_base_that_the_guard_does_not_know(fields, other_base, rows, monkeypatch):
    monkeypatch.setattr(training_step, "require_supported", lambda *_: None)
    model = trainer.attach(load_base(locate(str(other_base(fields)))), TINY)
    with pytest.raises(ValueError, match=r"first loss is [\d.]+, that of transformers' model [\d.]+"):
        preflight.check_step(model, training_step.TrainingStep(model, 384), rows[:4])


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_losses_agree_whatever_the_dropout_and_leave_no_gradient(tied, checkpoint, rows):
    base = load_base(checkpoint)
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
    model = trainer.attach(base, replace(TINY, dropout=0.5))
    said = preflight.check_step(model, training_step.TrainingStep(model, 384), rows[:4])
    first, second = re.findall(r"\d\.\d+", said)
    assert float(first) == pytest.approx(float(second), abs=2e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_step_refuses_a_lora_that_it_does_not_compute(attach):
    with pytest.raises(RuntimeError, match="seven layers"):
        training_step.TrainingStep(attach(replace(EXACT, layers=("q_proj", "v_proj"))), 384)
