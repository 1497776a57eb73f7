"""Files read when they are damaged, and written while the program is killed or the disk is full."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from chat import gguf_lora
from chat.adapter import CONFIG, METRICS, RECIPE, WEIGHTS, Adapter
from chat.checkpoints import Checkpoint, locate
from chat.files import PART, write_text
from page import conversation
from tests import tiny
from tests.conftest import TAUGHT
from training import adapter_files, data, pipeline
from training.evaluate import card
from training.recipe import TINY, Recipe, Run

Row = dict[str, Any]
KILLS = 200
LONGEST = 0.06  # seconds until a kill
ROOM = 4096  # bytes that a file may have on the full disk


def child(work: Callable[[], None]) -> int:
    """Run this in a process of its own, forked; return its number."""
    if number := os.fork():
        return number
    with contextlib.suppress(BaseException):
        work()
    os._exit(0)


def trained(folder: Path) -> tuple[Adapter, Checkpoint]:
    """The tests' tiny adapter, trained as a user would, and its base."""
    base = tiny.make(folder / "tiny")
    os.environ["CHAT_CACHE"] = str(folder / "cache")
    made = {"base": str(base), "dataset": (str(TAUGHT),)}
    recipe = replace(TINY, **made, epochs=1, probe_replies=0, long_chats=0, reply_tokens=1)  # type: ignore[arg-type]
    adapter = pipeline.run(Run(recipe=recipe, output=folder / "adapters" / "her", work=folder / "work"))
    assert adapter
    return adapter, locate(str(base))


def swapped(adapter: Adapter, checkpoint: Checkpoint) -> Callable[[], None]:
    """Version after version of an adapter takes the place of the one before; each file of it holds the version."""

    def work() -> None:
        version, folder = read_version(adapter.folder), adapter.folder
        while True:
            version += 1
            part = folder.with_name(folder.name + PART)
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(folder, part)
            write_version(part, version)
            adapter_files.open_and_rename(part, folder, checkpoint)

    return work


def write_version(folder: Path, version: int) -> None:
    """Write the version into each file that can hold it."""
    for name, key in ((METRICS, "steps"), (RECIPE, "seed")):
        adapter_files.write_json(folder / name, json.loads((folder / name).read_text()) | {key: version})


def read_version(folder: Path) -> int:
    """The version that all files of a folder agree on. Raises ValueError when they do not, or one is missing."""
    metrics, recipe = (json.loads((folder / name).read_text()) for name in (METRICS, RECIPE))
    if metrics["steps"] != recipe["seed"]:
        raise ValueError(f"{metrics['steps']} and {recipe['seed']} in one folder")
    return int(metrics["steps"])


def written(adapter: Adapter) -> Callable[[], None]:
    """A recipe, metrics, a ledger, a card and a GGUF LoRA, written again and again."""
    folder = adapter.folder
    recipe, metrics = Recipe.read(folder / RECIPE), json.loads((folder / METRICS).read_text())

    def work() -> None:
        while True:
            recipe.write(folder / RECIPE)
            adapter_files.write_json(folder / METRICS, metrics)
            write_text(folder.parent / "README.md", card.ledger(folder.parent))
            write_text(folder / "README.md", card.render(folder.name, folder, metrics))
            gguf_lora.write(adapter, folder.parent / "her.gguf")

    return work


def killed(scale: float, folder: Path, adapter: Adapter, checkpoint: Checkpoint) -> list[Row]:
    """kill -9 at random moments."""
    draw, tries = random.Random(0), round(KILLS * scale)
    write_version(adapter.folder, 1)
    found, versions = Counter[str](), set[int]()
    for _ in range(tries):
        number = child(swapped(adapter, checkpoint))
        time.sleep(draw.uniform(0, LONGEST))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        try:
            Adapter.open(adapter.folder, checkpoint)
            versions.add(read_version(adapter.folder))
        except (ValueError, OSError) as error:
            found[f"{type(error).__name__}: {str(error)[:100]}"] += 1
    rows = [row("kill -9 while an adapter's folder takes the place of another", tries, found,
                f"each time whole, {len(versions)} versions seen")]  # fmt: skip
    recipe, lora = Recipe.read(adapter.folder / RECIPE), adapter.folder.parent / "her.gguf"
    metrics = json.loads((adapter.folder / METRICS).read_text())
    write_text(adapter.folder / "README.md", card.render(adapter.folder.name, adapter.folder, metrics))
    gguf_lora.write(adapter, lora)
    whole = {path: content(path) for path in (adapter.folder / METRICS, adapter.folder / "README.md", lora)}
    found = Counter[str]()
    for _ in range(tries):
        number = child(written(adapter))
        time.sleep(draw.uniform(0, LONGEST))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        try:
            if Recipe.read(adapter.folder / RECIPE) != recipe:
                found["another recipe"] += 1
            found.update(f"{path.name} is half" for path, body in whole.items() if content(path) != body)
        except (ValueError, OSError) as error:
            found[f"{type(error).__name__}: {str(error)[:100]}"] += 1
    what = "kill -9 while recipe, metrics, card, ledger and GGUF are written"
    return [*rows, row(what, tries, found, "old or new each time")]


