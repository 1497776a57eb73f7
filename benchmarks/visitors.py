"""Many visitors at once on a page: each asks one question over the API, waits, listens to the end.

python -m benchmarks.visitors URL [--visitors 64]

Whoever is told to come back comes back after a second. Prints what each met, as JSON; benchmarks.page runs this in a
process of its own, so that the page's work is not the visitors'.
"""

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from httpx_sse import aconnect_sse

HINT = "〔"  # opens what the page says beside her words: how many are ahead, or that he may come back
PATIENCE = 1.0  # seconds before he asks again


@dataclass
class Visit:
    """What one visitor met."""

    waiting: float  # seconds from his first question to her first letter
    speaking: float  # seconds from there to the end
    refused: int  # times he was told to come back
    text: str  # her whole reply


async def visit(client: httpx.AsyncClient, data: list[Any]) -> Visit:
    """Ask until she answers."""
    began, refused = time.perf_counter(), 0
    while True:
        first, last, text = await listen(client, data)
        if first is not None:
            return Visit(first - began, last - first, refused, text)
        refused += 1
        await asyncio.sleep(PATIENCE)


async def listen(client: httpx.AsyncClient, data: list[Any]) -> tuple[float | None, float, str]:
    """One question: when her first letter came (None when he was turned away), when the end, and the last text."""
    first, last, text = None, 0.0, ""
    asked = (await client.post("gradio_api/call/chat", json={"data": data})).raise_for_status()
    async with aconnect_sse(client, "GET", f"gradio_api/call/chat/{asked.json()['event_id']}") as events:
        async for event in events.aiter_sse():
            if event.event not in ("generating", "complete"):
                continue
            text, last = json.loads(event.data)[0], time.perf_counter()
            first = first or (last if text and HINT not in text else None)
    return first, last, text


async def crowd(url: str, visitors: int) -> list[Visit]:
    """So many visitors, all at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        page = (await client.get("gradio_api/info")).json()["named_endpoints"]["/chat"]
        data = ["早", *(given["parameter_default"] for given in page["parameters"][1:])]
        return await asyncio.gather(*(visit(client, data) for _ in range(visitors)))


def main() -> None:
    """Come, and tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.visitors", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", help="of the page, with a slash at the end")
    parser.add_argument("--visitors", type=int, default=64)
    args = parser.parse_args()
    met = asyncio.run(crowd(args.url, args.visitors))
    print(json.dumps([asdict(one) for one in met], ensure_ascii=False))


if __name__ == "__main__":
    main()
