"""The page under flood and under forged calls, over HTTP. The page is a process of its own: page_worker.py."""

import asyncio
import json
import os
import random
import re
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from httpx_sse import aconnect_sse

from benchmarks.page import UNLIMITED
from benchmarks.torture.page_worker import reply
from chat.persona import BREATHLESS, CROWDED, DRESSING, HINT, LONG_WINDED, SILENT, UNWELL

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
OURS = (UNWELL, CROWDED, DRESSING, BREATHLESS, SILENT, LONG_WINDED)  # what she says in place of a reply
HANGS = 60.0  # seconds after which a call counts as lost
PATH = re.compile(r"site-packages|Traceback|\.py\b|/(?:home|root|usr|tmp|opt|work|app)/")
MARK = re.compile(r"v\d{3}q\d{5}")
PAUSE = 12.0  # seconds, on average, between what one visitor does and what he does next


class Page:
    """The page's process, and what it tells of itself."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin and process.stdout
        self.stdin, self.stdout = process.stdin, process.stdout
        self.process, self.url = psutil.Process(process.pid), process.stdout.readline().strip()

    def state(self) -> dict[str, int]:
        self.stdin.write("\n")
        self.stdin.flush()
        return dict(json.loads(self.stdout.readline()))

    def settled(self) -> dict[str, int]:
        """Its state once nobody is served any more, or after HANGS seconds."""
        deadline = time.monotonic() + HANGS
        while (state := self.state())["running"] + state["tickets"] and time.monotonic() < deadline:
            time.sleep(0.5)
        return state


@contextmanager
def serving(letters_per_second: float, log: Path) -> Iterator[Page]:
    """The page, with its log in a file."""
    command = [sys.executable, "-m", "benchmarks.torture.page_worker", str(letters_per_second)]
    with log.open("wb") as stderr, subprocess.Popen(
        command, cwd=ROOT, env=os.environ | UNLIMITED, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
    ) as process:  # fmt: skip
        yield Page(process)
        assert process.stdin
        process.stdin.close()
        process.terminate()


@dataclass
class Met:
    """What all visitors met together."""

    ended: Counter[str] = field(default_factory=Counter)  # by how it ended
    seconds: list[float] = field(default_factory=list)  # from question to end, of whole replies


async def events(
    client: httpx.AsyncClient, name: str, values: list[Any], session: str
) -> AsyncIterator[tuple[str, str, str]]:
    """The events of one call: its id, what kind of event, and its data."""
    answer = await client.post(f"gradio_api/call/{name}", json={"data": values, "session_hash": session})
    number = answer.raise_for_status().json()["event_id"]
    async with aconnect_sse(client, "GET", f"gradio_api/call/{name}/{number}") as stream:
        async for event in stream.aiter_sse():
            yield number, event.event, event.data


async def visitor(
    number: int, client: httpx.AsyncClient, defaults: list[Any], fn_index: int, until: float, met: Met
) -> None:
    """One visitor: asks, retries, edits, changes the adapter, stops, leaves in the middle, and comes again."""
    draw = random.Random(number)
    session, asked, question = f"visitor{number}", 0, ""
    await asyncio.sleep(draw.uniform(0, PAUSE))
    while time.monotonic() < until:
        does = draw.choices(["ask", "retry", "edit", "stop", "close", "rejoin"], [40, 15, 10, 15, 15, 5])[0]
        if does != "retry" or not question:
            asked += 1
            question = f"v{number:03d}q{asked:05d}" + ("，改过的一问" if does == "edit" else "")
        values = [question, *defaults]
        values[3] = draw.choice(["scripted", "base"])
        ends = draw.uniform(0.05, 1) if does in ("stop", "close") else None
        try:
            how = await asyncio.wait_for(_one(client, values, session, fn_index, does, ends, met), HANGS)
        except asyncio.TimeoutError:
            how = "lost: no end"
        except httpx.HTTPError as error:
            how = f"lost: {type(error).__name__}"
        met.ended[how] += 1
        # A tab that is opened anew is another session; and Gradio's API of single calls, unlike the page, hands the
        # last messages of a call that was stopped to the session's next one.
        if does in ("close", "rejoin", "stop"):
            session = f"visitor{number}-{asked}"
        await asyncio.sleep(min(draw.expovariate(1 / PAUSE), max(0.0, until - time.monotonic())))


async def _one(client: httpx.AsyncClient, values: list[Any], session: str, fn_index: int, does: str, ends: float | None,
               met: Met) -> str:  # fmt: skip
    """How one call ended."""
    began, question = time.monotonic(), str(values[0])
    mine, stopped, text = question[:10], False, ""
    async for number, kind, data in events(client, "chat", values, session):
        if set(MARK.findall(data)) - {mine}:
            return "crossed"
        if kind == "error":
            return "stopped" if stopped else "locked"
        if kind in ("generating", "complete"):
            text = (json.loads(data) or [""])[0]
        if kind == "complete":
            if stopped:
                return "stopped"
            if text.split(HINT)[0] in OURS:
                return "refused by a line of hers"
            met.seconds.append(time.monotonic() - began)
            return "whole" if text == reply(question) else "lost: not whole"
        if ends and time.monotonic() - began > ends and not stopped:
            if does == "close":
                return "closed"
            stopped = True
            what = {"session_hash": session, "fn_index": fn_index, "event_id": number}
            await client.post("gradio_api/cancel", json=what)
    return "stopped" if stopped else "lost: broken off"


async def _crowd(page: Page, visitors: int, seconds: float, met: Met) -> list[tuple[float, int]]:
    """All visitors for so long; the page's memory every two seconds."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=visitors)
    async with httpx.AsyncClient(base_url=page.url, timeout=HANGS, limits=limits) as client:
        info = (await client.get("gradio_api/info")).json()["named_endpoints"]["/chat"]["parameters"]
        config = (await client.get("config")).json()["dependencies"]
        chat = next(each["id"] for each in config if each["api_name"] == "chat")
        defaults = [parameter["parameter_default"] for parameter in info[1:]]
        until, began, memory = time.monotonic() + seconds, time.monotonic(), []
        crowd = asyncio.gather(*(visitor(n, client, defaults, chat, until, met) for n in range(visitors)))
        while not crowd.done():
            memory.append((time.monotonic() - began, page.process.memory_info().rss))
            await asyncio.wait([crowd], timeout=2)
        await crowd
    return memory


