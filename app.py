"""The page: a Gradio chat around any ChatEngine. It knows layout, nothing about models.

python app.py [--base small|medium|7b|FOLDER] [--bits 16|8|4] [--engine llama|transformers]
              [--host 0.0.0.0] [--port 7860] [--share] [--mcp]
"""

import argparse
import gc
import logging
import mimetypes
import os
import socket
import sys
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any, Literal

if __name__ == "__main__":
    gc.disable()  # starting makes millions of objects that stay; walking them again and again took a fifth of it

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told who chats here
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from chat.proxies import check_proxies

try:
    check_proxies()  # before gradio, which makes a client as it is imported
except ValueError as error:
    sys.exit(f"Chat-甄嬛 cannot start: {error}")

from page import gradio_internals  # before gradio

# isort: split
import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.events import api
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from chat import ENGINES, load, machine
from chat.bases import MEMORY_7B
from chat.engine import BASE_ONLY, ChatEngine
from chat.persona import NAME, PASSER_BY, SCENES
from chat.sampling import PARAMETERS
from page import compare_tab, conversation, metrics
from page.chat_tab import ChatTab, about, visitor_id
from page.http import Caching, Security, refuse_body
from page.i18n import BROWSER, ENGLISH, LANGUAGES, VISITORS, browser_module, text
from page.qr import draw_qr
from page.service import MAX_SEED, MAX_WAITING, ChatRequest, ChatService

STATIC = Path(__file__).parent / "page" / "static"


def build_page(engine: ChatEngine) -> gr.Blocks:
    """The page for an engine. page.css shows one of its columns at a time, beside what page/static draws."""
    service = ChatService(engine)
    page = gr.Blocks(title="Chat-甄嬛", analytics_enabled=False)
    page.chat_engine = engine  # type: ignore[attr-defined]  # for `health`
    with page:
        # Scene and visitor are chosen in what page/static draws; here they are inputs of `/chat`.
        scene = gr.Dropdown([scene.name for scene in SCENES], value=SCENES[0].name, label=text("scene"), visible=False)
        visitor = gr.Dropdown(list(VISITORS), value=PASSER_BY, label=text("visitor"), visible=False)
        with gr.Column(elem_id="voice"):
            gr.Markdown(about(engine), elem_id="about")
            inputs = [scene, visitor, *_controls(service)]
        with gr.Column(elem_id="speak"):
            if engine.refused or engine.adapters[0] == BASE_ONLY:
                gr.Markdown(about(engine), elem_id="lacking")
            ChatTab(page, service, inputs)
        with gr.Column(elem_id="compare"):
            compare_tab.add(service, inputs)
        _offer_tool(service)
    gradio_internals.explain_bad_inputs(page)
    gradio_internals.share_queue(page, service.max_visitors)  # page.waiting_queue has them take turns
    page.queue(max_size=4 * MAX_WAITING)
    return page


def _controls(service: ChatService) -> list[Any]:
    """One control for the adapter and for each of NUMBERS (service.py), in that order."""
    adapters = service.engine.adapters
    names = [(f"{name}（只用底座 base only）" if name == BASE_ONLY else name, name) for name in adapters]
    controls: list[Any] = [gr.Radio(names, value=adapters[0], label=text("adapter"))]
    for name, parameter in PARAMETERS.items():
        low, high, step = (parameter.metadata[key] for key in ("low", "high", "step"))
        controls.append(gr.Slider(low, high, service.numbers[name], step=step, label=text(name)))
    return [*controls, gr.Number(-1, precision=0, minimum=-1, maximum=MAX_SEED, label=text("seed"))]


def _offer_tool(service: ChatService) -> None:
    """`/ask`, one question without a history: what MCP clients are offered, for a tool of theirs keeps no state."""

    def ask(message: str, request: gr.Request, scene: str = SCENES[0].name, visitor: str = PASSER_BY) -> str:
        """Ask 甄嬛 of the Qing court one question; she answers in character, in Chinese.

        Args:
            message: What to say to her.
            scene: A time of her life; 永寿宫 is today.
            visitor: Who speaks; 路人 is a passer-by. Not everyone comes to her in every scene.
        """
        chosen = ChatRequest(scene=scene, visitor=visitor, adapter=service.engine.adapters[0], numbers=service.numbers)
        *_, (reply,) = service.generate([conversation.question(message)], chosen, visitor_id(request))
        if not reply.usage:  # she gave no reply, or not all of it
            raise gr.Error(reply.shown, print_exception=False)
        return reply.shown

    choices = {"scene": tuple(scene.name for scene in SCENES), "visitor": tuple(VISITORS)}
    ask.__annotations__ |= {name: Literal[names] for name, names in choices.items()}  # in the tool's schema
    api(ask, api_name="ask")


