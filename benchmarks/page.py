"""What the page costs beside the model: time to the first word in a real browser, and memory over many turns.

python -m benchmarks.page [--clicks 50] [--turns 1000]
python -m benchmarks.page --visitors 64

The engine is a fake that answers at once, so all that is measured is the page: Gradio, the queue, the browser. The
baseline of the time is the engine's own first chunk, in the same process; that of the memory is the tenth turn.
Needs a browser: Debian's chromium, or CHROMIUM.

With --visitors so many ask at once, over the API, a fake engine at a CPU's pace with 1, 8 and 32 slots. The baseline is
the same engine asked by as many threads as it has slots, without a page.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import app
from chat.persona import Message
from chat.sampling import Sampling
from page.service import MAX_WAITING
from tests.fake_engine import FakeEngine

REPLY = "本宫方才还念着你，可巧你就来了。"
RESULTS = Path(__file__).parent / "results" / "page-cpu.json"
PAUSE = 0.05  # seconds before each of her letters when many visit: the small base on two cores
NUM_SLOTS = (1, 8, 32)
# From Enter to the first letter in a bubble that was not there before: both on the browser's own clock.
FIRST_WORD = """(count) => new Promise((done) => {
  const began = performance.now()
  const seen = () => [...document.querySelectorAll('[data-testid=bot]')].length > count
  const look = () => seen() ? done(performance.now() - began) : requestAnimationFrame(look)
  document.querySelector('button.submit-button').click()
  look()
})"""


def clicks(url: str, rounds: int) -> list[float]:
    """Milliseconds from the click to her first letter, for a new question each time."""
    from playwright.sync_api import sync_playwright

    taken = []
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(url)
        tab.wait_for_selector("[data-testid=bot]")
        for _ in range(rounds):
            tab.fill("textarea:visible", "早")
            tab.wait_for_selector("button.submit-button:visible")
            taken.append(tab.evaluate(FIRST_WORD, tab.locator("[data-testid=bot]").count()))
            tab.wait_for_selector("button.submit-button:visible")
            tab.wait_for_timeout(300)
            tab.get_by_role("button", name="Clear").first.click()
            tab.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
        browser.close()
    return taken


def own(rounds: int) -> list[float]:
    """Milliseconds to the engine's own first chunk with no page around it."""
    messages: list[Message] = [{"role": "user", "content": "早"}]
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        next(FakeEngine(REPLY).stream(messages, ["scripted"], Sampling(), threading.Event()))
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def memory(url: str, turns: int) -> dict[int, float]:
    """Megabytes this process holds after the tenth turn and after the last; a new conversation every ten turns."""
    from gradio_client import Client

    held: dict[int, float] = {}
    client = Client(url, verbose=False)
    for turn in range(1, turns + 1):
        if turn % 10 == 1:
            client.reset_session()
        client.predict("早", api_name="/chat")
        if turn in (10, turns):
            held[turn] = psutil.Process().memory_info().rss / 1e6
    return held


def slow_engine(num_slots: int) -> FakeEngine:
    """An engine that answers so many at once, each at the pace of a CPU."""
    engine = FakeEngine(REPLY, pause=PAUSE)
    engine.num_slots = num_slots
    return engine


def pace(num_slots: int) -> float:
    """Seconds a letter with no page around the engine, all its slots taken."""
    engine = slow_engine(num_slots)

    def listen(_: int) -> float:
        stream = engine.stream([{"role": "user", "content": "早"}], ["scripted"], Sampling(), threading.Event())
        next(stream)
        began = time.perf_counter()
        return (sum(1 for _ in stream) and time.perf_counter() - began) / (len(REPLY) - 1)

    with ThreadPoolExecutor(num_slots) as threads:
        return statistics.fmean(threads.map(listen, range(num_slots)))


def visits(num_slots: int, visitors: int) -> list[dict[str, Any]]:
    """What each visitor met on a page around an engine of so many slots."""
    page = app.build_page(slow_engine(num_slots))
    threads = 3 * num_slots + 2 * MAX_WAITING  # as app.py has it
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, max_threads=threads, **app.LAUNCH)
    command = [sys.executable, "-m", "benchmarks.visitors", url, "--visitors", str(visitors)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page.close(verbose=False)
    met: list[dict[str, Any]] = json.loads(output)
    return met


def crowd(num_slots: int, visitors: int) -> dict[str, Any]:
    """A row: what a letter costs beside the engine, how evenly the visitors waited, and what was lost."""
    alone, met = pace(num_slots), visits(num_slots, visitors)
    letter = statistics.fmean(one["speaking"] / (len(REPLY) - 1) for one in met)
    waiting = sorted(one["waiting"] for one in met)
    # The mean wait if each came at once when one left.
    ideal = len(REPLY) * alone * max(0, visitors / num_slots - 1) / 2
    return {
        "places": num_slots, "visitors": visitors, "own_ms_a_letter": round(1000 * alone, 2),
        "page_ms_a_letter": round(1000 * (letter - alone), 2), "median_wait_s": round(statistics.median(waiting), 2),
        "longest_of_median": round(waiting[-1] / statistics.median(waiting), 2),
        "wait_of_ideal": round(statistics.fmean(waiting) / ideal, 2) if ideal else None,
        "came_back": sum(one["refused"] for one in met), "whole_replies": sum(one["text"] == REPLY for one in met),
    }  # fmt: skip


def main() -> None:
    """Measure, print the tables, and keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clicks", type=int, default=50)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--visitors", type=int, help="measure so many visitors at once, and nothing else")
    args = parser.parse_args()
    for setting in ("VISITOR_MESSAGES", "VISITOR_TOKENS", "ALL_MESSAGES", "ALL_TOKENS"):
        os.environ[setting] = "1000000000/minute"
    if args.visitors:
        keep(many(args.visitors), "visitors")
    else:
        keep(one(args.clicks, args.turns))


def many(visitors: int) -> list[dict[str, Any]]:
    """Many visitors, by the slots of the engine."""
    rows = [crowd(num_slots, visitors) for num_slots in NUM_SLOTS]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return rows


def one(rounds: int, turns: int) -> list[dict[str, Any]]:
    """One visitor: the time to her first letter, and the memory of many turns."""
    page = app.build_page(FakeEngine(REPLY))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    whole, alone = statistics.median(clicks(url, rounds)), statistics.median(own(rounds))
    held = memory(url, turns)
    page.close(verbose=False)
    rows = [
        {"measure": f"click to first letter, median of {rounds}", "value": round(whole, 1), "unit": "ms"},
        {"measure": "the engine's own first chunk", "value": round(alone, 3), "unit": "ms"},
        *({"measure": f"memory after {turn} turns", "value": round(mb), "unit": "MB"} for turn, mb in held.items()),
    ]
    print("| measure | value |\n|---|---|")
    print("\n".join(f"| {row['measure']} | {row['value']} {row['unit']} |" for row in rows))
    return rows


def keep(rows: list[dict[str, Any]], key: str = "") -> None:
    """Write the rows with the machine, the versions and the date, under a key if there is one; the rest stays."""
    now = {"date": date.today().isoformat(), "machine": f"{os.cpu_count()} cores", "gradio": version("gradio")}
    measured: dict[str, Any] = now | {"rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    whole = before | ({key: measured} if key else measured)
    RESULTS.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
