"""A run by two processes is the run of one: the same losses and one adapter, also when it goes on on another number."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from chat.adapter import METRICS, WEIGHTS
from tests.conftest import ROOT, TAUGHT
from training.distributed import partition
from training.evaluate import plots
from training.pipeline import run
from training.recipe import TINY
from training.run import main
from training.trainer import last_checkpoint, seed_dropout

PROFILES = ("faithful", "fast")
# Five rows, four a step: the second step of each epoch has one row for two processes. Step 3 is in mid-epoch.
ASKED = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 3, "validation_rows": 3, "probe_replies": 0,
         "long_chats": 0, "reply_tokens": 1, "logging_steps": 1, "save_steps": 3, "rank": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """Each profile `alone`, `together`, `joined` (begun alone, ended by two), and `left` (the other way)."""
    where = tmp_path_factory.mktemp("distributed")
    common = ["tiny", "--base", str(tiny_base), "--dataset", str(TAUGHT)]
    common += [word for name, value in ASKED.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def words(who, profile):
        out, work = str(where / who / profile), str(where / f"{who}-work" / profile)
        return [*common, "--profile", profile, "--output", out, "--work", work]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss", "radar", "markers"):
            patch.setattr(plots, name, lambda metrics, path: path.touch())  # a second for each run

        def alone(*line):
            patch.setattr(sys, "argv", ["run", *line])
            main()

        for profile in PROFILES:
            alone(*words("alone", profile))
            cut_off(where / "alone-work" / profile, where / "joined-work" / profile)
        launch(
            [words("together", profile) for profile in PROFILES]
            + [[*words("joined", profile), "--resume"] for profile in PROFILES]
            + [[*words("MACHINE", "fast"), "--save-on-each-node"]]
        )
        for profile in PROFILES:
            cut_off(where / "together-work" / profile, where / "left-work" / profile)
            alone(*words("left", profile), "--resume")
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
    common |= {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.together", json.dumps(runs)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=110)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert [text.count("Forecast:") for text in said] == [len(runs), 0]  # only the first one speaks


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("who", ["together", "joined", "left"])
def test_the_losses_are_those_of_one_process(folder, who, profile):
    one, other = (
        json.loads((folder / name / profile / METRICS).read_text(encoding="utf-8")) for name in ("alone", who)
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


@pytest.mark.parametrize("setting", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_other_ways_of_sharing_a_run_are_refused_before_anything_is_written(tiny_run, monkeypatch, setting):
    monkeypatch.setenv(setting, "true")
    job = tiny_run()
    with pytest.raises(ValueError, match=r"not supported\. Launch with --multi_gpu"):
        run(job)
    assert not job.work.exists()


def test_each_row_of_a_batch_goes_to_one_process_and_all_have_about_as_many_tokens():
    rows = [{"input_ids": [row] * length} for row, length in enumerate((1, 5, 3, 8, 2, 7))]
    shares = [partition(rows, rank, 3) for rank in range(3)]
    assert sorted(row["input_ids"][0] for share in shares for row in share) == [*range(6)]
    assert [sum(len(row["input_ids"]) for row in share) for share in shares] == [9, 9, 8]
    assert partition(rows, 0, 1) == rows and partition(rows[:1], 1, 2) == []


def test_a_run_that_goes_on_on_another_number_does_not_draw_its_first_dropout_again(tmp_path):
    drawn = []
    for step in (1, 100):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "rng_state_0.pth").touch()  # of a run by several processes
        seed_dropout(replace(TINY, seed=42), checkpoint)
        drawn.append(torch.rand(8).tolist())
    torch.manual_seed(42)
    assert len({tuple(row) for row in [*drawn, torch.rand(8).tolist()]}) == 3


def test_the_table_of_several_gpus_compares_each_way_with_one_gpu():
    from benchmarks.scale import compare

    def line(gpus, way, seconds, losses):
        numbers = {"tokens_per_second": 1, "peak_gib": 1.0}
        return {"gpus": gpus, "way": way, "rows": 16, "step_seconds": seconds, "losses": losses, **numbers}

    measured = [line(1, "ddp", 2.0, [3.0, 2.0]), line(2, "ddp", 1.25, [3.0, 2.0]), line(4, "ddp", 1.0, [3.1, 1.9]),
                line(2, "fast", 0.1, [3.0])]  # fmt: skip
    table = compare(measured)
    assert [row["efficiency"] for row in table] == [100.0, 80.0, 50.0, None]
    assert [row["loss_difference"] for row in table] == [0.0, 0.0, 0.1, None]
