"""Side by side: one question to the adapter and to the base in one batch, a blind vote, and a tally in the browser."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from chat.engine import BASE_ONLY, MAX_CHARACTERS
from page import conversation
from page.chat_tab import QUIET, visitor_id
from page.i18n import text
from page.service import ChatRequest, ChatService, Reply

VOTES = ("left", "even", "right")
ALONE = "尚无适配器，没有可比的。 There is no adapter to compare with."


def add(service: ChatService, inputs: list[Any]) -> None:
    """Lay out the tab. `inputs` are scene, visitor and the controls; the adapter chosen there meets the base."""
    gr.Markdown(text("blind"))
    with gr.Row():
        question = gr.Textbox(label=text("question"), max_length=MAX_CHARACTERS, elem_id="asked", scale=6)
        ask = gr.Button(text("ask"), variant="primary", elem_id="ask", scale=1)
        stop = gr.Button(text("stop"), variant="stop", elem_id="hush", scale=1)
    with gr.Row(equal_height=True):
        sides = [gr.Markdown(container=True, min_height=120, elem_id=side) for side in ("left", "right")]
    with gr.Row(elem_id="votes"):
        votes = [gr.Button(text(vote), interactive=False, size="sm", elem_id=f"vote-{vote}") for vote in VOTES]
    verdict = gr.Markdown(elem_id="verdict")
    order = gr.State(())  # which adapter stands left, which right: the server alone knows until the vote
    tally = gr.BrowserState({}, storage_key="zhenhuan-tally", secret="zhenhuan")

    def compare(request: gr.Request, question: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Both replies as they grow, in an order drawn anew; the votes open when both are whole."""
        chosen = ChatRequest.of(*values)
        if chosen.adapter == BASE_ONLY:
            yield ALONE, "", (), "", *_votes(False)
            return
        adapters = random.sample([chosen.adapter, BASE_ONLY], 2)
        messages, replies = [conversation.question(question)], tuple[Reply, ...]()
        for replies in service.generate(messages, chosen, visitor_id(request), adapters):
            yield *(reply.shown for reply in replies), adapters, "", *_votes(False)
        if all(reply.usage for reply in replies):
            yield *(reply.shown for reply in replies), adapters, "", *_votes(True)

    asked = gr.on(
        [ask.click, question.submit], compare, [question, *inputs],
        [*sides, order, verdict, *votes], api_visibility="private",
    )  # fmt: skip
    stop.click(lambda: _votes(False), None, votes, cancels=[asked], **QUIET)
    for vote, button in zip(VOTES, votes, strict=True):
        button.click(partial(count, vote), [order, tally], [verdict, tally, *votes], **QUIET)


def count(vote: str, order: list[str], tally: Any) -> tuple[Any, ...]:
    """Reveal who stood where, and add the vote to the tally: for the adapter, for the base, or for neither."""
    if len(order) != len(("left", "right")):
        return gr.skip(), gr.skip(), *_votes(False)
    chosen = {"left": order[0], "right": order[1], "even": ""}[vote]
    kind = "even" if not chosen else "base" if chosen == BASE_ONLY else "adapter"
    kept = tally if isinstance(tally, dict) else {}  # by the browser, where anything may have been written
    counted = {key: n if isinstance(n := kept.get(key), int) else 0 for key in ("adapter", "base", "even")}
    counted[kind] += 1
    revealed = f"左 Left: **{order[0]}** · 右 Right: **{order[1]}**"
    score = f"适配器 adapter {counted['adapter']} : 底座 base {counted['base']} · 平 even {counted['even']}"
    return f"{revealed}  \n{score}", counted, *_votes(False)


def _votes(open_: bool) -> list[Any]:
    return [gr.update(interactive=open_) for _ in VOTES]
