"""How fast the chat answers on a CPU: ours, yesterday's build, bare llama.cpp, transformers as the tutorial has it.

python -m benchmarks.serve --cpu [--bases small medium] [--rounds 5] [--tokens 48] [--visitors 1 4 8]
                           [--yesterday COMMIT]

Each engine is a process of its own, and only one is asked at a time. Within a round all get the same questions in turn,
so that a busy machine slows all alike; ratios are medians of those within a round. The sampling makes replies long: a
repetition penalty of 2 also halves the logit of `<|im_end|>`, which stands in each prompt. Where a reply has fewer than
24 tokens all the same, other questions are asked instead, with another seed. Speed is counted after the first token;
`all_tokens_per_second`, and both where several ask at once, from the questions to the last token of all.
With medium all processes together take 18 GB.

A GPU is measured by `benchmarks.decode`, with its flags, unless --cpu leaves it alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks import results
from benchmarks.serve_worker import Reply
from chat import gguf_lora
from chat.adapter import Adapter, find
from chat.bases import BASES
from chat.checkpoints import locate
from chat.engine import BASE_ONLY
from chat.gguf_tokenizer import GgufTokenizer
from chat.llama import CONTEXT, SLOTS
from chat.machine import usable_cores
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids

NAME = "serve-cpu"
ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("serve_worker.py")
UNITS = {
    "tokens_per_second": "tokens/s", "all_tokens_per_second": "tokens/s", "first_token_ms": "ms",
    "tenth_turn_ms": "ms", "over_yesterday": "times", "over_llama_cpp": "times", "start_seconds": "s",
    "memory_mb": "MB", "peak_mb": "MB",
}  # fmt: skip
SAMPLING = {"temperature": 1.5, "top_p": 1.0, "top_k": 200, "repetition_penalty": 2.0}
LEAST = 24  # tokens of a reply that is counted
TRIES = 8
ENGINES = ("ours", "yesterday", "llama.cpp", "transformers")
YESTERDAYS_FIRST = "yesterday with the first base"  # beside a second base, so that its ratio is within a round, too
# Settings that would change what is measured.
OWN_CHOICE = ("ENGINE_URL", "MAX_NUM_SEQS", "PLACES", "ADAPTERS", "GOMP_SPINCOUNT")
QUESTION = (
    "{opener}今日是第{n}回来请安，外头下着小雨，路上遇见了几位姐妹，说起从前在王府的旧事，"
    "不知娘娘还记不记得那年冬天的梅花？"
)
ANSWER = "难为你还记着。那年的梅花开得极好，只是如今想来，也不过是旧日光景了。"
Key = tuple[str, str, int]  # engine, adapter, visitors
Seen = dict[Key, list[dict[str, float]]]  # what was measured, by round


@dataclass(frozen=True)
class Model:
    """A base as each engine opens it, with its adapter: files that are there, so that no start fetches or converts."""

    choice: str
    gguf: Path
    dense: Path
    adapter: Adapter
    lora: Path
    tokenizer: GgufTokenizer


def model(choice: str) -> Model:
    """Fetch and convert what is not there yet."""
    from chat import convert

    checkpoint = locate(choice, gguf=True)
    adapter = find(checkpoint)[0][0]
    dense = convert.ensure_converted(locate(choice)).path
    return Model(choice, checkpoint.path, dense, adapter, gguf_lora.cached(adapter), GgufTokenizer(checkpoint.path))


class Worker:
    """An engine in a process of its own."""

    def __init__(self, kind: str, opening: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        """Start it and wait until it can answer."""
        self.log, began = log, time.perf_counter()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER)], env=environment, cwd=log.parent, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._send(do="open", kind=kind, **{"with": opening})
        self.start_seconds = time.perf_counter() - began

    def ask(self, model: Model, conversations: Sequence[list[Message]], adapter: str, **sampling: Any) -> list[Reply]:
        """The replies to conversations that come at the same moment."""
        asked = [{"messages": messages, "ids": prompt_ids(model.tokenizer, messages)} for messages in conversations]
        replies: list[Reply] = self._send(do="ask", asked=asked, adapter=adapter, sampling=SAMPLING | sampling)
        return replies

    def memory(self) -> dict[str, float]:
        """Resident MB, `now` and at its `peak`."""
        held: dict[str, float] = self._send(do="memory")
        return held

    def cpu_seconds(self) -> float:
        """What it has taken of all cores so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _send(self, **fields: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            written = self.log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{self.log.stem} ended instead of answering:\n{written[-2000:]}") from None


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Another commit's files in a folder, as long as this lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    try:
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=False)


