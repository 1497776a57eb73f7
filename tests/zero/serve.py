"""The page as on ZeroGPU, asked by a client: prints a line for each reply. Arguments: base folder, adapter folder."""

import sys
from pathlib import Path

import spaces
from gradio_client import Client

import app
from chat.adapter import Adapter
from chat.checkpoints import locate
from chat.local import LocalEngine
from page import service

checkpoint = locate(sys.argv[1])
page = app.build_page(LocalEngine(checkpoint, [Adapter.open(Path(sys.argv[2]), checkpoint)]))
_, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)


def ask(adapter="tiny", **sampling):
    sampling = {"temperature": 0, "repetition_penalty": 1, **sampling}
    text, _ = Client(url, verbose=False).predict("你是谁？", adapter=adapter, api_name="/chat", **sampling)
    print(text.replace("\n", " "))


ask()
ask("base", max_new_tokens=5)
ask()
for spaces.REFUSE in [*service.ZERO_GPU, "Expired ZeroGPU proxy token"]:
    ask()
spaces.REFUSE = ""
ask()
print(max(spaces.SECONDS))
page.close(verbose=False)
