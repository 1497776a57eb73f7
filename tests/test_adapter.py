"""The gate: a trained adapter opens; every other folder is refused with one sentence and its remedy."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat.adapter import CONFIG, RECIPE, WEIGHTS, Adapter, _expected_shapes, find
from chat.local import LocalEngine


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the trained adapter, to be spoiled."""
    return shutil.copytree(trained.folder, tmp_path / "adapters" / "spoiled")


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def reweigh(folder, change):
    weights = load_file(folder / WEIGHTS)
    save_file(change(weights), folder / WEIGHTS)


def one(weights, part="q_proj.lora_A"):
    return next(name for name in weights if part in name)


SPOILED = {
    "is not a LoRA. Train": lambda f: edit(f / CONFIG, peft_type="IA3"),
    "it sets lora_bias": lambda f: edit(f / CONFIG, lora_bias=True),
    "it sets alora_invocation_tokens": lambda f: edit(f / CONFIG, alora_invocation_tokens=[1]),
    "it sets bias": lambda f: edit(f / CONFIG, bias="all"),
    "it sets init_lora_weights": lambda f: edit(f / CONFIG, init_lora_weights="pissa"),
    "has lora_alpha 'much'": lambda f: edit(f / CONFIG, lora_alpha="much"),
    "has lora_alpha 0; it may be 0.001": lambda f: edit(f / CONFIG, lora_alpha=0),
    "has lora_alpha nan": lambda f: edit(f / CONFIG, lora_alpha=float("nan")),
    "has lora_dropout 2": lambda f: edit(f / CONFIG, lora_dropout=2),
    "was trained on other/base, this base is tiny": lambda f: edit(f / CONFIG, base_model_name_or_path="other/base"),
    "has rank 4096": lambda f: edit(f / CONFIG, r=4096),
    "has a rank per layer": lambda f: edit(f / CONFIG, rank_pattern={"q_proj": 4}),
    "adapts": lambda f: edit(f / CONFIG, target_modules=["lm_head"]),
    "is not JSON": lambda f: (f / CONFIG).write_text("{"),
    "was trained under the prompt '你是狗'": lambda f: edit(f / RECIPE, system_prompt="你是狗"),
    "can run code": lambda f: (f / "adapter_model.bin").write_bytes(b"pickle"),
    "is not a whole safetensors file": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]),
    "a layer that this base does not have": lambda f: reweigh(
        f, lambda w: {n.replace("layers.1.", "layers.9."): t for n, t in w.items()}
    ),
    "has shape": lambda f: reweigh(f, lambda w: w | {one(w): w[one(w)][:, :-1].contiguous()}),
    "is not finite": lambda f: reweigh(f, lambda w: w | {one(w): torch.full_like(w[one(w)], float("nan"))}),
    "lacks .*lora_A.weight, of a layer that it adapts": lambda f: reweigh(
        f, lambda w: {n: t for n, t in w.items() if n != one(w)}
    ),
}


def test_a_trained_adapter_opens(trained, checkpoint):
    assert Adapter.open(trained.folder, checkpoint) == trained


@pytest.mark.parametrize("message", SPOILED)
def test_a_spoiled_adapter_is_refused(folder, checkpoint, message):
    SPOILED[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as failure:
        Adapter.open(folder, checkpoint)
    assert "\n" not in str(failure.value) and str(failure.value).rstrip().endswith(".")


def test_no_folder_is_refused(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"training\.run"):
        Adapter.open(tmp_path / "nowhere", checkpoint)


def test_an_adapter_that_changes_no_logits_is_refused(folder, checkpoint):
    reweigh(folder, lambda w: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in w.items()})
    engine = LocalEngine(checkpoint, [Adapter.open(folder, checkpoint)])
    engine.wait()
    assert engine.adapters == ["base"] and "changes no logits. Train it again." in engine.refused[0]


def test_infinite_logits_are_refused(folder, checkpoint):
    reweigh(folder, lambda w: {n: torch.full_like(t, 3e38) for n, t in w.items()})
    engine = LocalEngine(checkpoint, [Adapter.open(folder, checkpoint)])
    engine.wait()
    assert engine.adapters == ["base"] and "not finite" in engine.refused[0]


def test_find_opens_the_good_and_names_the_bad(trained, folder, checkpoint):
    shutil.copytree(trained.folder, folder.parent / "good")
    edit(folder / RECIPE, system_prompt="你是狗")
    opened, refused = find(checkpoint, folder.parent)
    assert [adapter.name for adapter in opened] == ["good"] and len(refused) == 1


def test_the_reference_recipe_has_20_185_088_parameters():
    from accelerate import init_empty_weights
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from training.recipe import HUANHUAN
    from training.trainer import attach

    config = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with init_empty_weights():
        model = attach(Qwen2ForCausalLM(config), HUANHUAN)
    shapes = _expected_shapes(8, config.to_dict(), dora=False).values()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 20_185_088 == sum(map(math.prod, shapes))
    assert sum(p.numel() for p in model.parameters()) == 7_635_801_600
