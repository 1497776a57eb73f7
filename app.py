"""The page: a Gradio chat around any ChatEngine. It knows layout, nothing about models.

python app.py [--base small|medium|7b|FOLDER] [--bits 16|8|4] [--engine llama|transformers]
              [--host 0.0.0.0] [--port 7860] [--share] [--mcp]
"""

import argparse
import gc
import logging
import os
import socket
import sys
from pathlib import Path
from string import Template
from typing import Any

if __name__ == "__main__":
    gc.disable()  # starting makes millions of objects that stay; walking them again and again took a fifth of it

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told who chats here
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from page import gradio_internals  # before gradio

# isort: split
import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.events import api
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from chat import ENGINES, load, machine
from chat.bases import MEMORY_7B
from chat.engine import BASE_ONLY, ChatEngine
from chat.persona import GREETING, NAME, PASSER_BY, SCENES
from chat.sampling import PARAMETERS
from page import compare_tab, conversation, metrics
from page.chat_tab import PORTRAIT, ChatTab, about, visitor_choices, visitor_id
from page.http import Caching, Security, refuse_body
from page.i18n import LANGUAGES, SCENE_LINE, text
from page.service import MAX_SEED, MAX_WAITING, ChatRequest, ChatService

STATIC = Path(__file__).parent / "page" / "static"


def build_page(engine: ChatEngine) -> gr.Blocks:
    """The page for an engine: talk in one tab, adapter against base in the other."""
    service = ChatService(engine)
    page = gr.Blocks(title="Chat-甄嬛", fill_height=True, analytics_enabled=False)
    page.chat_engine = engine  # type: ignore[attr-defined]  # for `health`
    with page:
        gr.Markdown(MASTHEAD, sanitize_html=False, padding=True)
        with gr.Row(elem_id="stage"):
            scenes = [(text(scene.name), scene.name) for scene in SCENES]
            scene = gr.Dropdown(scenes, value=SCENES[0].name, label=text("scene"), filterable=False)
            # Everybody at first, for API calls that name a scene; the page narrows the list to the scene at once.
            visitor = gr.Dropdown(visitor_choices(), value=PASSER_BY, label=text("visitor"), filterable=False)
        scene_line = gr.Markdown(text(SCENE_LINE + SCENES[0].name), elem_id="setting")
        with gr.Accordion(text("voice"), open=False) as voice:
            inputs = [scene, visitor, *_controls(service)]
        voice.unrender()  # ChatInterface wants its inputs made; people want them below the conversation
        status = gr.Markdown(about(engine), elem_id="status", render=False)
        with gr.Tab(text("talk")):
            chat_tab = ChatTab(page, service, inputs, scene_line, status)
            voice.render()
            status.render()
        with gr.Tab(text("compare")):
            compare_tab.add(service, inputs)
        chat_tab.connect()
        _offer_tool(service)
    gradio_internals.answer_in_plain_strings(page)
    gradio_internals.refuse_malformed_calls(page)
    page.queue(max_size=4 * MAX_WAITING)
    return page


def _controls(service: ChatService) -> list[Any]:
    """One control for the adapter and for each of NUMBERS (service.py), in that order."""
    adapters = service.engine.adapters
    names = [(f"{name}（只用底座 base only）" if name == BASE_ONLY else name, name) for name in adapters]
    controls: list[Any] = [gr.Dropdown(names, value=adapters[0], label=text("adapter"), filterable=False)]
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
            scene: A time of her life: 永寿宫 (today), 初入宫, 盛宠, 甘露寺, 回宫, 封后斗争 or 太后.
            visitor: Who speaks: 路人 (a passer-by), 皇上, 沈眉庄, 果郡王 and others.
        """
        chosen = ChatRequest(scene=scene, visitor=visitor, adapter=service.engine.adapters[0], numbers=service.numbers)
        *_, (reply,) = service.generate([conversation.question(message)], chosen, visitor_id(request))
        return reply.shown

    api(ask, api_name="ask")


async def health(request: Request) -> PlainTextResponse:
    """How the engine is, in one word, for whoever restarts the page; on the event loop, as all threads may be taken."""
    word = request.app.get_blocks().chat_engine.health
    return PlainTextResponse(word, 200 if word in ("ok", "loading") else 503)


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


MASTHEAD = (
    f'<div id="masthead">{_static(PORTRAIT.name)}<div><h1>Chat-{NAME}</h1>'
    "<p>与《甄嬛传》里的她说说话。她的话由模型写成，并非真人。</p>"
    f'<p class="english" lang="en">Talk with {NAME} of the Qing court. A model writes her words.</p>'
    "</div></div>"
)
STYLE = f"<style>{_static('page.css')}</style>"
SHELL = Template(_static("shell.html"))
gradio_internals.put_in_document(
    STYLE + SHELL.substitute(masthead=MASTHEAD, portrait=_static(PORTRAIT.name), greeting=GREETING)
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
    # Not as css_paths: Gradio would rewrite the selectors of media queries so that they match nothing.
    "head": f"{STYLE}<script>{_static('page.js')}</script>",
    "favicon_path": STATIC / "favicon.svg",
    "pwa": True,
    "i18n": LANGUAGES,
    "app_kwargs": {
        "middleware": [Middleware(Security), Middleware(Caching)],
        "routes": [Route("/health", health)],
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
