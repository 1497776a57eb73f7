"""Many visitors at once on a page: each asks one question over the API and listens to the end of the reply.

python -m benchmarks.visitors URL [--visitors 64]

Prints what each met, as JSON. `benchmarks.page` runs this in a process of its own, so that the page's work is not the
visitors'.
"""

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from httpx_sse import aconnect_sse


@dataclass
class Visit:
    """What one visitor met."""

    question: str
    text: str  # the whole reply
    first_letter: float  # seconds from the question to it
    seconds: float  # from the question to the end
    events: int


async def visit(client: httpx.AsyncClient, question: str, inputs: list[Any]) -> Visit:
    """Ask over `/chat` and listen."""
    asked, first_letter, text, events = time.perf_counter(), 0.0, "", 0
    answer = (await client.post("gradio_api/call/chat", json={"data": [question, *inputs]})).raise_for_status()
    async with aconnect_sse(client, "GET", f"gradio_api/call/chat/{answer.json()['event_id']}") as stream:
        async for event in stream.aiter_sse():
            if event.event in ("generating", "complete"):
                text, events = json.loads(event.data)[0], events + 1
                first_letter = first_letter or (time.perf_counter() - asked if text else 0.0)
    return Visit(question, text, first_letter, time.perf_counter() - asked, events)


async def crowd(url: str, visitors: int) -> list[Visit]:
    """So many visitors, all at once, each with a question of his own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        page = (await client.get("gradio_api/info")).json()["named_endpoints"]["/chat"]
        inputs = [parameter["parameter_default"] for parameter in page["parameters"][1:]]
        return await asyncio.gather(*(visit(client, f"甲{n:03d}", inputs) for n in range(visitors)))


def main() -> None:
    """Ask, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.visitors", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", help="of the page, with a slash at the end")
    parser.add_argument("--visitors", type=int, default=64)
    args = parser.parse_args()
    met = asyncio.run(crowd(args.url, args.visitors))
    print(json.dumps([asdict(one) for one in met], ensure_ascii=False))


if __name__ == "__main__":
    main()
