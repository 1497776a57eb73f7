"""What HTTP says around Gradio's answers: they keep the page to its own origin, and are sent small, and once."""

import gzip
import re
from functools import lru_cache
from hashlib import sha256

import brotli
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from page.gradio_internals import log_failure

# Gradio writes inline scripts and styles and compiles handlers from strings; the rest is closed. A remote picture in
# a reply would tell its server who reads it: none is loaded. Hugging Face shows a Space in a frame.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self' https://huggingface.co https://*.hf.space",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
UNANSWERABLE = "This request cannot be answered. /gradio_api/info lists what can be asked, with each parameter."
HASHED = re.compile(r"/assets/[^/]+-[\w-]{8,9}\.\w+\?|/theme\.css\?v=\w{64}$")  # addresses that change with the content
TEXT = re.compile("text/|javascript|json|svg")
WHOLE = 2**18  # bytes of a file up to which it is read whole; Gradio compresses larger ones on their way


class Security:
    """ASGI middleware that adds HEADERS to every response, and answers where Gradio raised: uvicorn would log the text
    of the exception, which may quote what a visitor sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; add the headers on the way back."""

        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, receive, guarded)
        except Exception:  # noqa: BLE001 - Gradio raises what it likes at a stranger's request
            log_failure()
            if not started:
                await JSONResponse({"detail": UNANSWERABLE}, 500)(scope, receive, guarded)


class Caching:
    """ASGI middleware that compresses files, and sends none that the browser still has.

    A file says how long it is. A stream, as of a reply, does not: it passes as it comes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; hold what comes back until it is whole, if it is a file."""
        start: Message | None = None
        body = bytearray()

        async def hold(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_file(message):
                start = message
            elif not start:
                await send(message)
            else:
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    response = await _respond(scope, start, bytes(body))
                    await response(scope, receive, send)

        asked = scope["type"] == "http" and scope["method"] == "GET"
        await self.app(scope, receive, hold if asked else send)


async def refuse_body(request: Request, error: Exception) -> Response:
    """Answer a body that is no call. FastAPI would send it back, whatever its length, and fails where it cannot."""
    return PlainTextResponse("The body of this call cannot be read. /gradio_api/info says how to call.", 422)


def _is_file(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return start["status"] == 200 and int(headers.get("Content-Length", WHOLE)) < WHOLE


async def _respond(scope: Scope, start: Message, body: bytes) -> Response:
    asked, headers = Headers(scope=scope), MutableHeaders(raw=start["headers"])
    hashed = HASHED.search(f"{scope['path']}?{scope['query_string'].decode('latin-1')}")
    headers.setdefault("Cache-Control", "public, max-age=31536000, immutable" if hashed else "no-cache")
    if TEXT.search(headers.get("Content-Type", "")):
        headers.add_vary_header("Accept-Encoding")
        if coding := next((coding for coding in ("br", "gzip") if coding in asked.get("Accept-Encoding", "")), ""):
            headers["Content-Encoding"] = coding
            body = await run_in_threadpool(_compress_well, body, coding) if hashed else _compress(body, coding)
    headers["Content-Length"] = str(len(body))
    headers["ETag"] = f'"{sha256(body).hexdigest()[:32]}"'  # Starlette's has the file's time, each machine its own
    if StaticFiles().is_not_modified(headers, asked):
        return NotModifiedResponse(headers)
    response = Response(body)
    response.raw_headers = headers.raw
    return response


def _compress(body: bytes, coding: str, quality: int = 5) -> bytes:
    """At brotli's quality of 5 the document takes 1 ms, at 11 a hundred; files are 9 % smaller at 11."""
    return brotli.compress(body, quality=quality) if coding == "br" else gzip.compress(body, min(quality, 9), mtime=0)


@lru_cache(maxsize=1024)  # Gradio has 912 such files, of 10 MB
def _compress_well(body: bytes, coding: str) -> bytes:
    return _compress(body, coding, quality=11)
