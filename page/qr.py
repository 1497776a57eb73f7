"""The QR code of a link of this page, for picture cards; no other link gets one here."""

from io import BytesIO
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

MAX_LINK = 500  # bytes; page/static/card.js sends none that is longer


async def draw_qr(request: Request) -> Response:
    """An SVG of the link in the body, which is posted so that no log of addresses has the visitor's question in it."""
    link = b""
    async for chunk in request.stream():
        link += chunk
        if len(link) > MAX_LINK:
            return PlainTextResponse(f"A link of at most {MAX_LINK} bytes is drawn.", 413)
    if not _is_own(request, text := link.decode(errors="replace")):
        return PlainTextResponse("Only links of this page are drawn.", 400)
    return Response(await run_in_threadpool(_svg, text), media_type="image/svg+xml")


def _is_own(request: Request, link: str) -> bool:
    hosts = [*request.headers.get("x-forwarded-host", "").split(","), request.headers.get("host", "")]
    try:
        parts = urlsplit(link)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc) and parts.netloc in map(str.strip, hosts)


def _svg(link: str) -> bytes:
    import segno  # here, so that the start does not wait for it

    drawn = BytesIO()
    segno.make(link, micro=False, error="l").save(
        drawn, kind="svg", xmldecl=False, border=2, dark="#2b1d14", light="#fff", omitsize=True
    )
    return drawn.getvalue()
