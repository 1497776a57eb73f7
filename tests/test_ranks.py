"""A run by two processes is the run of one: the same losses and one adapter, also when it goes on on another number."""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from chat.adapter import METRICS, WEIGHTS
from tests.conftest import ROOT, TAUGHT
from training import plots
from training.recipe import HUANHUAN
from training.run import main
from training.trainer import SharingTrainer, arguments, last_checkpoint

WAYS = {"faithful": "faithful", "fast": "fast", "pieces": "faithful"}  # of sharing a run, and the profile of each
# Five rows, four a step: the second step of each epoch has one row for two processes. Step 3 is in mid-epoch.
ASKED = {"batch_size": 2, "accumulation": 2, "epochs": 3, "held_out": 3, "probe_replies": 0, "long_chats": 0,
         "reply_tokens": 1, "logging_steps": 1, "save_steps": 3, "rank": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """Each way: `alone`; `together`; `joined`, begun alone and ended by two; `left`, begun by two and ended alone."""
    where = tmp_path_factory.mktemp("ranks")
    common = ["tiny", "--base", str(tiny_base), "--dataset", str(TAUGHT)]
    common += [word for name, value in ASKED.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def words(who, way):
        out, work = str(where / who / way), str(where / f"{who}-work" / way)
        return [*common, "--profile", WAYS[way], "--output", out, "--work", work]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss", "radar", "markers"):
            patch.setattr(plots, name, lambda metrics, path: path.touch())  # a second for each run

        def alone(*line):
            patch.setattr(sys, "argv", ["run", *line])
            main()

        for way, profile in WAYS.items():
            if way == profile:
                alone(*words("alone", way))
            cut_off(where / "alone-work" / profile, where / "joined-work" / way)
        launch(
            [(way == "pieces", words("together", way)) for way in WAYS]
            + [(way == "pieces", [*words("joined", way), "--resume"]) for way in WAYS]
            + [(False, [*words("MACHINE", "fast"), "--save-on-each-node"])]
        )
        for way in WAYS:
            cut_off(where / "together-work" / way, where / "left-work" / way)
            alone(*words("left", way), "--resume")
    return where


def cut_off(work, copy):
    """A copy of a run's folder as it was after step 3."""
    shutil.copytree(work, copy)
    shutil.rmtree(copy / "checkpoint-6")
    assert last_checkpoint(copy).name == "checkpoint-3"


def launch(runs):
    """Two processes, each the only one of its machine, do the runs one after another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    common |= asked_by("training/fsdp.yaml") | {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.together", json.dumps(runs)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=110)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert [text.count("Forecast:") for text in said] == [len(runs), 0]  # only the first one speaks


def asked_by(config):
    """What `accelerate launch` puts into the environment for a configuration."""
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(ROOT / config), "tests/together.py"])
    )
    assert args.use_fsdp and args.num_processes == 2
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(("FSDP", "ACCEL"))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("who", ["together", "joined", "left"])
def test_the_losses_are_those_of_one_process(folder, who, way):
    one, other = (
        json.loads((folder / name / METRICS).read_text(encoding="utf-8"))
        for name in (f"alone/{WAYS[way]}", f"{who}/{way}")
    )
    assert [step for step, _ in other["loss_curve"]] == [*range(1, 7)]
    assert [loss for _, loss in other["loss_curve"]] == pytest.approx([loss for _, loss in one["loss_curve"]], rel=1e-5)
    held_out = [[entry["loss"] for entry in metrics["heldout_by_epoch"]] for metrics in (one, other)]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-5) and len(held_out[0]) == 3
    assert other["heldout_loss"]["value"] == pytest.approx(one["heldout_loss"]["value"], abs=1e-4)


def test_each_machine_gets_checkpoints_and_adapter_when_asked(folder):
    first, other = (load_file(folder / f"machine{rank}" / "fast" / WEIGHTS) for rank in "01")
    assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    assert all(last_checkpoint(folder / f"machine{rank}-work" / "fast").name == "checkpoint-6" for rank in "01")


def test_deepspeeds_configuration_takes_its_numbers_from_the_recipe(tmp_path):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    # Transformers' class without DeepSpeed, which it asks for when it is made and needs for nothing that is done here.
    filling = {name: what for name, what in vars(HfTrainerDeepSpeedConfig).items() if name != "__init__"}
    parsed = type("Parsed", (HfDeepSpeedConfig,), filling)(str(ROOT / "training" / "deepspeed.json"))
    parsed.mismatches = []
    parsed.trainer_config_process(arguments(HUANHUAN, tmp_path))
    parsed.trainer_config_finalize(arguments(HUANHUAN, tmp_path), None, 702)  # raises for what does not fit
    assert parsed.is_zero2() and not parsed.is_offload()
    assert (parsed.config["train_batch_size"], parsed.config["gradient_clipping"]) == (16, 1.0)
    assert "auto" not in str(parsed.config)


def test_a_run_that_goes_on_on_another_number_does_not_draw_its_first_dropout_again(tmp_path):
    (tmp_path / "rng_state_0.pth").touch()  # of a run by several processes
    drawn = []
    for step in (0, 100):
        stub = SimpleNamespace(args=SimpleNamespace(seed=42), state=SimpleNamespace(global_step=step))
        SharingTrainer._load_rng_state(stub, str(tmp_path))
        drawn.append(torch.rand(8).tolist())
    torch.manual_seed(42)
    assert len({tuple(row) for row in [*drawn, torch.rand(8).tolist()]}) == 3


def test_the_table_of_several_gpus_compares_each_way_with_one_gpu():
    from benchmarks.scale import compare

    def line(gpus, way, seconds, losses):
        numbers = {"tokens_per_second": 1, "peak_gib": 1.0}
        return {"gpus": gpus, "way": way, "rows": 16, "step_seconds": seconds, "losses": losses, **numbers}

    measured = [line(1, "ddp", 2.0, [3.0, 2.0]), line(2, "ddp", 1.25, [3.0, 2.0]), line(2, "fsdp2", 2.0, [3.1, 1.9]),
                line(2, "fast", 0.1, [3.0])]  # fmt: skip
    table = compare(measured)
    assert [row["efficiency"] for row in table] == [100.0, 80.0, 50.0, None]
    assert [row["loss_difference"] for row in table] == [0.0, 0.0, 0.1, None]