async def health(request: Request) -> PlainTextResponse:
    """How the engine is, in one word, for whoever restarts the page; on the event loop, as all threads may be taken."""
    word = request.app.get_blocks().chat_engine.health
    return PlainTextResponse(word, 200 if word in ("ok", "loading") else 503)


RANGES = {name: (each.metadata["low"], each.metadata["high"]) for name, each in PARAMETERS.items()}
FILES = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir())}
FILES["texts.js"] = browser_module(RANGES | {"seed": (-1, MAX_SEED)}).encode()
DIGEST = sha256(b"".join(FILES.values())).hexdigest()[:16]  # in their address: a browser asks for them once


async def static(request: Request) -> Response:
    """A file of page/static, under an address that changes with its content."""
    name = request.path_params["name"]
    if name not in FILES or request.path_params["digest"] != DIGEST:
        return PlainTextResponse("There is no such file.", 404)
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return Response(FILES[name], media_type=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})


def _document() -> str:
    """What stands in the document before Gradio's own: the bar, the talk, the lists, and the scripts that fill them."""
    markup = Template(FILES["shell.html"].decode())
    scene, (greeting, _) = SCENES[0], ENGLISH[SCENES[0].name]
    looks = b"".join(file for name, file in FILES.items() if name.endswith(".css")).decode()
    return f"<style>{looks}</style>" + markup.substitute(
        asdict(scene), greeting_english=greeting, name=NAME, scene=scene.name, visitor=PASSER_BY,
        visitor_english=VISITORS[PASSER_BY], made=BROWSER["made"][0], made_english=BROWSER["made"][1], digest=DIGEST,
        portrait=FILES["portrait.svg"].decode(),
    )  # fmt: skip


gradio_internals.put_in_document(
    f'<link rel="icon" href="page-static/{DIGEST}/favicon.svg">'
    f'<link rel="manifest" href="page-static/{DIGEST}/manifest.json">',
    _document(),
)
# page.css names the fonts; those of the theme are files.
THEME = gr.themes.Soft(
    primary_hue="rose", neutral_hue="stone", spacing_size="sm", font="serif", font_mono="monospace"
).set(
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="var(--gold)",
    block_title_text_color_dark="var(--gold)",
    block_title_padding="0",
)
LAUNCH: dict[str, Any] = {
    "max_file_size": 1,  # closes the upload route, which Gradio opens even to a page without files
    "state_session_capacity": 2000,  # a session takes 0.1 MB, and a stranger can name as many as he likes
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "footer_links": [],
    "theme": THEME,
    "favicon_path": STATIC / "favicon.svg",
    "i18n": LANGUAGES,
    "app_kwargs": {
        "middleware": [Middleware(Security), Middleware(Caching)],
        "routes": [
            Route("/health", health),
            Route("/page-static/{digest}/{name}", static),
            Route("/page-qr", draw_qr, methods=["POST"]),
        ],
        "exception_handlers": {RequestValidationError: refuse_body},
    },
}


def host(value: str) -> str:
    """An address to listen on. Raises ArgumentTypeError at once: Gradio would try it with a hundred ports first."""
    try:
        family, kind, *_, address = socket.getaddrinfo(value.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listening:
            listening.bind(address)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{value} is no address of this machine ({error.strerror})") from error
    return value


def main() -> None:
    """Load the engine of this machine and open the page."""
    machine.allow_any_terminal()
    parser = argparse.ArgumentParser(description="Open the page of Chat-甄嬛.")
    parser.add_argument("--base", help="small, medium, 7b, or a folder; by default what fits this machine")
    parser.add_argument("--bits", type=int, choices=MEMORY_7B, default=16, help="of its weights; 8 or 4 save memory")
    parser.add_argument("--engine", choices=ENGINES, help="by default what fits this machine")
    parser.add_argument("--host", type=host, help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public link")
    parser.add_argument("--mcp", action="store_true", help="also offer her as a tool to MCP clients")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_proxies(*filter(None, [args.host]))  # Gradio asks the page itself whether it is open
        engine = load(args.base, args.bits, args.engine)
        page = build_page(engine)
        if address := os.environ.get(metrics.VARIABLE):
            metrics.serve(address)
        if args.mcp:
            gradio_internals.hide_chat_from_tools(page)
        page.launch(
            server_name=args.host, server_port=args.port, share=args.share, mcp_server=args.mcp,
            max_threads=3 * engine.max_num_seqs + 2 * MAX_WAITING, prevent_thread_lock=True, **LAUNCH,
        )  # fmt: skip
        engine.wait()
        gc.freeze()
        gc.enable()
        page.block_thread()
    except (ValueError, RuntimeError, OSError, ImportError, OverflowError) as error:  # the last for a port above 65535
        sys.exit(f"Chat-甄嬛 cannot start: {error}")


if __name__ == "__main__":
    main()
