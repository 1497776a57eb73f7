"""Runs of the tests' tiny recipe killed, told to stop, on a full disk, and with a gradient that is not finite."""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.torture.files import child
from chat.adapter import WEIGHTS
from tests import tiny
from tests.conftest import TAUGHT
from training import pipeline, trainer
from training.recipe import TINY, Run

Row = dict[str, Any]
EXACT = "each ended with the straight run's weights, to the bit"
KILLS = 12  # runs of each kind
ROOM = 30_000  # bytes that a file may have on the full disk: less than a checkpoint needs


def job(folder: Path, name: str, resume: bool = False) -> Run:
    """Thirty steps, a checkpoint at every second."""
    recipe = replace(
        TINY, base=str(folder / "tiny"), dataset=(str(TAUGHT),), epochs=15, dropout=0.1, save_steps=2,
        validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1,
    )  # fmt: skip
    return Run(recipe=recipe, output=folder / name, work=folder / f"{name}-work", resume=resume)


def runs(made: Run, said: Path, prepare: Callable[[], object] = bool) -> Callable[[], None]:
    """The run as training.run does it: what ends it goes into a file, a sentence or the name of an error."""

    def work() -> None:
        prepare()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        try:
            pipeline.run(made)
            said.write_text("done")
        except (ValueError, RuntimeError, OSError) as error:
            said.write_text(f"{type(error).__name__}: {error}")
        except BaseException as error:  # noqa: BLE001 - each other one would be a traceback
            said.write_text(f"traceback of {type(error).__name__}")

    return work


def same(one: Path, other: Path) -> bool:
    """Whether two adapters have the same weights, to the bit."""
    left, right = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stopped(folder: Path, straight: float, told: signal.Signals, tries: int) -> Counter[str]:
    """Runs stopped at random moments, each resumed until it is done; its weights must be the straight run's."""
    draw, found = random.Random(int(told)), Counter[str]()
    for n in range(tries):
        name = f"{told.name}-{n}"
        for attempt in range(30):
            resumable = any((folder / f"{name}-work").glob("checkpoint-*/trainer_state.json"))
            if not resumable:
                shutil.rmtree(folder / f"{name}-work", ignore_errors=True)
            said = folder / "said"
            said.unlink(missing_ok=True)
            number = child(runs(job(folder, name, resume=resumable), said))
            if attempt < 3:
                time.sleep(draw.uniform(0, straight))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, told)
            os.waitpid(number, 0)
            ended = said.read_text() if said.exists() else "killed"
            if ended == "done":
                break
            if ended.startswith("traceback") or (ended != "killed" and "--resume" not in ended):
                found[ended] += 1
        if not (folder / name / WEIGHTS).exists():
            found["never done"] += 1
        elif not same(folder / name, folder / "straight"):
            found["other weights than the straight run"] += 1
    return found


def sentence(folder: Path, name: str, wanted: str, prepare: Callable[[], object]) -> Counter[str]:
    """A run that ends in a sentence with these words, and leaves no adapter."""
    said = folder / "said"
    said.unlink(missing_ok=True)
    os.waitpid(child(runs(job(folder, name), said, prepare)), 0)
    ended = said.read_text() if said.exists() else "killed"
    well = wanted in ended and not (folder / name).exists()
    return Counter() if well else Counter({ended[:200]: 1})


def full_disk() -> None:
    """No file of this process may be larger than ROOM."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))


def planted_nan() -> None:
    """The gradient of one layer is not finite from the fifth step on."""
    base: Any = trainer.FiniteTrainer.__mro__[1]
    step, calls = base.training_step, [0]

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        calls[0] += 1
        if calls[0] >= 5:
            next(p.grad for p in model.parameters() if p.grad is not None)[0, 0] = float("nan")
        return loss

    base.training_step = broken


def torture(scale: float, folder: Path) -> list[Row]:
    """Kills, SIGTERM, a full disk, a planted NaN."""
    torch.set_num_threads(1)
    tiny.make(folder / "tiny")
    os.environ["CHAT_CACHE"] = str(folder / "cache")
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        os.waitpid(child(runs(job(folder, "straight"), folder / "said")), 0)
    straight, tries = time.monotonic() - began, max(1, round(KILLS * scale))
    faults = {
        "kill -9 at random moments, then --resume until done": (
            tries, stopped(folder, straight, signal.SIGKILL, tries), EXACT,
        ),
        "SIGTERM at random moments, then --resume until done": (
            tries, stopped(folder, straight, signal.SIGTERM, tries), EXACT,
        ),
        "a disk that is full at the first checkpoint": (
            1, sentence(folder, "full", "cannot be written", full_disk), "a sentence, no adapter left",
        ),
        "a gradient that is not finite": (
            1, sentence(folder, "nan", "is not finite", planted_nan), "a sentence with step and layer, no adapter left",
        ),
    }  # fmt: skip
    return [
        {"part": "training", "what": what, "times": times, "held": not found,
         "found": ", ".join(f"{count} × {fault}" for fault, count in found.items()) or well}
        for what, (times, found, well) in faults.items()
    ]  # fmt: skip
