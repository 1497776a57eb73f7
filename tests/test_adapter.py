"""The gate: a trained adapter opens; every other folder is refused with one sentence and its remedy."""

import json
import logging
import math
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat.adapter import CONFIG, METRICS, RECIPE, WEIGHTS, Adapter, _expected_shapes, find, name_of, same_model
from chat.bases import SMALL
from chat.local import LocalEngine
from chat.persona import SYSTEM_PROMPT
from chat.sampling import Sampling


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
    "peft_type IA3 is not a LoRA. Train": lambda f: edit(f / CONFIG, peft_type="IA3"),
    "it sets lora_bias": lambda f: edit(f / CONFIG, lora_bias=True),
    "it sets alora_invocation_tokens": lambda f: edit(f / CONFIG, alora_invocation_tokens=[1]),
    "it sets bias": lambda f: edit(f / CONFIG, bias="all"),
    "it sets init_lora_weights": lambda f: edit(f / CONFIG, init_lora_weights="pissa"),
    "has lora_alpha 'much'": lambda f: edit(f / CONFIG, lora_alpha="much"),
    "has lora_alpha 0; it may be 0.001": lambda f: edit(f / CONFIG, lora_alpha=0),
    "has lora_alpha nan": lambda f: edit(f / CONFIG, lora_alpha=float("nan")),
    "has lora_dropout 2": lambda f: edit(f / CONFIG, lora_dropout=2),
    "was trained on other/base, this base is tiny": lambda f: edit(f / CONFIG, base_model_name_or_path="other/base"),
    "holds .*, but target_modules in .* lacks it": lambda f: edit(f / CONFIG, target_modules=["q_proj"]),
    "it sets layers_to_transform": lambda f: edit(f / CONFIG, layers_to_transform=0),
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


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# adapter_config.json as PEFT 0.11.1 wrote it in the tutorial's script, and what later ones and other programs write.
PEFT_0_11_1 = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "/root/autodl-tmp/qwen/Qwen2___5-7B-Instruct",
    "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_alpha": 32, "lora_dropout": 0.1, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": SEVEN, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
PEFT_0_18_1 = PEFT_0_11_1 | {
    "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "lora_bias": False, "peft_version": "0.18.1", "qalora_group_size": 16,
    "target_parameters": None, "trainable_token_indices": None, "use_qalora": False,
}  # fmt: skip
PEFT_0_21_2 = PEFT_0_18_1 | {
    "kasa_config": None, "lora_ga_config": None, "monteclora_config": None, "peft_version": "0.21.2",
    "use_bdlora": None, "velora_config": None,
}  # fmt: skip
FULL_NAMES = [f"model.layers.{n}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for n in (0, 1) for name in SEVEN]
OTHERS = {
    "the tutorial's script, PEFT 0.11.1": PEFT_0_11_1,
    "LLaMA-Factory 0.9.5, PEFT 0.18.1": PEFT_0_18_1 | {"lora_alpha": 16, "lora_dropout": 0.0},
    "TRL 1.16, PEFT 0.21.2": PEFT_0_21_2 | {"lora_dropout": 0.0},
    "TRL 1.16, all-linear": PEFT_0_21_2 | {"target_modules": FULL_NAMES, "use_rslora": True},
    "Unsloth": PEFT_0_18_1
    | {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True}, "modules_to_save": []},
    "no base, an option of tomorrow": PEFT_0_21_2 | {"base_model_name_or_path": None, "tomorrow_config": None},
}