def content(path: Path) -> object:
    """What a file holds; the tensors of a GGUF by their names, as safetensors reads them in any order."""
    if path.suffix != ".gguf":
        return path.read_bytes()
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def row(what: str, times: int, faults: Counter[str], well: str) -> Row:
    """A line of the table."""
    found = ", ".join(f"{count} × {fault}" for fault, count in faults.items()) or well
    return {"part": "files", "what": what, "times": times, "held": not faults, "found": found}


def note(found: Counter[str], label: str, fault: str) -> None:
    """Count a fault, if there is one."""
    if fault:
        found[f"{label}: {fault}"] += 1


def damages(body: bytes, draw: random.Random) -> Iterator[bytes]:
    """A file truncated, emptied, zeroed, changed in a byte, and of another kind."""
    yield from (body[: draw.randrange(len(body))] for _ in range(8))
    yield from (b"", bytes(len(body)), b"null", b"[]", b"[" * 100_000, b"\xff\xfe" + body, b'{"a": "\\ud800"}', b"5")
    for _ in range(8):
        changed = bytearray(body)
        changed[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def refused(read: Callable[[], object]) -> str:
    """Read; a sentence of ours is well, as is what is still right. Empty where it was, else what came instead."""
    try:
        read()
    except (ValueError, OSError) as error:
        return "" if str(error).endswith((".", "。")) else f"{type(error).__name__}: {str(error)[:80]}"
    except Exception as error:  # noqa: BLE001 - every other one is a fault
        return f"{type(error).__name__}: {str(error)[:80]}"
    return ""


def read(scale: float, folder: Path, adapter: Adapter, checkpoint: Checkpoint) -> list[Row]:
    """Files that are read, damaged in each way."""
    draw, found, tries = random.Random(0), Counter[str](), 0
    copy = folder / "copy"
    readers: dict[str, Callable[[], object]] = {
        CONFIG: lambda: Adapter.open(copy, checkpoint), WEIGHTS: lambda: Adapter.open(copy, checkpoint),
        METRICS: lambda: Adapter.open(copy, checkpoint), RECIPE: lambda: Recipe.read(copy / RECIPE),
    }  # fmt: skip
    for name, reads in readers.items():
        body = (adapter.folder / name).read_bytes()
        for damaged in list(damages(body, draw)):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(adapter.folder, copy)
            (copy / name).write_bytes(damaged)
            tries += 1
            note(found, name, refused(reads))
    for kind in ("folder", "link to nowhere", "missing"):
        for name, reads in readers.items():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(adapter.folder, copy)
            (copy / name).unlink()
            (copy / name).mkdir() if kind == "folder" else None
            (copy / name).symlink_to("nowhere") if kind == "link to nowhere" else None
            tries += 1
            note(found, f"{name}, a {kind}", refused(reads))
    rows = TAUGHT.read_bytes()
    for damaged in damages(rows, draw):
        (folder / "rows.jsonl").write_bytes(damaged)
        tries += 1
        note(found, "examples", refused(lambda: data.load([str(folder / "rows.jsonl")])))
    history = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早安。"}]
    asked = json.dumps({"mode": "ask", "messages": history, "question": "可好？"}, ensure_ascii=False).encode()
    for damaged in damages(asked, draw):
        text = damaged.decode(errors="surrogateescape")
        tries += 1
        note(found, "a request", refused(partial(conversation.TalkRequest.parse, text)))
    return [row("adapter, recipe, examples and requests truncated, of another kind, changed, missing", tries, +found,
                "each a sentence, or read as it was")]  # fmt: skip


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[str]:
    """A folder on a disk of ROOM bytes: a tmpfs where one can be mounted, else a limit on the size of each file."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if not subprocess.run(mount, capture_output=True, check=False).returncode:
        yield "a tmpfs"
        subprocess.run(["umount", str(folder)], check=False)
        return
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, usual[1]))
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield "a limit on the size of files"
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    signal.signal(signal.SIGXFSZ, handled)


def full(scale: float, folder: Path, adapter: Adapter, checkpoint: Checkpoint) -> list[Row]:
    """Each writer on a full disk: a sentence, the old file as it was, nothing half-written."""
    disk = folder / "disk"
    disk.mkdir()
    long = {"text": "长" * 10 * ROOM}
    writers: dict[str, Callable[[], object]] = {
        "metrics": lambda: adapter_files.write_json(disk / "file", long),
        "recipe": lambda: replace(TINY, dataset=("长" * 10 * ROOM,)).write(disk / "file"),
        "card": lambda: write_text(disk / "file", str(long)),
        "GGUF LoRA": lambda: gguf_lora.write(adapter, disk / "file"),
    }
    found = Counter[str]()
    with full_disk(disk) as kind:
        for name, write in writers.items():
            (disk / "file").write_text("old")
            try:
                write()
                found[f"{name}: no error"] += 1
            except OSError as error:
                found[f"{name}: {error}"] += "Free some disk" not in str(error)
            left = [path.name for path in disk.iterdir()]
            found[f"{name}: left {left}"] += left != ["file"] or (disk / "file").read_text() != "old"
    return [row(f"a full disk ({kind}) under metrics, recipe, card, GGUF LoRA", len(writers), +found,
                "each a sentence, the old file as it was, nothing beside it")]  # fmt: skip


def torture(scale: float, folder: Path) -> list[Row]:
    """Read damaged files, kill writers, fill the disk."""
    adapter, checkpoint = trained(folder)
    return [
        line for part in (read, full, killed) for line in part(scale, folder, adapter, checkpoint)
    ]  # fmt: skip