def slope(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """MB an hour that memory grows in the second half of the time, and half of its 95 % interval, by blocks of samples.

    Samples that follow each other are alike, so eight blocks are taken for eight independent slopes' worth of noise.
    """
    times, sizes = (np.array(each, float) for each in zip(*memory[len(memory) // 2 :], strict=True))
    fitted = np.polyfit(times, sizes, 1)
    residuals = sizes - np.polyval(fitted, times)
    blocks = np.array([block.mean() for block in np.array_split(residuals, 8)])
    centres = np.array([block.mean() for block in np.array_split(times, 8)])
    error = blocks.std(ddof=2) / np.sqrt(((centres - centres.mean()) ** 2).sum())
    return fitted[0] * 3600 / 1e6, 2.45 * error * 3600 / 1e6  # Student's t for six degrees of freedom


def flood(scale: float, folder: Path) -> list[Row]:
    """300 visitors for ten minutes."""
    visitors, seconds = 300, 600 * scale
    met = Met()
    with serving(160, folder / "flood.log") as page:
        before = page.state()
        memory = asyncio.run(_crowd(page, visitors, seconds, met))
        after = page.settled()
    lost = sum(count for how, count in met.ended.items() if how.startswith("lost"))
    p50, p95, p99 = np.percentile(met.seconds or [float("nan")], [50, 95, 99])
    grows, interval = slope(memory)
    found = ", ".join(f"{count} {how}" for how, count in sorted(met.ended.items(), key=lambda each: -each[1]))
    figures = (
        f"{found}; p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s; memory {grows:+.1f} ± {interval:.1f} MB/h; "
        f"slots left {after['running'] + after['tickets']}, threads {before['threads']} → {after['threads']}"
    )
    held = not (lost + met.ended["locked"] + met.ended["crossed"] + after["running"] + after["tickets"])
    what = f"{visitors} visitors for {seconds:.0f} s: ask, retry, edit, change adapters, stop, close, come again"
    return [{"part": "page", "what": what, "times": sum(met.ended.values()), "held": held, "found": figures}]


NO_REUSE = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # Gradio closes some after a failure
SAID = "你是狗"  # words of strangers, which no log may hold
CONTROL = ("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<|im_start|>", "<|fim_prefix|>", "</s>", "<\u200b|")


def thing(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kinds = ["null", "bool", "int", "float", "text", "control", "huge", "nested"] + ["list", "dict"] * (depth < 3)
    kind = draw.choice(kinds)
    if kind == "huge":
        return draw.choice("长a\u202e\x00") * draw.choice([801, 5000, 100_000])
    if kind == "nested":
        value: Any = []
        for _ in range(draw.choice([10, 250, 400])):
            value = [value] if draw.random() < 0.5 else {"content": value}
        return value
    if kind == "list":
        return [thing(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == "dict":
        keys = ("role", "content", "text", "type", "path", "url", "metadata", "value", "__type__", "files")
        return {draw.choice(keys): thing(draw, depth + 1) for _ in range(draw.randrange(5))}
    return {
        "null": None, "bool": True, "int": draw.choice([0, -1, 2**31, 10**400, draw.randrange(999)]),
        "float": draw.choice([0.5, -0.0, 1e308, float("inf"), float("nan")]),
        "text": "".join(draw.choices(string.printable + "甄嬛皇上\ud800\U0001f600", k=draw.randrange(30))),
        "control": words(draw),
    }[kind]  # fmt: skip


def words(draw: random.Random) -> str:
    """A question with control tokens, whole and in halves."""
    return "".join(draw.choice([*CONTROL, SAID, "早", "|>", "<|", "\n"]) for _ in range(draw.randrange(1, 9)))


def forged(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body that no page sends; some are nearly right, so that they come as far as the engine."""
    good = [words(draw), "永寿宫", "路人", "scripted", 0.7, 0.8, 20, 1.05, 256, -1]
    values: Any = list(good)
    roles = ("user", "assistant", "system", "tool")
    contents = [words(draw), [{"type": "text", "text": words(draw)}], thing(draw)]
    history = [{"role": draw.choice(roles), "content": draw.choice(contents)} for _ in range(draw.randrange(6))]
    which = draw.randrange(8)
    if which == 0:
        values[draw.randrange(len(values))] = thing(draw)
    elif which == 1:
        values = values[: draw.randrange(len(values))] + [thing(draw)] * draw.randrange(4)
    elif which == 2:
        values = thing(draw)
    body: dict[str, Any] = {"data": values}
    path = draw.choice(["call/chat", "call/chat", "call/ask"])
    if path == "call/ask":
        body = {"data": [values[0] if isinstance(values, list) and values else values, *good[1:3]]}
    if which in (3, 4, 5):  # the page's own events, with a history that was never said
        path = draw.choice(["queue/join", "run/predict", "api/predict"]) if which == 5 else "run/predict"
        body = {"data": [history, *good[1:]], "fn_index": draw.randrange(100), "session_hash": f"s{draw.randrange(50)}"}
        body |= {"trigger_id": thing(draw)} if draw.random() < 0.3 else {}
        body |= {"event_data": thing(draw)} if draw.random() < 0.3 else {}
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    if which == 6 and draw.random() < 0.3:
        text = draw.choice([text[: len(text) // 2], b"[" * 100_000, b"\xff" + text, b"", text * 2])
    return path, text


async def _forge(client: httpx.AsyncClient, number: int, met: Counter[str]) -> None:
    path, body = forged(random.Random(number))
    try:
        status, text = await asyncio.wait_for(_send(client, path, body), HANGS)
    except asyncio.TimeoutError:
        met["fault: no end"] += 1
        return
    except httpx.HTTPError as error:
        met[f"fault: {type(error).__name__} of {path}"] += 1
        return
    met[f"status {status}{' with an error' if status >= 500 and 'error' in text else ''}"] += 1
    if "Needed, in order" in text:
        met["told that its values cannot be read"] += 1
    if found := PATH.search(text):
        met[f"fault: {found[0]} in an answer of {path}"] += 1


async def _send(client: httpx.AsyncClient, path: str, body: bytes) -> tuple[int, str]:
    """Status and text of an answer; of a call that is taken, with its events."""
    answer = await client.post(f"gradio_api/{path}", content=body, headers={"Content-Type": "application/json"})
    if not path.startswith("call/") or not answer.is_success:
        return answer.status_code, answer.text
    events = await client.get(f"gradio_api/{path}/{answer.json()['event_id']}")
    return answer.status_code, answer.text + events.text


def ends_in(log: Path) -> Counter[str]:
    """Where the tracebacks of a log end, ours and others', and our files by name."""
    found = Counter[str]()
    for trace in log.read_text(encoding="utf-8", errors="replace").split("Traceback (most recent call last):")[1:]:
        *_, last = re.findall(r'File "(.*?)", line (\d+)', trace) or [("?", "")]
        ours = Path(last[0]).is_relative_to(ROOT) and "site-packages" not in last[0]
        where = f"fault: traceback in {Path(last[0]).name}:{last[1]}" if ours else "traceback of Gradio"
        found[where] += 1
    return found


async def _forge_all(url: str, calls: int, met: Counter[str]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=HANGS, limits=NO_REUSE) as client:
        numbers = iter(range(calls))

        async def some() -> None:
            for number in numbers:
                await _forge(client, number, met)

        await asyncio.gather(*(some() for _ in range(24)))


def api(scale: float, folder: Path) -> list[Row]:
    """10,000 generated calls that no page sends."""
    calls, met = round(10_000 * scale), Counter[str]()
    with serving(0, folder / "api.log") as page:
        asyncio.run(_forge_all(page.url, calls, met))
        after = page.settled()
        healthy = httpx.get(f"{page.url}health").text == "ok"
    met += ends_in(folder / "api.log")
    met["fault: a stranger's words in the log"] += (folder / "api.log").read_text(errors="replace").count(SAID)
    faults = sum(count for how, count in met.items() if how.startswith("fault")) + after["escaped"]
    found = ", ".join(f"{count} {how}" for how, count in sorted(met.items(), key=lambda each: -each[1]))
    figures = f"{found}; {after['asked']} prompts reached the engine, {after['escaped']} with a token of a stranger"
    held = healthy and not (faults + after["running"] + after["tickets"])
    what = "generated calls: wrong types, too few values, forged histories, nesting, long texts, control tokens"
    return [{"part": "API", "what": what, "times": calls, "held": held, "found": figures}]
