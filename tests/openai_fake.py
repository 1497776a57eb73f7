"""A scripted engine on loopback that speaks the OpenAI protocol, well or badly, as each test orders."""

import json
import socket
import threading
import time

from tests.servers import Quiet, Server

CUT = object()  # the connection is closed in the middle of a reply
TEMPLATE = "<|im_start|>{role}\n{content}<|im_end|>\n"


def event(text=None, finish=None, usage=None, **more):
    """One event of a streamed reply, as vLLM writes it."""
    choices = [] if text is None and finish is None else [{"index": 0, "delta": {"content": text}, "text": text}]
    if choices:
        choices[0]["finish_reason"] = finish
    counted = {"usage": {"completion_tokens": usage}} if usage is not None else {}
    return f"data: {json.dumps({'choices': choices, **counted, **more}, ensure_ascii=False)}\n\n"


def says(text, finish="stop", usage=None, done=True, pause=0.0):
    """A whole reply, a character an event."""
    script = [event("")]
    for character in text:
        script += [pause, event(character)] if pause else [event(character)]
    script += [event(finish=finish)] if finish else []
    script += [event(usage=usage)] if usage is not None else []
    return [*script, "data: [DONE]\n\n"] if done else script


class EngineServer(Server):
    """Serves `base` and `adapters`. `scripts` are used up one by one, the last one again and again.

    A script is a list of what to send, how many seconds to wait, and CUT; or (status, headers, body) instead.
    """

    def __init__(self, *scripts, adapters=("her", "other"), owner="vllm", separator="", base="small"):
        super().__init__(_Engine)
        self.scripts, self.base, self.owner, self.separator = (
            list(scripts) or [says("臣妾明白。")],
            base,
            owner,
            separator,
        )
        self.adapters, self.max_model_len, self.key, self.models_answer = list(adapters), 4096, None, None
        self.tokenizes, self.counts, self.added = True, True, ""  # `added`: what its template puts before our prompt
        self.requests, self.headers, self.gone, self.running, self.peak = [], [], threading.Event(), 0, 0
        self.sent = 0  # events
        self.drips = 0.0  # seconds between two bytes of its list of models
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"{self.address}/v1"

    def next_script(self):
        with self.lock:
            return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

    def cards(self):
        if self.separator:
            return [{"id": self.base}, *({"id": f"{self.base}{self.separator}{name}"} for name in self.adapters)]
        listed = [{"id": name, "parent": self.base, "owned_by": self.owner} for name in self.adapters]
        return [{"id": self.base, "parent": None, "owned_by": self.owner, "max_model_len": self.max_model_len}, *listed]

    def tokens(self, body):
        text = body.get("prompt")
        if text is None:
            text = self.added + "".join(TEMPLATE.format(**m) for m in body["messages"]) + "<|im_start|>assistant\n"
        return list(text.encode())


class _Engine(Quiet):
    disable_nagle_algorithm = True  # else each answer of two writes waits 40 ms

    def do_GET(self):  # noqa: N802 - the name http.server looks for
        owner = self.server.owner
        if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
            return self.answer(401, {"error": "no"})
        if owner.models_answer:
            status, headers, body = owner.models_answer
            return self.answer(status, body, **headers)
        if owner.drips:
            return self._drip(owner.drips)
        return self.answer(200, {"object": "list", "data": owner.cards()})

    def _drip(self, pause):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.close_connection = True
        try:
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(pause)
        except OSError:
            pass

    def do_POST(self):  # noqa: N802
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer(200, {"tokens": owner.tokens(body)}) if owner.tokenizes else self.answer(404)
        if not body.get("stream"):
            counted = {"usage": {"prompt_tokens": len(owner.tokens(body))}} if owner.counts else {}
            return self.answer(200, {"choices": [], **counted})
        owner.requests.append((self.path, body))
        owner.headers.append(dict(self.headers))
        script = owner.next_script()
        if isinstance(script, tuple):
            status, headers, content = script
            return self.answer(status, content, **headers)
        return self._play(script)

    def _play(self, script):
        owner = self.server.owner
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with owner.lock:
            owner.running += 1
            owner.peak = max(owner.peak, owner.running)
        try:
            for step in script:
                if step is CUT:
                    return self.connection.shutdown(socket.SHUT_RDWR)
                if isinstance(step, float):
                    time.sleep(step)
                    continue
                sent = step if isinstance(step, bytes) else step.encode()
                self.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n")
                self.wfile.flush()
                owner.sent += 1
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            owner.gone.set()
        finally:
            self.close_connection = True
            with owner.lock:
                owner.running -= 1
        return None
