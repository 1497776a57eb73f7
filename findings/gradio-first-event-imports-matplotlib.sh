#!/usr/bin/env bash
# Gradio imports matplotlib.pyplot within the first event of a page that draws nothing: the first visitor waits for it.
#
# Guess before: matplotlib is imported by gr.Plot alone, or never by a page of text.
# Seen with gradio 6.31.0 and matplotlib 3.10.7: after launch() matplotlib is not in sys.modules; the first call of an
# event that returns its text imports matplotlib.pyplot on the event loop, and takes several times what the next takes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check gradio==6.31.0 matplotlib==3.10.7
cat > try.py <<'PYTHON'
"""One page that returns what it is given, asked twice."""
import os
import sys
import time

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
import httpx

with gr.Blocks() as page:
    box = gr.Textbox()
    box.submit(lambda text: text, box, box, api_name="echo")
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
before = "matplotlib.pyplot" in sys.modules


def ask():
    began = time.perf_counter()
    event = httpx.post(f"{url}gradio_api/call/echo", json={"data": ["hello"]}).json()["event_id"]
    assert "hello" in httpx.get(f"{url}gradio_api/call/echo/{event}").text
    return 1000 * (time.perf_counter() - began)


first = ask()
after = "matplotlib.pyplot" in sys.modules
second = min(ask() for _ in range(5))
print(f"matplotlib.pyplot is imported before the first event: {before}, after it: {after}")
print(f"the first event takes {first:.0f} ms, a later one {second:.0f} ms")
assert (before, after) == (False, True) and first > 3 * second
PYTHON
venv/bin/python try.py
