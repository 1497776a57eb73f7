"""training.run as a user meets it: what it prints, what it leaves behind, how it stops and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat.adapter import CONFIG, FILES, RECIPE, WEIGHTS, Adapter
from chat.adapter import ROOT as ADAPTERS
from chat.persona import SYSTEM_PROMPT
from tests.conftest import ROOT, TAUGHT
from training import adapter_files, pipeline, trainer
from training.pipeline import run
from training.preflight import DATA, prepare_folders
from training.recipe import HUANHUAN, POCKET, RECIPES, Recipe, Run
from training.run import main
from training.trainer import Interrupted


def weights(job):
    return load_file(job.output / WEIGHTS)


def test_a_run_leaves_the_contract_and_nothing_else(tiny_run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluate.card.ROOT", tmp_path)
    job = tiny_run(epochs=2)
    adapter = run(job)
    assert adapter == Adapter.open(job.output, checkpoint)
    assert {path.name for path in job.output.iterdir()} == set(FILES)
    assert not list(job.output.parent.glob("*.part"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(job).values())
    metrics = json.loads((job.output / "metrics.json").read_text())
    for name in (
        "heldout_loss",
        "heldout_loss_base",
        "identity_pass_rate",
        "stop_rate",
        "distinct_2",
        "assistant_phrase_rate",
        "canon_pass_rate",
        "attack_pass_rate",
        "long_chat_pass_rate",
        "sign_test_p",
        "chrf",
        "chrf_base",
        "length_ratio",
        "copy_rate",
        "distinct_1",
        "forgetting",
    ):
        assert {"value", "count"} <= set(metrics[name]), name
    assert len(metrics["heldout_by_epoch"]) == 2 and metrics["run"]["forecast seconds"] >= 0
    assert list(job.work.rglob("events.out.tfevents.*")), "no TensorBoard log"
    ledger = (job.output.parent / "README.md").read_text(encoding="utf-8")
    assert str(metrics["heldout_loss"]["value"]) in ledger


def test_a_run_written_elsewhere_leaves_the_readme_there_alone(tiny_run, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    run(tiny_run(epochs=1, validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_preflight_checks_and_the_forecast_are_shown_before_the_first_step(tiny_run, caplog):
    with caplog.at_level("INFO"):
        run(tiny_run(epochs=1, probe_replies=0, long_chats=0, reply_tokens=1))
    lines = [record.getMessage() for record in caplog.records if record.name == "training.pipeline"]
    text = "\n".join(lines)
    marks = ("learned (", "ends on <|im_end|>", "4 of 4 rows begin", "tokens an epoch", "trainable parameters",
             "packed logits equal", "Forecast: 1 steps", "Actual: ", "Parts: ")  # fmt: skip
    found = [text.index(mark) for mark in marks]
    assert found == sorted(found)


def test_only_the_lora_moves_and_all_of_it(tiny_base, checkpoint):
    from chat.base_model import load_base, load_tokenizer
    from training.data import load
    from training.tokens import encode

    recipe = replace(RECIPES["tiny"], epochs=2)
    model = trainer.attach(load_base(checkpoint), recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokenizer = load_tokenizer(checkpoint)
    rows = encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")
    trainer.train(model, rows, recipe, tiny_base.parent / "moves")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


# Fields of LoraConfig in PEFT 0.11.1 (src/peft/tuners/lora/config.py, src/peft/config.py), with which the tutorial ran.
# It refuses any other.
KNOWN_OF_OLD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
LOOKED_FOR = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "bias"}


@pytest.mark.parametrize("folder", [ADAPTERS / "pocket", ADAPTERS / "medium", None])
def test_the_saved_config_opens_in_the_peft_of_the_tutorial(folder, trained):
    text = ((folder or trained.folder) / CONFIG).read_text(encoding="utf-8")
    config = json.loads(text)
    assert LOOKED_FOR <= config.keys() <= KNOWN_OF_OLD
    assert config["target_modules"] == sorted(config["target_modules"]) and config["inference_mode"] is True
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"


@torch.inference_mode()
@pytest.mark.parametrize("changed", [{}, {"rslora": True, "rank": 6, "alpha": 7}, {"rslora": True, "rank": 4},
                                     {"dora": True}])  # fmt: skip
def test_what_is_saved_gives_the_logits_of_what_is_in_memory(checkpoint, tmp_path, changed):
    from peft import PeftModel

    from chat.base_model import load_base

    recipe = replace(RECIPES["tiny"], **changed)
    model = trainer.attach(load_base(checkpoint), recipe).eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins as zero
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    adapter_files.round_to_bf16(model)
    adapter_files.save(model, tmp_path / "her")
    opened = PeftModel.from_pretrained(load_base(checkpoint), tmp_path / "her").eval()
    ids = torch.tensor([[1, 5, 9, 77, 3, 200, 42]])
    with model.disable_adapter():
        plain = model(ids).logits
    torch.testing.assert_close(opened(ids).logits, model(ids).logits)
    assert (plain - model(ids).logits).abs().max() > 1
    config = json.loads((tmp_path / "her" / CONFIG).read_text())
    assert config.keys() <= KNOWN_OF_OLD and config.get("use_dora", False) is recipe.dora
    assert config["lora_alpha"] == (recipe.alpha * recipe.rank**0.5 if recipe.rslora else recipe.alpha)


def test_rslora_is_folded_into_alpha_and_stays_in_the_recipe(tiny_run, checkpoint):
    job = tiny_run(epochs=1, rslora=True, rank=4, validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1)
    run(job)
    assert json.loads((job.output / RECIPE).read_text())["rslora"] is True
    config = json.loads((job.output / CONFIG).read_text())
    assert "use_rslora" not in config and config["lora_alpha"] == 2 * job.recipe.alpha
    assert "folded into `lora_alpha`" in (job.output / "README.md").read_text(encoding="utf-8")
    assert run(replace(job, resume=True)) == Adapter.open(job.output, checkpoint)


@pytest.mark.parametrize("profile", ["faithful", "fast"])
def test_a_run_measures_when_told_stops_early_and_keeps_its_best_weights(tiny_base, checkpoint, tmp_path, profile):
    from chat.base_model import load_base, load_tokenizer
    from qwen2.training_step import TrainingStep
    from training.data import load
    from training.tokens import encode

    recipe = replace(RECIPES["tiny"], epochs=20, eval_every=2, patience=2)
    model = trainer.attach(load_base(checkpoint), recipe)
    tokenizer = load_tokenizer(checkpoint)
    rows = encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")[:8]
    losses, seen = iter([3.0, 2.0, 2.5, 2.0, 9.0]), []

    def measure():
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return {"heldout_loss": next(losses)}

    step = TrainingStep(model, recipe.max_length) if profile == "fast" else None
    history = trainer.train(model, rows, recipe, tmp_path, measure=measure, step=step)
    assert [entry["step"] for entry in history if "heldout_loss" in entry] == [2, 4, 6, 8]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(weights[name], seen[1][name]) for name in weights)
    assert not all(torch.equal(seen[3][name], seen[1][name]) for name in weights)


def test_stopping_early_without_held_out_rows_is_refused():
    with pytest.raises(ValueError, match="held-out rows"):
        replace(RECIPES["tiny"], validation_rows=0, patience=2)


def test_resume_is_exact_to_the_bit(tiny_run, monkeypatch):
    fields = {
        "epochs": 6,
        "dropout": 0.1,
        "validation_rows": 0,
        "probe_replies": 0,
        "long_chats": 0,
        "reply_tokens": 1,
        "save_steps": 5,
    }
    straight = tiny_run(name="straight", **fields)
    run(straight)

    def stop_at_seven(self, args, state, control, **_):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        if self.asked:
            control.should_save = control.should_training_stop = True

    broken = tiny_run(name="broken", **fields)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.StopOnInterrupt, "on_step_end", stop_at_seven)
        with pytest.raises(Interrupted, match=r"step 7 is saved.*--resume"):
            run(broken)
    assert not broken.output.exists()
    run(replace(broken, resume=True))
    one, other = weights(straight), weights(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resume_compares_the_data(tiny_run, tmp_path, caplog):
    job, own = tiny_run(), tmp_path / "own.jsonl"
    own.write_bytes(TAUGHT.read_bytes())
    job = replace(job, recipe=replace(job.recipe, dataset=(str(own),)), resume=True)
    prepare_folders(replace(job, resume=False), job.output, job.work)
    prepare_folders(job, job.output, job.work)
    own.write_text(own.read_text(encoding="utf-8").replace("臣妾", "本宫"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data have changed since the run began: own\.jsonl\."):
        prepare_folders(job, job.output, job.work)
    (job.work / DATA).unlink()
    prepare_folders(job, job.output, job.work)
    assert "data.json is missing" in caplog.text


@pytest.mark.parametrize(
    ("rows", "said"), [(0, "own.jsonl: is empty"), (1, "hold 1 replies to learn; a run needs two")]
)
def test_too_few_rows_end_in_a_sentence(tiny_run, tmp_path, rows, said):
    own = tmp_path / "own.jsonl"
    own.write_text('{"instruction": "早", "output": "早安。"}\n' * rows, encoding="utf-8")
    job = tiny_run()
    with pytest.raises(ValueError, match=said):
        run(replace(job, recipe=replace(job.recipe, dataset=(str(own),))))


def test_a_run_keeps_own_prompts_skips_bad_rows_and_says_what_is_cut(tiny_run, tmp_path, caplog):
    own = tmp_path / "own.jsonl"
    rows = [
        {"system": "你是猫", "instruction": "早", "output": "喵。"}, {"instruction": "早", "output": ""},
        {"instruction": "问" * 90, "output": "答。"}, {"instruction": "讲", "output": "话" * 90},
        {"instruction": "安", "output": "安。"},
    ]  # fmt: skip
    own.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    job = tiny_run(epochs=1, validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1, max_length=200)
    with pytest.raises(ValueError, match=r"line 1, system: (.|\n)*line 2, output: is empty"):
        run(replace(job, recipe=replace(job.recipe, dataset=(str(own),))))
    recipe = replace(job.recipe, dataset=(str(own),), system="own", skip_bad_rows=True)
    adapter = run(Run(recipe=recipe, output=job.output, work=tmp_path / "again"))
    assert adapter.recipe["system"] == "own" and adapter.recipe["skip_bad_rows"] is True
    assert adapter.metrics["run"]["rows learned"] == 3
    assert "1 rows are left out" in caplog.text and "1 lose the end of the reply" in caplog.text


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_checkpoint_that_resumes(tiny_base, tmp_path, told):
    command = [
        sys.executable, "-m", "training.run", "tiny", "--base", str(tiny_base), "--dataset", str(TAUGHT),
        "--validation-rows", "0", "--probe-replies", "0", "--output", str(tmp_path / "out"),
        "--work", str(tmp_path / "work"), "--epochs", "4000",
    ]  # fmt: skip
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list((tmp_path / "work").glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.1)
    started.send_signal(told)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 1 and "Go on with --resume." in said and "Traceback" not in said
    saved = trainer.last_checkpoint(tmp_path / "work")
    state = json.loads((saved / "trainer_state.json").read_text())
    assert f"step {state['global_step']} is saved" in said


def test_several_gpus_in_sight_are_one_to_a_process(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer.TrainingArguments, "n_gpu", property(lambda self: 2))
    assert trainer.training_arguments(RECIPES["tiny"], tmp_path)._n_gpu == 1


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-20").mkdir()
    assert trainer.last_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_gradient_that_is_not_finite_stops_the_run_by_step_and_layer(tiny_run, monkeypatch):
    attach = trainer.attach

    def poisoned(model, recipe, profile):
        adapted = attach(model, recipe)
        layer = adapted.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight
        calls = []

        def spoil(gradient):
            calls.append(1)
            return gradient * float("nan") if len(calls) > 6 else gradient  # 4 rehearsals, 2 good steps

        layer.register_hook(spoil)
        return adapted

    monkeypatch.setattr(trainer, "attach", poisoned)
    with pytest.raises(
        ValueError, match=r"Step 3: the gradient of .*layers\.1\.mlp\.down_proj\.lora_A.* is not finite \(1 of"
    ):
        run(tiny_run(validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1))


def test_resuming_another_recipe_is_refused_by_the_fields_that_differ(tiny_run):
    fields = {"epochs": 1, "validation_rows": 0, "probe_replies": 0, "long_chats": 0, "reply_tokens": 1}
    run(tiny_run(**fields))
    with pytest.raises(ValueError, match="another rank, learning_rate"):
        run(tiny_run(resume=True, **fields, learning_rate=1e-3, rank=4))
    with pytest.raises(ValueError, match="no run to resume"):
        run(tiny_run(resume=True, name="never"))


def test_an_earlier_runs_checkpoints_and_foreign_folders_are_not_overwritten(tiny_run):
    job = tiny_run(epochs=1)
    (job.work / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="--resume"):
        run(job)
    other = tiny_run(name="photos", epochs=1)
    other.output.mkdir()
    with pytest.raises(FileExistsError, match="no adapter of ours"):
        run(other)


def test_a_name_the_page_cannot_offer_is_refused_before_training(tiny_run):
    for name in ("my.adapter", "base"):
        with pytest.raises(ValueError, match="letters, digits"):
            run(tiny_run(name=name))


def test_the_reference_recipe_is_the_tutorials():
    told = {
        "base": "7b", "dataset": ("huanhuan",), "max_length": 384, "rank": 8, "alpha": 32, "dropout": 0.1,
        "batch_size": 4, "gradient_accumulation_steps": 4, "epochs": 3, "learning_rate": 1e-4,
        "terminator": "<|endoftext|>", "schedule": "linear",
        "system_prompt": SYSTEM_PROMPT,
        "layers": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip
    assert {name: getattr(HUANHUAN, name) for name in told} == told
    assert HUANHUAN.steps(3729) == 702


def test_another_system_prompt_is_refused():
    with pytest.raises(ValueError, match=r"persona\.py"):
        replace(POCKET, system_prompt="你是狗")


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_every_recipe_is_a_flag(name):
    from dataclasses import fields

    shown = subprocess.run(
        [sys.executable, "-m", "training.run", name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for field in fields(RECIPES[name]):
        assert f"--{field.name.replace('_', '-')}" in shown.stdout


OLDER = {"held_out": "validation_rows", "accumulation": "gradient_accumulation_steps"}


def test_an_older_recipe_is_read_by_the_names_of_today(tmp_path):
    recipe = replace(POCKET, validation_rows=7, gradient_accumulation_steps=3)
    recipe.write(tmp_path / RECIPE)
    assert Recipe.read(tmp_path / RECIPE) == recipe
    told = json.loads((tmp_path / RECIPE).read_text(encoding="utf-8"))
    older = told | {old: told.pop(new) for old, new in OLDER.items()}
    del older["bits"]  # there were 16 before there was a choice
    (tmp_path / RECIPE).write_text(json.dumps(older), encoding="utf-8")
    assert Recipe.read(tmp_path / RECIPE) == recipe
    (tmp_path / RECIPE).write_text(json.dumps(older | {"colour": "red"}), encoding="utf-8")
    with pytest.raises(ValueError, match="has colour, which no recipe knows"):
        Recipe.read(tmp_path / RECIPE)


def test_older_flags_are_understood_with_a_notice(monkeypatch, caplog):
    given = []
    monkeypatch.setattr(pipeline, "run", given.append)
    monkeypatch.setattr(sys, "argv", ["run", "tiny", "--held-out", "7", "--accumulation=3", "--batch-size", "2"])
    main()
    recipe = given[0].recipe
    assert (recipe.validation_rows, recipe.gradient_accumulation_steps, recipe.batch_size) == (7, 3, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "--held-out is now called --validation-rows.",
        "--accumulation is now called --gradient-accumulation-steps.",
    ]


def test_a_wrong_field_is_a_sentence_not_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run", "tiny", "--base", "nowhere", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="nowhere"):
        main()


def test_a_full_gpu_is_a_sentence_that_says_what_takes_less(monkeypatch):
    def full(job):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline, "run", full)
    monkeypatch.setattr(sys, "argv", ["run", "tiny"])
    with pytest.raises(SystemExit, match=r"--profile faithful.*--batch-size 1.*--bits 4"):
        main()


def test_a_step_that_processes_cannot_share_is_refused(tiny_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 processes cannot share 2 batches.*keeps 8 rows"):
        run(tiny_run(batch_size=4, gradient_accumulation_steps=2))


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", [lambda body: body[: len(body) // 2], lambda body: bytes(len(body))])
def test_a_damaged_checkpoint_is_passed_over_and_named(checkpoints, caplog, name, damage):
    path = checkpoints / "checkpoint-10" / name
    path.write_bytes(damage(path.read_bytes()))
    assert trainer.last_checkpoint(checkpoints) == checkpoints / "checkpoint-9"
    assert f"checkpoint-10 is damaged ({name}); an older one is looked for" in caplog.text


def test_the_newest_whole_checkpoint_is_taken_by_its_number(checkpoints, caplog):
    assert trainer.last_checkpoint(checkpoints) == checkpoints / "checkpoint-10" and not caplog.text


def test_where_every_checkpoint_is_damaged_the_sentence_says_so(checkpoints):
    for path in checkpoints.glob("*/optimizer.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint to resume from\. Delete it, and start without"):
        trainer.last_checkpoint(checkpoints)


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints with the kinds of files that Trainer writes."""
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        save_file({"w": torch.ones(40)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "rng_state.pth"):
            torch.save({"moments": torch.ones(400)}, folder / name)
    return tmp_path


def test_a_run_goes_on_from_the_older_checkpoint_and_says_so(tiny_run, checkpoint, caplog):
    fields = {"epochs": 4, "save_steps": 2, "validation_rows": 0, "probe_replies": 0, "long_chats": 0}
    job = tiny_run(reply_tokens=1, **fields)
    run(job)
    newest = trainer.last_checkpoint(job.work)
    (newest / "optimizer.pt").write_bytes(b"PK")
    assert run(replace(job, resume=True)) == Adapter.open(job.output, checkpoint)
    assert f"{newest} is damaged (optimizer.pt)" in caplog.text


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_sentence(tiny_run, monkeypatch):
    def full(self, folder):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    said = r"^The checkpoint of step 1 cannot be written to .*-work \(\[enforce.*vs 0\)\. Free some disk; --resume"
    with pytest.raises(OSError, match=said):
        run(tiny_run(epochs=1, save_steps=1, validation_rows=0))


@pytest.mark.parametrize(
    "forged",
    [{"batch_size": 0}, {"epochs": float("inf")}, {"epochs": float("nan")}, {"epochs": -1}, {"learning_rate": 0.0},
     {"rank": 65}, {"dropout": 1.0}, {"save_steps": 0}, {"seed": -1}, {"gradient_accumulation_steps": 0}],
    ids=str,
)  # fmt: skip
def test_a_number_that_no_run_can_have_is_refused_before_it(forged):
    ((name, value),) = forged.items()
    with pytest.raises(ValueError, match=f"{name} is {value}. Give --{name.replace('_', '-')} a number from"):
        replace(POCKET, **forged)


@pytest.mark.parametrize("text", ["[]", "{", '{"name": "her"}', "[" * 100_000])
def test_a_recipe_that_cannot_be_read_is_refused_with_its_name(tmp_path, text):
    (tmp_path / RECIPE).write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.json .*Copy the folder again"):
        Recipe.read(tmp_path / RECIPE)
