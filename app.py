"""The page: a Gradio chat around any ChatEngine. It knows layout, nothing about models.

python app.py [--base small|7b|FOLDER] [--host 0.0.0.0] [--port 7860] [--share]
"""

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told who chats here
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import spaces  # before torch: it stands in for CUDA on ZeroGPU
from gradio.events import EventListenerMethod

from chat import persona
from chat.engine import BASE_ONLY, MAX_CHARACTERS, MAX_NEW_TOKENS, MAX_TURNS, ChatEngine, Cost, Piece, Sampling
from chat.persona import Message

log = logging.getLogger(__name__)

WAITING = 20  # visitors in the queue; more are told to come back
SEND, STOP = "送出", "停下"
INVITATION = "对她说些什么……  Say something"
ASIDE = "\n\n〔"  # opens a plain hint below her words; a history is cut there
Answer = Callable[[list[Message], str, Sampling], Iterator[Piece]]


def read_history(history: list[dict[str, Any]]) -> list[Message]:
    """The visitor's and her turns of a page's history, as plain text.

    Content comes as a string or as typed parts. A history can be forged: other roles are dropped, lengths capped.
    The greeting is dropped too, for she was trained on conversations that the visitor opens.
    """
    turns: list[Message] = []
    for entry in history[-MAX_TURNS:]:
        role, text = entry.get("role"), _text(entry.get("content")).split(ASIDE)[0][: 2 * MAX_CHARACTERS]
        if text and (role == "user" or (role == "assistant" and turns)):
            turns.append({"role": cast("Any", role), "content": text})
    return turns


def _text(content: object) -> str:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def build_page(engine: ChatEngine) -> gr.ChatInterface:
    """The page for an engine. Every reply, the API's included, passes one queue: one model, one answer at a time."""
    answer = on_gpu(engine)

    def chat(
        message: str,
        history: list[dict[str, Any]],
        adapter: str = engine.adapters[0],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: float = Sampling.top_k,
        repetition_penalty: float = Sampling.repetition_penalty,
        max_new_tokens: float = Sampling.max_new_tokens,
    ) -> Iterator[tuple[str, str]]:
        """Answer as 甄嬛. Yields her words so far, and a line on who answered at what speed."""
        drawn = (temperature, top_p, top_k, repetition_penalty, max_new_tokens)
        yield from reply(answer, message, history, adapter, drawn, engine.base)

    status = gr.Markdown(_about(engine), elem_id="status", render=False)
    page = gr.ChatInterface(
        chat,
        title="Chat-甄嬛",
        description="与《甄嬛传》里的她说说话。她的话由模型写成，并非真人。  \n"
        "*Talk with 甄嬛 of the Qing court. A model writes her words.*",
        chatbot=gr.Chatbot(
            [greeting()], show_label=False, scale=1, allow_tags=False, latex_delimiters=[], buttons=["copy"]
        ),
        textbox=gr.Textbox(
            placeholder=INVITATION, submit_btn=SEND, stop_btn=STOP,
            max_length=MAX_CHARACTERS, show_label=False, scale=7,
        ),
        additional_inputs=_controls(engine),
        additional_inputs_accordion=gr.Accordion("声音与文采 · Voice and sampling", open=False),
        additional_outputs=[status],
        editable=True, fill_height=True, autofocus=False,
        analytics_enabled=False, api_name="chat", concurrency_limit=1,
    )  # fmt: skip
    with page:
        status.render()
    _one_queue(page)
    _keep_the_box_open(page)
    _offer_stop(page)
    _greet_again(page)
    page.queue(max_size=WAITING)
    return page


