"""The page: a Gradio chat around any ChatEngine. It knows layout, nothing about models.

python app.py [--base small|medium|7b|FOLDER] [--bits 16|8|4] [--engine llama|transformers]
              [--host 0.0.0.0] [--port 7860] [--share] [--mcp]
"""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any, cast
from unittest import mock

if __name__ == "__main__":
    gc.disable()  # starting makes millions of objects that stay; walking them again and again took a fifth of it

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told who chats here
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Gradio writes type stubs for editors into its own package at every import, which takes 2 of its 4 s; it leaves out
# a class whose file it cannot find.
with mock.patch("inspect.getfile", side_effect=OSError):
    import gradio as gr
from gradio.events import api
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from chat import ENGINES, load
from chat.base import MEMORY_7B
from chat.engine import BASE_ONLY, MAX_CHARACTERS, MAX_NEW_TOKENS, Awaited, ChatEngine, Sampling
from chat.persona import NAME, PASSER_BY, SCENES
from page import compare, metrics, reply, transcript
from page.guard import Headers
from page.reply import Replies
from page.talk import Talk, bubbles, callers, chosen, setting, who
from page.transcript import Shown
from page.words import LANGUAGES, word

STATIC = Path(__file__).parent / "page" / "static"
PORTRAIT = STATIC / "portrait.svg"


def build_page(engine: ChatEngine) -> gr.Blocks:
    """The page for an engine: talk in one tab, adapter against base in the other."""
    replies = Replies(engine)
    page = gr.Blocks(title="Chat-甄嬛", fill_height=True, analytics_enabled=False)
    with page:
        gr.HTML(_masthead())
        with gr.Row(elem_id="stage"):
            scene = gr.Dropdown(_scenes(), value=SCENES[0].name, label=word("scene"), filterable=False)
            # Everybody at first, for API calls that name a scene; the page narrows the list to the scene at once.
            visitor = gr.Dropdown(callers(), value=PASSER_BY, label=word("visitor"), filterable=False)
        line = gr.Markdown(setting(SCENES[0].name), elem_id="setting")
        with gr.Accordion(word("voice"), open=False) as voice:
            inputs = [scene, visitor, *_controls(engine)]
        voice.unrender()  # ChatInterface wants its inputs made; people want them below the conversation
        status = gr.Markdown(reply.about(engine), elem_id="status", render=False)
        with gr.Tab(word("talk")):
            chat = _chat(replies, inputs, status)
            talk = Talk(page, chat, replies, inputs, line, status)
            talk.add_tools()
            voice.render()
            status.render()
        with gr.Tab(word("compare")):
            compare.add(replies, inputs)
        talk.connect()
        _offer_tool(replies)
    _plain_api(page)
    page.queue(max_size=4 * reply.WAITING)
    return page


def _masthead() -> str:
    return (
        f'<div id="masthead">{_static(PORTRAIT.name)}<div><h1>Chat-{NAME}</h1>'
        "<p>与《甄嬛传》里的她说说话。她的话由模型写成，并非真人。</p>"
        f'<p class="english" lang="en">Talk with {NAME} of the Qing court. A model writes her words.</p></div></div>'
    )


def _scenes() -> list[tuple[str, str]]:
    return [(word(scene.name), scene.name) for scene in SCENES]


def _controls(engine: ChatEngine) -> list[Any]:
    names = [(f"{name}（只用底座 base only）" if name == BASE_ONLY else name, name) for name in engine.adapters]
    return [
        gr.Dropdown(names, value=engine.adapters[0], label=word("adapter"), filterable=False),
        gr.Slider(0, 2, Sampling.temperature, step=0.05, label=word("temperature")),
        gr.Slider(0.05, 1, Sampling.top_p, step=0.05, label=word("top_p")),
        gr.Slider(1, 200, Sampling.top_k, step=1, label=word("top_k")),
        gr.Slider(1, 2, Sampling.repetition_penalty, step=0.01, label=word("repetition_penalty")),
        gr.Slider(1, MAX_NEW_TOKENS, Sampling.max_new_tokens, step=1, label=word("max_new_tokens")),
        gr.Number(-1, precision=0, minimum=-1, maximum=reply.LARGEST_SEED, label=word("seed")),
    ]


