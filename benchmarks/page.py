"""What the page costs beside the model: time to the first word in a real browser, and memory over many turns.

python -m benchmarks.page [--clicks 50] [--turns 1000]

The engine is scripted and answers at once, so all that is measured is the page: Gradio, the line, the browser. The
baseline of the time is the engine's own first piece, in the same process; that of the memory is the tenth turn.
Needs a browser: Debian's chromium, or CHROMIUM.
"""

import argparse
import json
import os
import statistics
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import app
from chat.engine import Sampling, ScriptedEngine
from chat.persona import Message

REPLY = "本宫方才还念着你，可巧你就来了。"
RESULTS = Path(__file__).parent / "results" / "page-cpu.json"
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
    """Milliseconds to the engine's first piece with no page around it."""
    turns: list[Message] = [{"role": "user", "content": "早"}]
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        next(ScriptedEngine(REPLY).stream(turns, "scripted", Sampling(), threading.Event()))
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


def main() -> None:
    """Measure, print the tables, and keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clicks", type=int, default=50)
    parser.add_argument("--turns", type=int, default=1000)
    picked = parser.parse_args()
    for setting in ("VISITOR_MESSAGES", "VISITOR_TOKENS", "ALL_MESSAGES", "ALL_TOKENS"):
        os.environ[setting] = "1000000000/minute"
    page = app.build_page(ScriptedEngine(REPLY))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    whole, alone = statistics.median(clicks(url, picked.clicks)), statistics.median(own(picked.clicks))
    held = memory(url, picked.turns)
    page.close(verbose=False)
    rows = [
        {"measure": f"click to first letter, median of {picked.clicks}", "value": round(whole, 1), "unit": "ms"},
        {"measure": "the engine's own first piece", "value": round(alone, 3), "unit": "ms"},
        *({"measure": f"memory after {turn} turns", "value": round(mb), "unit": "MB"} for turn, mb in held.items()),
    ]
    print("| measure | value |\n|---|---|")
    print("\n".join(f"| {row['measure']} | {row['value']} {row['unit']} |" for row in rows))
    keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write the numbers with the machine, the versions and the date."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores",
        "gradio": version("gradio"),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
