"""The page in a real browser: the first visit, the first letter, a long talk, memory over many turns.

python -m benchmarks.page_browser [--clicks 20] [--turns 40] [--memory 200] [--yesterday COMMIT]

The engine is that of `benchmarks.page`. A line of 400 ms and 50 kB/s is the browser's own emulation. The longest task
and frame are the browser's, on a talk of so many turns while a reply comes. Ours and yesterday's build are measured one
after the other. Needs a browser: Debian's chromium, or CHROMIUM.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import results
from benchmarks.page import ROOT, serving
from benchmarks.serve import worktree

NAME = "page-browser"
SLOW = {"offline": False, "latency": 400, "downloadThroughput": 50_000, "uploadThroughput": 50_000}
GREETED = "[data-testid=bot], #shell, #talk .bubble"
# From the click to the first letter in a bubble that was not there before: both on the browser's own clock.
FIRST_LETTER = """(count) => new Promise((done) => {
  const began = performance.now()
  const look = () => document.querySelectorAll('[data-testid=bot]:not(.silent)').length > count
    ? done(performance.now() - began) : requestAnimationFrame(look)
  document.querySelector('button.submit-button').click()
  look()
})"""
WATCH = """() => {
  window.tasks = [0]
  new PerformanceObserver((list) => list.getEntries().forEach((task) => window.tasks.push(task.duration)))
    .observe({entryTypes: ['longtask']})
}"""


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(context: Any, url: str, line: dict[str, Any] | None = None) -> dict[str, float]:
    """Open the page: requests that reach the server, their bytes, seconds to the greeting."""
    tab = context.new_page()
    network = context.new_cdp_session(tab)
    network.send("Network.enable")
    if line:
        network.send("Network.emulateNetworkConditions", line)
    received: dict[str, int] = {}
    cached: set[str] = set()
    network.on("Network.requestServedFromCache", lambda event: cached.add(event["requestId"]))
    network.on("Network.loadingFinished", lambda e: received.update({e["requestId"]: e["encodedDataLength"]}))
    began = time.perf_counter()
    tab.goto(url, wait_until="commit")
    tab.wait_for_selector(GREETED, timeout=120_000)
    greeting = time.perf_counter() - began
    tab.wait_for_selector("textarea:visible", timeout=120_000)
    tab.wait_for_timeout(2000)
    tab.close()
    sizes = [size for request, size in received.items() if size and request not in cached]
    return {"requests": len(sizes), "kB": sum(sizes) / 1000, "greeting_s": greeting}


def first_letter(tab: Any, clicks: int) -> float:
    """Milliseconds from the click to her first letter, the median."""
    taken = []
    for _ in range(clicks):
        tab.fill("textarea:visible", "早")
        tab.wait_for_selector("button.submit-button:visible")
        taken.append(tab.evaluate(FIRST_LETTER, tab.locator("[data-testid=bot]").count()))
        tab.wait_for_selector("button.submit-button:visible")
        tab.wait_for_timeout(300)
    return float(statistics.median(taken))


def longest_task(tab: Any, turns: int) -> float:
    """Milliseconds of the browser's longest task while she speaks in a talk of so many turns; 0 where none took 50."""
    messages = [
        {"role": role, "content": text}
        for n in range(turns)
        for role, text in (("user", f"第{n}问，今日天气如何？"), ("assistant", "本宫方才还念着你，可巧你就来了。" * 4))
    ]
    # As older builds keep a talk; newer ones adopt it.
    talk = json.dumps({"scene": "永寿宫", "visitor": "路人", "messages": messages})
    tab.evaluate("(talk) => { localStorage['zhenhuan/永寿宫'] = talk; localStorage.zhenhuan = '永寿宫' }", talk)
    tab.reload()
    tab.wait_for_function(f"document.querySelectorAll('[data-testid=bot]').length >= {turns}")
    tab.wait_for_timeout(1500)
    tab.evaluate(WATCH)
    tab.fill("textarea:visible", "早")
    tab.wait_for_selector("button.submit-button:visible")
    tab.click("button.submit-button")
    tab.wait_for_timeout(2500)
    return float(tab.evaluate("() => Math.max(...window.tasks)"))


def growth(url: str, process: psutil.Process, turns: int) -> float:
    """Megabytes that the server has more after so many turns than after the tenth; a new session every ten."""
    from gradio_client import Client

    client, before = Client(url, verbose=False), 0.0
    for turn in range(1, turns + 1):
        if turn % 10 == 1:
            client.reset_session()
        client.predict("早", api_name="/chat")
        if turn == 10:
            before = process.memory_info().rss / 1e6
    return float(process.memory_info().rss / 1e6 - before)


def measure(build: str, checkout: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A row."""
    row: dict[str, Any] = {"build": build}
    with serving(checkout) as (url, process), browser() as chromium:
        context = chromium.new_context(viewport={"width": 390, "height": 844})
        for name, found in (("first", visit(context, url)), ("second", visit(context, url))):
            row |= {f"{name}_requests": found["requests"], f"{name}_kB": round(found["kB"], 1)}
        context.close()
        context = chromium.new_context(viewport={"width": 390, "height": 844})
        row["slow_greeting_s"] = round(visit(context, url, SLOW)["greeting_s"], 1)
        context.close()
        tab = chromium.new_page(viewport={"width": 390, "height": 844})
        tab.goto(url)
        tab.wait_for_selector("textarea:visible")
        row["first_letter_ms"] = round(first_letter(tab, args.clicks))
        row["longest_task_ms"] = round(longest_task(tab, args.turns))
        row["memory_growth_MB"] = round(growth(url, process, args.memory), 1)
    return row


def main() -> None:
    """Measure, print the table, and keep the numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_browser", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--turns", type=int, default=40, help="of the long talk")
    parser.add_argument("--memory", type=int, default=200, help="turns over which the server's memory is watched")
    parser.add_argument("--yesterday", default="ed75946", metavar="COMMIT", help="of the build to compare with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, worktree(args.yesterday, Path(folder) / "yesterday") as yesterday:
        rows = [measure(build, checkout, args) for build, checkout in (("yesterday", yesterday), ("ours", ROOT))]
    results.save(NAME, rows, {}, yesterday=args.yesterday, **{k: v for k, v in vars(args).items() if k != "yesterday"})
    print(json.dumps(rows, ensure_ascii=False, indent=1))
    print(results.table(NAME))


if __name__ == "__main__":
    main()
