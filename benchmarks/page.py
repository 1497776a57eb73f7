"""How much of the engine's speed reaches the visitors: the page beside an engine at a GPU's pace.

python -m benchmarks.page [--visitors 1 8 32 64 128] [--rounds 3] [--yesterday COMMIT]

Each visitor asks one question over the API, all at the same moment, from a process of their own. The engine is
scripted: 128 letters a reply at 160 letters a second each, on a clock of its own, so a reply takes it 0.8 s however
many are generated. Ours and yesterday's build are asked in turn within a round; a row holds medians over the rounds.
`reply_ratio` is the median visitor's time from question to end over those 0.8 s; `lost` counts replies that are not
whole, or another visitor's. The browser is measured by `benchmarks.page_browser`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import results
from benchmarks.serve import worktree

NAME = "page-flow"
ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("page_worker.py")
LETTERS, LETTERS_PER_SECOND = 128, 160  # of a reply, as page_worker.py has them
OWN_SECONDS = LETTERS / LETTERS_PER_SECOND
SLOTS = 128
UNITS = {
    "reply_ratio": "times the engine's own", "letters_per_second": "in all", "first_letter_ms": "ms",
    "first_letter_p99_ms": "ms", "cpu_ms_per_reply": "ms",
}  # fmt: skip
UNLIMITED = dict.fromkeys(("VISITOR_MESSAGES", "VISITOR_TOKENS", "ALL_MESSAGES", "ALL_TOKENS"), "1000000000/minute")
# Visitors → what is to be reached: at most this reply_ratio, at least so many letters a second in all.
GOALS: Mapping[int, tuple[float, float]] = {1: (1.1, 0), 32: (1.5, 4000)}


@contextmanager
def serving(checkout: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The page of a checkout around the scripted engine: its address and its process."""
    environment = os.environ | UNLIMITED | {"PYTHONPATH": str(checkout)}
    with subprocess.Popen(
        [sys.executable, str(WORKER), str(SLOTS)], env=environment, cwd=checkout, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
        process.stdin.close()


def measure(url: str, process: psutil.Process, visitors: int) -> dict[str, float]:
    """One crowd on a page."""
    before = sum(process.cpu_times()[:2])
    command = [sys.executable, "-m", "benchmarks.visitors", url, "--visitors", str(visitors)]
    visits = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    cpu = sum(process.cpu_times()[:2]) - before
    first = sorted(visit["first_letter"] for visit in visits)
    return {
        "reply_ratio": statistics.median(visit["seconds"] for visit in visits) / OWN_SECONDS,
        "letters_per_second": LETTERS * visitors / max(visit["seconds"] for visit in visits),
        "first_letter_ms": 1000 * statistics.median(first),
        "first_letter_p99_ms": 1000 * first[min(len(first) - 1, round(0.99 * len(first)))],
        "cpu_ms_per_reply": 1000 * cpu / visitors,
        "lost": sum(visit["text"] != (visit["question"] * LETTERS)[:LETTERS] for visit in visits),
    }


def row(build: str, visitors: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of the rounds; lost replies are added up."""
    medians = {name: round(statistics.median(one[name] for one in rounds), 3) for name in UNITS}
    return {"build": build, "visitors": visitors, **medians, "lost": int(sum(one["lost"] for one in rounds))}


def main() -> None:
    """Measure, print the table and the goals, and keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--visitors", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--yesterday", default="ed75946", metavar="COMMIT", help="of the build to compare with")
    args = parser.parse_args()
    measured: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        worktree(args.yesterday, Path(folder) / "yesterday") as yesterday,
        serving(yesterday) as before,
        serving(ROOT) as now,
    ):
        builds = {"yesterday": before, "ours": now}
        for _ in range(args.rounds):
            for visitors in args.visitors:
                for build, page in builds.items():
                    measured[build, visitors].append(measure(*page, visitors))
    rows = [row(build, visitors, rounds) for (build, visitors), rounds in measured.items()]
    results.save(NAME, rows, UNITS, yesterday=args.yesterday, rounds=args.rounds, letters=LETTERS,
                 letters_per_second_each=LETTERS_PER_SECOND)  # fmt: skip
    print(results.table(NAME))
    for one in rows:
        if one["build"] == "ours" and one["visitors"] in GOALS:
            ratio, letters = GOALS[one["visitors"]]
            met = one["reply_ratio"] <= ratio and one["letters_per_second"] >= letters
            print(f"{'met' if met else 'MISSED'}: {one['visitors']} visitors, ratio at most {ratio}"
                  + (f", at least {letters:,.0f} letters/s" if letters else ""))  # fmt: skip
    print(f"{'met' if not any(one['lost'] for one in rows) else 'MISSED'}: no reply lost or crossed")


if __name__ == "__main__":
    main()
