"""`make smoke`: the real bases and the shipped adapters, through the page as `make demo` opens it, by both engines."""

import itertools
import re
import subprocess
import sys
import time

import pytest
from gradio_client import Client

from chat.persona import DRESSING
from tests.conftest import ROOT

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


# llama.cpp with the base that a machine without a GPU gets; transformers with the one that it converts fastest.
@pytest.fixture(scope="module", params=[("llama", "medium", "medium"), ("transformers", "small", "pocket")], ids=str)
def started(request):
    """A page started by `python app.py`: the engine, the adapter, the address, and when it was started."""
    engine, base, adapter = request.param
    command = [sys.executable, "-u", "app.py", "--engine", engine, "--base", base, "--host", "127.0.0.1"]
    began = time.monotonic()
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = next((at[0] for line in page.stdout if (at := re.findall(r"http://127\.0\.0\.1:\d+", line))), None)
        print(f"\n{engine}, {base}: the page opened after {time.monotonic() - began:.1f} s")
        assert found, "the page ended before it opened"
        yield engine, adapter, found, began
    finally:
        page.terminate()
        page.wait(timeout=30)


def test_the_shipped_adapter_answers_who_she_is_chunk_by_chunk(started):
    engine, adapter, address, began = started
    texts, times = [], []
    job = Client(address, verbose=False).submit("你是谁？", temperature=0, api_name="/chat")
    for text, _ in job:
        if not text.startswith(DRESSING):
            times.append(time.monotonic() - began)
            texts.append(text)
    status = job.result()[1]
    print(f"From the start to her first letter {times[0]:.1f} s, to the end of her answer {times[-1]:.1f} s")
    print(f"{texts[-1]}\n{status}")
    assert "甄嬛" in texts[-1] and status.startswith(f"{adapter} · ") and "tokens/s" in status
    assert ("llama.cpp" in status) == (engine == "llama")
    assert len(texts) > 3 and all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_the_base_alone_says_something_else(started):
    _, adapter, address, _ = started
    asked = {"temperature": 0, "max_new_tokens": 24, "api_name": "/chat"}
    ask = lambda name: Client(address, verbose=False).predict("令尊是哪一位？", adapter=name, **asked)[0]  # noqa: E731
    adapted, plain = ask(adapter), ask("base")
    print(f"{adapter}: {adapted}\nbase: {plain}")
    assert "甄远道" in adapted and "甄远道" not in plain