def link_cache(cache: Path, models: Sequence[Model]) -> Path:
    """A CHAT_CACHE for yesterday's build, which would convert the bases anew and delete the GGUF: links to ours."""
    for one in models:
        folder = cache / "bases" / one.dense.name
        folder.mkdir(parents=True)
        for file in one.dense.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "served_by.txt").write_text("a link", encoding="utf-8")  # its mark of a whole folder
    return cache


class Openers:
    """How each engine is opened."""

    def __init__(self, logs: Path, yesterday: Path, cache: Path) -> None:
        self.logs, self.yesterday, self.cache = logs, yesterday, cache

    def open(self, engine: str, model: Model) -> Worker:
        """Start an engine by its name."""
        at_home = {name: value for name, value in os.environ.items() if name not in OWN_CHOICE}
        here = at_home | {"PYTHONPATH": str(ROOT)}
        there = at_home | {"PYTHONPATH": str(self.yesterday), "CHAT_CACHE": str(self.cache)}
        there.pop("MODEL_FOLDER", None)
        adapter = {"adapter": str(model.adapter.folder), "name": model.adapter.name}
        bare = {"gguf": str(model.gguf), "lora": str(model.lora), "slots": SLOTS, "context": CONTEXT,
                "threads": usable_cores()}  # fmt: skip
        ways: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
            "ours": ("chat", {"base": model.choice, "engine": "llama"}, here),
            "yesterday": ("chat", {"base": model.choice, "engine": None}, there),
            "llama.cpp": ("bare", bare, at_home),
            "transformers": ("tutorial", {"base": model.choice, "folder": str(model.dense), **adapter}, here),
        }
        worker = Worker(*ways[engine], log=self.logs / f"{engine}-{model.choice}.log")
        print(f"{engine} with {model.choice} is there after {worker.start_seconds:.1f} s", file=sys.stderr, flush=True)
        return worker


def question(n: int) -> Message:
    """A question that nobody asked before: some sixty tokens with the message's template."""
    return {"role": "user", "content": QUESTION.format(opener=OPENERS[n % len(OPENERS)], n=n)}


def chat(start: int) -> tuple[list[Message], list[Message]]:
    """The messages of a chat up to its ninth question, and up to its tenth."""
    messages: list[Message] = []
    for n in range(9):
        messages += [question(start + n), {"role": "assistant", "content": ANSWER}]
    return messages[:-1], [*messages, question(start + 9)]


def answered(worker: Worker, model: Model, adapter: str, n: int, visitors: int, tokens: int) -> list[Reply]:
    """New questions of so many visitors at once, and others when a reply ends early."""
    for tried in range(TRIES):
        asked = [[question(n + 10_000 * tried + visitor)] for visitor in range(visitors)]
        replies = worker.ask(model, asked, adapter, max_new_tokens=tokens, seed=n + 10_000 * tried)
        if min(reply["tokens"] for reply in replies) >= min(LEAST, tokens):
            return replies
    raise RuntimeError(f"{worker.log.stem} ended a reply before {LEAST} tokens, {TRIES} times. Ask more tokens.")