def on_gpu(engine: ChatEngine) -> Answer:
    """The engine's stream as ZeroGPU wants it: a plain generator that asks for a GPU, briefly. Elsewhere a no-op."""

    def seconds(turns: list[Message], adapter: str, sampling: Sampling) -> int:
        return min(25, 5 + sampling.max_new_tokens // 20)

    def answer(turns: list[Message], adapter: str, sampling: Sampling) -> Iterator[Piece]:
        yield from engine.stream(turns, adapter, sampling, threading.Event())

    return cast("Answer", spaces.GPU(answer, duration=seconds))


def reply(
    answer: Answer, message: str, history: list[dict[str, Any]], adapter: str, drawn: tuple[float, ...], base: str
) -> Iterator[tuple[str, str]]:
    """Her words as they grow, with the status line. Never raises: an exception would lock the visitor's text box."""
    said, status = "", f"{adapter} · {base}"
    try:
        turns = [*read_history(history), _question(message)]
        sampling = Sampling(
            temperature=drawn[0], top_p=drawn[1], top_k=int(drawn[2]),
            repetition_penalty=drawn[3], max_new_tokens=int(drawn[4]),
        )  # fmt: skip
        for piece in answer(turns, adapter, sampling):
            said += piece.text
            if piece.cost:
                said += _aside(piece.cost)
                status = f"{adapter} · {base} · {_speed(piece.cost)}"
            yield said, status
    except Refused as refusal:
        yield f"{refusal.line}{ASIDE}{refusal}〕", status
    except ValueError as error:
        yield f"{said or persona.UNWELL}{ASIDE}{error}〕", status
    except Exception as error:
        log.exception("A reply failed")
        reason = (
            str(error)
            if isinstance(error, gr.Error)
            else "这一句没有说完，请按「重试」。 The reply failed; press Retry."
        )
        yield f"{said or persona.UNWELL}{ASIDE}{reason}〕", status


class Refused(Exception):
    """A message she does not answer: her line, and the hint for the visitor."""

    def __init__(self, line: str, hint: str) -> None:
        super().__init__(hint)
        self.line = line


def _question(message: object) -> Message:
    text = _text(message)
    if not text:
        raise Refused(persona.SILENT, "请先写几个字。 Write a few words first.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(persona.LONG_WINDED, f"每句至多 {MAX_CHARACTERS} 字。 At most {MAX_CHARACTERS} characters.")
    return {"role": "user", "content": text}


def _aside(cost: Cost) -> str:
    notes = []
    if cost.stopped == "length":
        notes.append("话到此处已满，请说「接着说」。 Cut at the length limit.")
    if cost.forgotten:
        notes.append(f"最早的 {cost.forgotten} 句她已记不得了。 The oldest {cost.forgotten} messages no longer fit.")
    return f"{ASIDE}{' '.join(notes)}〕" if notes else ""


def _speed(cost: Cost) -> str:
    return f"首字 {cost.first_token:.1f} s · {cost.tokens} tokens · {cost.tokens_per_second:.1f} tokens/s"


def _about(engine: ChatEngine) -> str:
    missing = "" if engine.adapters[0] != BASE_ONLY else " · 尚无适配器，只有底座与提示词 No adapter for this base yet"
    return f"{engine.adapters[0]} · {engine.base}{missing}"


def _controls(engine: ChatEngine) -> list[str | gr.Component]:
    names = [(f"{name}（只用底座 base only）" if name == BASE_ONLY else name, name) for name in engine.adapters]
    return [
        gr.Dropdown(names, value=engine.adapters[0], label="声音 · Adapter"),
        gr.Slider(0, 2, Sampling.temperature, step=0.05, label="温度 · Temperature"),
        gr.Slider(0.05, 1, Sampling.top_p, step=0.05, label="Top-p"),
        gr.Slider(1, 200, Sampling.top_k, step=1, label="Top-k"),
        gr.Slider(1, 2, Sampling.repetition_penalty, step=0.01, label="重复惩罚 · Repetition penalty"),
        gr.Slider(1, MAX_NEW_TOKENS, Sampling.max_new_tokens, step=1, label="最长回复 · Longest reply (tokens)"),
    ]


def greeting() -> gr.MessageDict:
    """Her first words, in a new or cleared conversation, with openers to tap."""
    return {
        "role": "assistant",
        "content": persona.GREETING,
        "options": [{"value": opener} for opener in persona.OPENERS],
    }


def _one_queue(page: gr.ChatInterface) -> None:
    """Gradio limits each event by itself; a shared id makes page and API wait for one another."""
    for event in _streaming(page):
        event.concurrency_id = "reply"


def _keep_the_box_open(page: gr.ChatInterface) -> None:
    """Gradio empties the text box's placeholder, and locks it when an event fails outside us, as a full queue does."""
    for event in _streaming(page):
        for outcome, hint in (("success", INVITATION), ("failure", persona.CROWDED)):
            page.default_config.set_event_trigger(
                targets=[EventListenerMethod(None, outcome)],
                fn=partial(gr.Textbox, interactive=True, placeholder=hint, submit_btn=SEND, stop_btn=False),
                inputs=None, outputs=[page.textbox], queue=False, api_visibility="private", trigger_after=event._id,
                trigger_only_on_success=outcome == "success", trigger_only_on_failure=outcome == "failure",
            )  # fmt: skip


def _offer_stop(page: gr.ChatInterface) -> None:
    """Gradio offers Stop to a question sent and to Retry; here also to an opener tapped and a question edited."""
    streaming = [event._id for event in _streaming(page)]
    for begin in (page.chatbot.option_select, page.chatbot.edit):
        with page:
            begin(partial(gr.Textbox, submit_btn=False, stop_btn=STOP), None, [page.textbox], queue=False,
                  api_visibility="private")  # fmt: skip
    page.default_config.set_event_trigger(
        targets=[EventListenerMethod(page.textbox, "stop")],
        fn=partial(gr.Textbox, interactive=True, placeholder=INVITATION, submit_btn=SEND, stop_btn=False),
        inputs=None, outputs=[page.textbox], queue=False, api_visibility="private", cancels=streaming,
    )  # fmt: skip


def _streaming(page: gr.ChatInterface) -> list[Any]:
    return [event for event in page.fns.values() if event.types_generator]


def _greet_again(page: gr.ChatInterface) -> None:
    with page:
        page.chatbot.clear(lambda: [greeting()], None, [page.chatbot], queue=False, api_visibility="private")


LAUNCH: dict[str, Any] = {
    "max_file_size": 1,  # closes the upload route, which Gradio opens even to a page without files
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "footer_links": [],
    "theme": gr.themes.Soft(primary_hue="rose"),
}


def main() -> None:
    """Load the engine of this machine and open the page."""
    parser = argparse.ArgumentParser(description="Open the page of Chat-甄嬛.")
    parser.add_argument("--base", help="small, 7b, or a folder; by default what fits this machine")
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public link")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        from chat.local import load  # here, so that --help and the page's tests need no torch

        page = build_page(load(chosen.base))
        page.launch(server_name=chosen.host, server_port=chosen.port, share=chosen.share, **LAUNCH)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"Chat-甄嬛 cannot start: {error}")


if __name__ == "__main__":
    main()
