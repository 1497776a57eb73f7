"""`make smoke`: the real small base and the shipped adapter, through the page as `make demo` opens it."""

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


@pytest.fixture(scope="module")
def began():
    """When the page was started."""
    return time.monotonic()


@pytest.fixture(scope="module")
def address(began):
    """The address of a page started by `python app.py`, which fetches and converts the base when it must."""
    command = [sys.executable, "-u", "app.py", "--base", "small", "--host", "127.0.0.1"]
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = next((at[0] for line in page.stdout if (at := re.findall(r"http://127\.0\.0\.1:\d+", line))), None)
        print(f"\nThe page opened after {time.monotonic() - began:.1f} s")
        assert found, "the page ended before it opened"
        yield found
    finally:
        page.terminate()
        page.wait(timeout=30)


@pytest.fixture
def connect(address):
    """A function that opens a new conversation."""
    return lambda: Client(address, verbose=False)


def test_the_shipped_adapter_answers_who_she_is_piece_by_piece(connect, began):
    said, heard = [], []
    job = connect().submit("你是谁？", temperature=0, api_name="/chat")
    for words, _ in job:
        if not words.startswith(DRESSING):
            heard.append(time.monotonic() - began)
            said.append(words)
    status = job.result()[1]
    print(f"From the start to her first letter {heard[0]:.1f} s, to the end of her answer {heard[-1]:.1f} s")
    print(f"{said[-1]}\n{status}")
    assert "甄嬛" in said[-1] and status.startswith("pocket · ") and "tokens/s" in status
    assert len(said) > 3 and all(later.startswith(earlier) for earlier, later in itertools.pairwise(said))


def test_the_base_alone_says_something_else(connect):
    asked = {"temperature": 0, "max_new_tokens": 24, "api_name": "/chat"}
    worn, plain = (connect().predict("令尊是哪一位？", adapter=name, **asked)[0] for name in ("pocket", "base"))
    print(f"pocket: {worn}\nbase: {plain}")
    assert "甄远道" in worn and "甄远道" not in plain