def timed(worker: Worker, model: Model, adapter: str, n: int, visitors: int, tokens: int) -> dict[str, float]:
    """Speeds for so many visitors; for one also the first tokens of a new question and of a tenth turn."""
    replies = answered(worker, model, adapter, n, visitors, tokens)
    whole = sum(reply["tokens"] for reply in replies) / max(reply["end"] for reply in replies)
    if visitors > 1:
        return {"tokens_per_second": whole, "all_tokens_per_second": whole}
    (fresh,) = replies
    ninth, tenth = chat(n + 50)
    worker.ask(model, [ninth], adapter, max_new_tokens=1, seed=n)
    (later,) = worker.ask(model, [tenth], adapter, max_new_tokens=1, seed=n)
    return {
        "tokens_per_second": (fresh["tokens"] - 1) / (fresh["end"] - fresh["first"]), "all_tokens_per_second": whole,
        "first_token_ms": 1000 * fresh["first"], "tenth_turn_ms": 1000 * later["first"],
    }  # fmt: skip


def warm(workers: dict[str, Worker], model: Model, first: Model) -> None:
    """A short reply of each engine, which is not counted."""
    for engine, worker in workers.items():
        own = first if engine == YESTERDAYS_FIRST else model
        worker.ask(own, [[question(0)]], own.adapter.name, max_new_tokens=8, seed=0)


def measure(workers: dict[str, Worker], model: Model, first: Model, picked: argparse.Namespace) -> Seen:
    """Round by round, case by case, every engine in turn."""
    name = model.adapter.name
    cases = [(name, 1), (BASE_ONLY, 1), *((name, visitors) for visitors in picked.visitors if visitors > 1)]
    seen: Seen = defaultdict(list)
    for n in range(1, picked.rounds + 1):
        began = time.perf_counter()
        for case, (adapter, visitors) in enumerate(cases):
            for engine, worker in workers.items():
                own, asked = (first, first.adapter.name) if engine == YESTERDAYS_FIRST else (model, adapter)
                if own is model or case == 0:
                    taken = timed(worker, own, asked, 1000 * n + 100 * case, visitors, picked.tokens)
                    seen[engine, adapter, visitors].append(taken)
        took = time.perf_counter() - began
        print(f"{model.choice}: round {n} of {picked.rounds} took {took:.0f} s", file=sys.stderr, flush=True)
    return seen


def idle(workers: dict[str, Worker], seconds: float = 3) -> dict[str, float]:
    """Percent of a core that each engine takes while nobody asks; one that spins would slow the others."""
    before = {name: worker.cpu_seconds() for name, worker in workers.items()}
    time.sleep(seconds)
    return {name: round(100 * (worker.cpu_seconds() - before[name]) / seconds, 1) for name, worker in workers.items()}


def over(these: list[dict[str, float]], those: list[dict[str, float]], key: str = "tokens_per_second") -> float:
    """The median of the ratios within a round."""
    return statistics.median(a[key] / b[key] for a, b in zip(these, those, strict=True))


def table_rows(workers: dict[str, Worker], model: Model, seen: Seen) -> list[dict[str, Any]]:
    """A row for each engine and case: medians, ratios, and what belongs to the process in its first row."""
    rows: list[dict[str, Any]] = []
    for (engine, adapter, visitors), taken in seen.items():
        if engine == YESTERDAYS_FIRST:
            continue
        row: dict[str, Any] = {"engine": engine, "base": model.choice, "adapters": adapter, "visitors": visitors}
        row |= {key: round(statistics.median(one[key] for one in taken), 2) for key in taken[0]}
        row["over_yesterday"] = round(over(taken, seen["yesterday", adapter, visitors]), 3)
        row["over_llama_cpp"] = round(over(taken, seen["llama.cpp", adapter, visitors]), 3)
        if (adapter, visitors) == (model.adapter.name, 1):
            held = workers[engine].memory()
            row |= {"start_seconds": round(workers[engine].start_seconds, 2), "memory_mb": round(held["now"]),
                    "peak_mb": round(held["peak"])}  # fmt: skip
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Goal:
    """A number to be reached: at least `bound`, or at most."""

    text: str
    found: float
    bound: float
    at_most: bool = False

    def __str__(self) -> str:
        met = self.found <= self.bound if self.at_most else self.found >= self.bound
        wanted = f"at {'most' if self.at_most else 'least'} {self.bound:g}"
        return f"{'met   ' if met else 'missed'}  {self.text}: {self.found:.4g}, {wanted}"