def _chat(replies: Replies, inputs: list[Any], status: gr.Markdown) -> gr.ChatInterface:
    """The conversation itself, and the `/chat` API."""
    engine = replies.engine

    def chat(
        message: str,
        history: list[Shown],
        request: gr.Request,
        scene: str = SCENES[0].name,
        visitor: str = PASSER_BY,
        adapter: str = engine.adapters[0],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: float = Sampling.top_k,
        repetition_penalty: float = Sampling.repetition_penalty,
        max_new_tokens: float = Sampling.max_new_tokens,
        seed: float | None = -1,
    ) -> Iterator[tuple[list[Shown], str]]:
        """Answer as 甄嬛 of the Qing court. Yields her words so far, and a line on who answered at what speed."""
        picked = chosen(scene, visitor, adapter, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
        asked = None if reply.read_history(history) else str(message)
        turns = lambda: [*reply.read_history(history), reply.question(message)]  # noqa: E731
        for spoken in replies.reply(turns, picked, who(request)):
            yield bubbles(engine, picked, spoken, asked), reply.status(engine, picked, spoken)

    return gr.ChatInterface(
        chat,
        chatbot=gr.Chatbot(
            cast("Any", [transcript.greeting()]), show_label=False, label=NAME, allow_tags=False, latex_delimiters=[],
            buttons=["copy"], elem_id="talk", avatar_images=(None, PORTRAIT),
        ),
        textbox=gr.Textbox(
            placeholder=word("invitation"), submit_btn=word("send"), stop_btn=word("stop"),
            label=word("invitation"), show_label=False, max_length=MAX_CHARACTERS, scale=7,
        ),
        additional_inputs=inputs,
        additional_outputs=[status],
        editable=True, fill_height=True, autofocus=False, analytics_enabled=False,
        api_name="chat", api_description="Ask 甄嬛 of the Qing court; she answers in character, in Chinese.",
    )  # fmt: skip


def _offer_tool(replies: Replies) -> None:
    """`/ask`, one question without a history: what MCP clients are offered, for a tool of theirs keeps no state."""

    def ask(message: str, request: gr.Request, scene: str = SCENES[0].name, visitor: str = PASSER_BY) -> str:
        """Ask 甄嬛 of the Qing court one question; she answers in character, in Chinese.

        Args:
            message: What to say to her.
            scene: A time of her life: 永寿宫 (today), 初入宫, 盛宠, 甘露寺, 回宫, 封后斗争 or 太后.
            visitor: Who speaks: 路人 (a passer-by), 皇上, 沈眉庄, 果郡王 and others.
        """
        picked = reply.Chosen(scene=scene, visitor=visitor, adapter=replies.engine.adapters[0])
        *_, spoken = replies.reply(lambda: [reply.question(message)], picked, who(request))
        return spoken.text

    api(ask, api_name="ask")


def _plain_api(page: gr.Blocks) -> None:
    """The API answers in plain strings: her words, without the page's notes."""
    (event,) = [event for event in page.fns.values() if event.api_name == "chat"]
    speak: Any = event.fn

    @wraps(speak)  # Gradio reads from its signature what to hand over
    async def plain(*inputs: Any) -> Any:
        async for said, *rest in speak(*inputs):
            yield said[0]["content"], *rest

    event.fn = plain


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


THEME = gr.themes.Soft(primary_hue="rose", neutral_hue="stone", spacing_size="sm").set(
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_text_color="var(--gold)",
    block_title_text_color_dark="var(--gold)",
    block_title_padding="0",
)


def hide_chat_from_tools(page: gr.Blocks) -> None:
    """Leave `/ask` as the one tool: Gradio's MCP server cannot call an event that holds a state, as `/chat` does."""
    for event in page.fns.values():
        if event.api_name == "chat":
            event.api_visibility = "undocumented"


LAUNCH: dict[str, Any] = {
    "max_file_size": 1,  # closes the upload route, which Gradio opens even to a page without files
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "footer_links": [],
    "theme": THEME,
    # Not as css_paths: Gradio would rewrite the selectors of media queries so that they match nothing.
    "head": f"<style>{_static('page.css')}</style><script>{_static('page.js')}</script>",
    "favicon_path": STATIC / "favicon.svg",
    "pwa": True,
    "i18n": LANGUAGES,
    "app_kwargs": {
        "middleware": [Middleware(Headers)],
        "routes": [Route("/health", lambda _: PlainTextResponse("ok"))],  # for whoever restarts it when it hangs
    },
}


def main() -> None:
    """Load the engine of this machine and open the page."""
    parser = argparse.ArgumentParser(description="Open the page of Chat-甄嬛.")
    parser.add_argument("--base", help="small, medium, 7b, or a folder; by default what fits this machine")
    parser.add_argument("--bits", type=int, choices=MEMORY_7B, default=16, help="of its weights; 8 or 4 save memory")
    parser.add_argument("--engine", choices=ENGINES, help="by default what fits this machine")
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public link")
    parser.add_argument("--mcp", action="store_true", help="also offer her as a tool to MCP clients")
    picked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        engine = load(picked.base, picked.bits, picked.engine)
        page = build_page(engine)
        if place := os.environ.get(metrics.SETTING):
            metrics.serve(place)
        if picked.mcp:
            hide_chat_from_tools(page)
        page.launch(
            server_name=picked.host, server_port=picked.port, share=picked.share, mcp_server=picked.mcp,
            max_threads=3 * engine.most + 2 * reply.WAITING, prevent_thread_lock=True, **LAUNCH,
        )  # fmt: skip
        if isinstance(engine, Awaited):
            engine.wait()
        gc.freeze()
        gc.enable()
        page.block_thread()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"Chat-甄嬛 cannot start: {error}")


if __name__ == "__main__":
    main()