def of_others(trained, folder, config=PEFT_0_11_1):
    """A folder as other programs write it: weights in fp32, no recipe."""
    folder.mkdir(parents=True)
    save_file({name: tensor.float() for name, tensor in load_file(trained.folder / WEIGHTS).items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def say(engine, name):
    asked = [{"role": "user", "content": "你是谁？"}], [name], Sampling(temperature=0, max_new_tokens=16)
    return "".join(chunk.text for chunk in engine.stream(*asked, threading.Event()))


@pytest.mark.parametrize("tool", OTHERS)
def test_an_adapter_of_another_program_opens_and_answers(trained, checkpoint, tmp_path, tool):
    adapter = Adapter.open(of_others(trained, tmp_path / "her", OTHERS[tool]), checkpoint)
    assert adapter.unstated == ("prompt", "base") and adapter.recipe == {}
    engine = LocalEngine(checkpoint, [adapter])
    engine.wait()
    assert engine.unstated == {"her": ("prompt", "base")} and not engine.refused
    config = OTHERS[tool]
    scale = config["lora_alpha"] / (math.sqrt(8) if config["use_rslora"] else 8)
    layer = engine.model.get_base_model().model.layers[1].self_attn.q_proj
    assert layer.scaling["her"] == pytest.approx(scale) == pytest.approx(adapter.alpha / 8)
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(layer.lora_B["her"].weight, load_file(adapter.folder / WEIGHTS)[stem])
    assert scale != 4 or say(engine, "her") == "臣妾明白。"


def test_the_last_checkpoint_of_a_trainer_is_opened_beside_its_pickles(trained, checkpoint, tmp_path, monkeypatch):
    for step in (9, 100, 20):
        folder = of_others(trained, tmp_path / "Qwen2.5_instruct_lora" / f"checkpoint-{step}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"):
            (folder / name).write_bytes(b"pickle")
    (tmp_path / "Qwen2.5_instruct_lora" / "checkpoint-best").mkdir()
    ((adapter,), refused) = find(checkpoint, tmp_path)
    assert (adapter.name, adapter.folder.name, refused) == ("Qwen2-5_instruct_lora", "checkpoint-100", [])
    assert Adapter.open(folder, checkpoint).name == "checkpoint-20"
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which can run code"):
        Adapter.open(folder, checkpoint)


def test_a_prompt_is_told_by_adapters_and_another_one_is_refused(trained, checkpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    folder = of_others(trained, tmp_path / "her")
    for setting in (f"her={folder};prompt={SYSTEM_PROMPT}", f"{folder}, prompt={SYSTEM_PROMPT}"):
        monkeypatch.setenv("ADAPTERS", setting)
        ((adapter,), refused) = find(checkpoint, tmp_path / "none")
        assert (adapter.name, adapter.unstated, refused) == ("her", ("base",), [])
    assert "Qwen2___5-7B-Instruct as its base" in caplog.text and "prompt=TEXT" not in caplog.text
    monkeypatch.setenv("ADAPTERS", f"her={folder}")
    assert find(checkpoint, tmp_path / "none")[0][0].unstated == ("prompt", "base")
    assert f"write her={folder};prompt=TEXT in ADAPTERS" in caplog.text
    monkeypatch.setenv("ADAPTERS", f"her={folder};prompt=你是狗, second={folder}")
    opened, (refused,) = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == ["second"] and "under the prompt '你是狗'" in refused
    (folder / RECIPE).write_text('{"system_prompt": 5}')
    with pytest.raises(ValueError, match=r"recipe\.json has system_prompt 5; it must be text"):
        Adapter.open(folder, checkpoint)


@pytest.mark.parametrize("folder", ["a.b", "lr=1e-4", "她 r8"])
def test_a_folder_gives_a_name_that_can_be_served(folder, trained, checkpoint, tmp_path, monkeypatch):
    where = of_others(trained, tmp_path / folder)
    monkeypatch.setenv("ADAPTERS", f"{where}, b={where}")
    opened, refused = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == [name_of(folder), "b"] and not refused
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTERS", folder)
    opened, refused = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == [name_of(folder)] and not refused


def test_a_name_that_cannot_be_served_is_told_with_the_form(trained, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"a.b={trained.folder}")
    assert "NAME=SOURCE" in find(checkpoint, tmp_path)[1][0]


@pytest.mark.parametrize(
    ("stated", "same"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", True),
        ("/root/autodl-tmp/qwen/Qwen2___5-7B-Instruct/", True),
        (r"D:\models\Qwen2.5-7B-Instruct", True),
        ("unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit", True),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", False),
        ("Qwen/Qwen2.5-7B", False),
    ],
)
def test_a_base_is_known_by_its_name_wherever_it_lay(stated, same):
    assert same_model(stated, "Qwen/Qwen2.5-7B-Instruct") is same


def test_a_path_leaves_it_to_the_dimensions_and_an_id_does_not(trained, checkpoint, tmp_path):
    folder = of_others(trained, tmp_path / "all" / "her")
    assert len(find(checkpoint, tmp_path / "all")[0]) == 1
    edit(folder / CONFIG, base_model_name_or_path="Qwen/Qwen2.5-7B-Instruct")
    assert find(checkpoint, tmp_path / "all") == ([], [])  # it is for another base
    with pytest.raises(ValueError, match=r"write tiny as base_model_name_or_path in adapter_config\.json"):
        Adapter.open(folder, checkpoint)
    shapes = {name: torch.ones(shape) for name, shape in _expected_shapes(8, SMALL.dimensions, dora=False).items()}
    save_file(shapes, folder / WEIGHTS)
    edit(folder / CONFIG, base_model_name_or_path="/models/qwen")
    assert find(checkpoint, tmp_path / "all") == ([], [])
    with pytest.raises(ValueError, match=r"Choose its own base, small\."):
        Adapter.open(folder, checkpoint)


WRONG = (None, True, False, 0, 3, 1.5, 10**30, "", "x", [], [1], ["q_proj"], [["q_proj"]], {}, {"q_proj": [1]})


def test_no_value_of_any_field_stops_the_others(trained, checkpoint, tmp_path):
    of_others(trained, tmp_path / "good")
    path = of_others(trained, tmp_path / "spoiled") / CONFIG
    for field in [*PEFT_0_21_2, "tomorrow_config"]:
        for value in WRONG:
            path.write_text(json.dumps({**PEFT_0_21_2, field: value}))
            opened, refused = find(checkpoint, tmp_path)
            assert opened[0].name == "good" and len(opened) + len(refused) == 2, (field, value)
            for sentence in refused:
                assert "\n" not in sentence and sentence.endswith(".") and str(path.parent) in sentence
                assert field in sentence or (field, value) == ("use_dora", True), sentence


UNREADABLE = {
    "is not JSON": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "holds no JSON object": lambda f: (f / CONFIG).write_text("[]"),
    "adapter_config.json is a pointer of git-lfs, not the file. Run `git lfs pull`": lambda f: point(f / CONFIG),
    "adapter_model.safetensors is a pointer of git-lfs": lambda f: point(f / WEIGHTS),
    "metrics.json cannot be read": lambda f: (f / METRICS).mkdir(),
    "adapter_config.json is missing": lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()),
    "is not a whole safetensors file": lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 100),
    "is F64; it must be one of BF16, F16, F32": lambda f: reweigh(f, lambda w: {n: t.double() for n, t in w.items()}),
}


def point(path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_folder_that_cannot_be_read_is_a_sentence_and_the_others_are_served(trained, checkpoint, tmp_path, message):
    of_others(trained, tmp_path / "good")
    UNREADABLE[message](of_others(trained, tmp_path / "spoiled"))
    opened, (refused,) = find(checkpoint, tmp_path)
    assert [adapter.name for adapter in opened] == ["good"]
    assert message in refused and "spoiled" in refused and "\n" not in refused and refused.endswith(".")


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