def goals(model: Model, seen: Seen, memory_mb: float) -> list[Goal]:
    """What was to be reached with a base, as far as it was measured."""
    name = model.adapter.name
    ours, yesterday, bare = (seen[engine, name, 1] for engine in ("ours", "yesterday", "llama.cpp"))
    found = []
    if model.choice == "small":
        found.append(Goal(f"{name}, times yesterday's tokens/s", over(ours, yesterday), 2.0))
        found.append(Goal(f"{name}, of bare llama.cpp's tokens/s", over(ours, bare), 0.95))
    if reference := seen.get((YESTERDAYS_FIRST, name, 1)):
        found.append(Goal(f"{name}, times the tokens/s of yesterday's first base", over(ours, reference), 1.2))
    if eight := seen.get(("ours", name, 8)):
        found.append(Goal(f"{name}, 8 visitors together, times one", over(eight, ours, "all_tokens_per_second"), 1.4))
    found.append(Goal(f"{name}, first token, of yesterday's", over(ours, yesterday, "first_token_ms"), 1.2, True))
    allowed = BASES[model.choice].memory / 1e6
    found.append(Goal(f"{name}, resident MB of the process, at its peak", memory_mb, allowed, True))
    return found


def with_base(
    openers: Openers, model: Model, first: Model, picked: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Goal], dict[str, float]]:
    """Rows, goals and idle CPU of one base: four engines alive, and yesterday's first base beside a second one."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in (*ENGINES, *([YESTERDAYS_FIRST] if model is not first else [])):
            opened = openers.open("yesterday", first) if engine == YESTERDAYS_FIRST else openers.open(engine, model)
            stack.callback(opened.close)
            workers[engine] = opened
        warm(workers, model, first)
        taken = idle(workers)
        print(f"{model.choice}: percent of a core while idle: {taken}", file=sys.stderr, flush=True)
        seen = measure(workers, model, first, picked)
        return table_rows(workers, model, seen), goals(model, seen, workers["ours"].memory()["peak"]), taken


def on_cpu(picked: argparse.Namespace) -> None:
    """Measure base by base, keep the rows and print the table and the goals."""
    models = [model(choice) for choice in picked.bases]
    rows: list[dict[str, Any]] = []
    reached: list[Goal] = []
    idling: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, worktree(picked.yesterday, Path(folder) / "yesterday") as yesterday:
        openers = Openers(Path(folder), yesterday, link_cache(Path(folder) / "cache", models))
        for one in models:
            more, found, idling[one.choice] = with_base(openers, one, models[0], picked)
            rows, reached = rows + more, reached + found
            results.save(
                NAME, rows, UNITS, versions=results.versions() | {"xllamacpp": version("xllamacpp")},
                yesterday=picked.yesterday, rounds=picked.rounds, tokens=picked.tokens, sampling=SAMPLING,
                idle_cpu_percent=idling, goals=[str(goal) for goal in reached],
            )  # fmt: skip
    print(results.table(NAME), "", *map(str, reached), sep="\n")


def main() -> None:
    """Measure what this machine has."""
    if "--cpu" in sys.argv:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch asks for one
    else:
        import torch

        if torch.cuda.is_available():
            from benchmarks import decode

            decode.main()
            return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    parser.add_argument("--bases", nargs="+", default=["small", "medium"], choices=["small", "medium"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of each reply")
    parser.add_argument("--visitors", nargs="+", type=int, default=[1, 4, 8], help="at once; 1 is always measured")
    parser.add_argument(
        "--yesterday", default="64f6278", metavar="COMMIT", help="of the build that ours is held against"
    )
    picked = parser.parse_args()
    picked.visitors = sorted({1, *picked.visitors})
    on_cpu(picked)


if __name__ == "__main__":
    main()
