"""Each engine broken at every stage of a reply, on a tiny base: a line is read, and the next reply is whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import chat.engine
from chat.llama import LlamaEngine, LoraQueue
from chat.openai_server import Timeouts
from chat.persona import HINT, UNWELL
from chat.remote import connect
from page.service import ChatRequest, ChatService
from tests import tiny
from tests.openai_fake import CUT, EngineServer, event, says

Row = dict[str, Any]
ASK = [{"role": "user", "content": "你是谁？"}]
INTERNAL = "secret of /home/her"  # what the raised error says, and no visitor may read
LINE_SECONDS = 30.0  # within which the visitor must read something


class Broken(Exception):
    """What is raised on purpose."""


def fails(*_: Any, **__: Any) -> Any:
    """Raise."""
    raise Broken(INTERNAL)


def ends_thread(*_: Any, **__: Any) -> Any:
    """End the thread that calls it."""
    raise SystemExit


def sticks(*_: Any, **__: Any) -> Any:
    """Take a minute."""
    time.sleep(60)


def answer(service: ChatService, adapter: str) -> str:
    """What the visitor reads at the end."""
    *_, (reply,) = service.generate(ASK, ChatRequest(adapter=adapter, numbers={"max_new_tokens": 8}), "one")  # type: ignore[arg-type]
    return reply.shown


def breaks(engine: Any, adapter: str, patch: Callable[[], Any], heals: bool = True) -> str:
    """Ask while it is broken, then when it is whole again; empty where all is well, else what was wrong."""
    service = ChatService(engine)
    began = time.monotonic()
    with patch():
        shown = answer(service, adapter)
    took = time.monotonic() - began
    if HINT not in shown or INTERNAL in shown or took > LINE_SECONDS:
        return f"after {took:.0f} s: {shown[:80]!r}"
    if service.queue._tickets:
        return "a place in the queue is left"
    if heals and UNWELL in (after := answer(service, adapter)):
        return f"not well afterwards: {after[:80]!r}"
    return ""


def llama(folder: Path) -> dict[str, str]:
    """llama.cpp in this process: each stage broken, then a stuck and a dead thread, each on an engine of its own."""
    from chat.bases import Base, File, Gguf
    from chat.checkpoints import Checkpoint, read_json
    from chat.download import digest

    base = tiny.make(folder / "tiny")
    path = tiny.make_gguf(base, folder / "tiny.gguf")
    gguf = Gguf("tiny", "local", (File(path.name, path.stat().st_size, digest(path)),))
    checkpoint = Checkpoint(Base("tiny", "local", 0, gguf, read_json(base / "config.json")), path, "torture")

    def engine() -> LlamaEngine:
        made = LlamaEngine(checkpoint, [], 2)
        made.wait()
        return made

    one = engine()

    class Server:
        """llama.cpp's, whose next call does something else."""

        def __init__(self, does: Callable[..., Any]) -> None:
            self.handle_completions = does

    def server(does: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: mock.patch.object(one, "_server", Server(does))

    found = {
        "tokenizer": breaks(one, "base", lambda: mock.patch("chat.llama.trim", fails)),
        "queue of LoRAs": breaks(one, "base", lambda: mock.patch.object(LoraQueue, "enter", fails)),
        "start of a reply": breaks(one, "base", server(fails)),
        "out of memory": breaks(one, "base", server(mock.Mock(side_effect=MemoryError))),
        "an error in its stream": breaks(one, "base", server(lambda body, take: take({"error": INTERNAL}))),
        "an event without its parts": breaks(one, "base", server(lambda body, take: take({"choices": []}))),
        "a reply without an end": breaks(one, "base", server(lambda body, take: None)),
        "usage": breaks(one, "base", lambda: mock.patch("chat.llama._Reply.usage", fails)),
    }
    with mock.patch.object(LlamaEngine, "_load", fails):
        loading = LlamaEngine(checkpoint, [], 2)
        found["loading"] = breaks(loading, "base", mock.MagicMock, heals=False)
    with mock.patch.object(chat.engine, "STALL_SECONDS", 2.0):
        stuck, dead = engine(), engine()
        found["a stuck step"] = breaks(
            stuck, "base", lambda: mock.patch.object(stuck, "_server", Server(sticks)), heals=False
        )
        found["a dead thread"] = breaks(
            dead, "base", lambda: mock.patch.object(dead, "_server", Server(ends_thread)), heals=False
        )
    return found


def transformers(folder: Path) -> dict[str, str]:
    """transformers in this process, likewise."""
    from chat.checkpoints import locate
    from chat.local import LocalEngine

    checkpoint = locate(str(tiny.make(folder / "tiny")))

    def engine() -> LocalEngine:
        made = LocalEngine(checkpoint, [])
        made.wait()
        return made

    one = engine()

    def patch(what: str, does: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: mock.patch(what, does)

    found = {
        "tokenizer": breaks(one, "base", patch("chat.local.trim", fails)),
        "sampling parameters": breaks(one, "base", patch("chat.local.generation_config", fails)),
        "start of a reply": breaks(one, "base", lambda: mock.patch.object(one.model, "generate", fails)),
        "out of memory": breaks(
            one, "base", lambda: mock.patch.object(one.model, "generate", mock.Mock(side_effect=MemoryError))
        ),
        "a token": breaks(one, "base", patch("chat.local.ends", fails)),
        "text of a token": breaks(one, "base", patch("chat.local.DecodeStream", fails)),
        "a reply without an end": breaks(one, "base", lambda: mock.patch.object(one.model, "generate")),
    }
    with mock.patch.object(LocalEngine, "_load", fails):
        found["loading"] = breaks(LocalEngine(checkpoint, []), "base", mock.MagicMock, heals=False)
    with mock.patch.object(chat.engine, "STALL_SECONDS", 2.0):
        stuck = engine()
        found["a stuck step"] = breaks(
            stuck, "base", lambda: mock.patch.object(stuck.model, "generate", sticks), heals=False
        )
        dead = engine()
        found["a dead thread"] = breaks(
            dead, "base", lambda: mock.patch.object(dead.model, "generate", ends_thread), heals=False
        )
    return found


def remote(folder: Path) -> dict[str, str]:
    """A server of OpenAI's protocol that fails in the middle of a reply, and is well afterwards."""
    scripts: dict[str, Any] = {
        "a cut connection": [event("臣"), CUT],
        "silence after a token": [event("臣"), 3.0],
        "silence before one": [3.0],
        "an error event": [event("臣"), event(error={"message": INTERNAL})],
        "what is no JSON": [event("臣"), "data: {\n\n"],
        "what is no text": [event("臣"), 'data: {"choices": [{"delta": {"content": 5}}]}\n\n'],
        "half a surrogate pair": [event("臣"), 'data: {"choices": [{"delta": {"content": "\\ud83d"}}]}\n\n'],
        "bytes that are no UTF-8": [event("臣"), b"data: \xff\xfe\n\n", CUT],
        "nesting": [event("臣"), f"data: {'[' * 100_000}\n\n"],
        "no end": [event("臣")],
        "status 500": (500, {}, INTERNAL.encode()),
        "status 404": (404, {}, b""),
        "status 400": (400, {}, INTERNAL.encode()),
        "status 429 without end": (429, {"Retry-After": "1"}, b""),
        "a redirect": (302, {"Location": "http://127.0.0.1:9/"}, b""),
        "a page": (200, {"Content-Type": "text/html"}, b"<html>login</html>"),
    }
    timeouts = Timeouts(connect=3, first_token=1, next_token=0.6, reply=5, retries=2, backoff=0.02, poll=0.05)
    found = {}
    for name, script in scripts.items():
        server = EngineServer(script)
        engine = connect(mock.Mock(), {"ENGINE_URL": server.url}, timeouts)

        @contextmanager
        def healing(server: EngineServer = server) -> Iterator[None]:
            yield
            server.scripts = [says("臣妾明白。")]

        found[name] = breaks(engine, "her", healing)
        engine.close()
        server.close()
    return found


def torture(scale: float, folder: Path) -> list[Row]:
    """Each engine, each stage once."""
    rows = []
    for name, run in {"llama.cpp": llama, "transformers": transformers, "server": remote}.items():
        (folder / name).mkdir()
        found = run(folder / name)
        wrong = [f"{stage}: {what}" for stage, what in found.items() if what]
        figures = "; ".join(wrong) or "each time a line, no internal text, no place left in the queue"
        what = f"{name} broken at {', '.join(found)}"
        rows.append({"part": "engines", "what": what, "times": len(found), "held": not wrong, "found": figures})
    return rows
