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
        stop = gr.Button(text("stop"), elem_id="hush", scale=1, visible=False)
    with gr.Row(equal_height=True):
        sides = []
        for side in ("left", "right"):
            with gr.Column(min_width=120):
                gr.Markdown(text(f"{side}_side"), elem_classes="side")
                sides.append(gr.Markdown(text("nothing_yet"), elem_id=side))
    with gr.Row(elem_id="votes"):
        votes = [gr.Button(text(vote), visible=False, size="sm", elem_id=f"vote-{vote}") for vote in VOTES]
    verdict = gr.Markdown(elem_id="verdict")
    order = gr.State(())  # which adapter stands left, which right: the server alone knows until the vote
    outcome = gr.Textbox(visible=False)  # of a vote, for the tally that the browser keeps

    def compare(request: gr.Request, question: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Both replies as they grow, in an order drawn anew; the votes open when both are whole."""
        chosen = ChatRequest.of(*values)
        if chosen.adapter == BASE_ONLY:
            yield ALONE, "", (), "", *buttons()
            return
        adapters = random.sample([chosen.adapter, BASE_ONLY], 2)
        messages, replies = [conversation.question(question)], tuple[Reply, ...]()
        for replies in service.generate(messages, chosen, visitor_id(request), adapters):
            yield *(reply.shown for reply in replies), adapters, "", *buttons(stop=True)
        finished = all(reply.usage for reply in replies)
        yield *(reply.shown for reply in replies), adapters, "", *buttons(votes=finished)

    asked = gr.on(
        [ask.click, question.submit], compare, [question, *inputs],
        [*sides, order, verdict, ask, stop, *votes], show_progress="hidden", api_visibility="private",
        js="(question, scene, visitor, ...rest) => [question, ...zhenhuan.place(), ...rest]",
    )  # fmt: skip
    stop.click(buttons, None, [ask, stop, *votes], cancels=[asked], **QUIET)
    asked.failure(buttons, None, [ask, stop, *votes], **QUIET)
    for vote, button in zip(VOTES, votes, strict=True):
        button.click(partial(reveal, vote), [order], [verdict, outcome, ask, stop, *votes], **QUIET).then(
            None, [verdict, outcome], [verdict], js="(verdict, outcome) => zhenhuan.count(verdict, outcome)", **QUIET
        )


def reveal(vote: str, order: list[str]) -> tuple[Any, ...]:
    """Who stood where, and the vote's outcome: for the adapter, for the base, or even; no outcome without an order."""
    if len(order) != len(("left", "right")):
        return gr.skip(), "", *buttons()
    chosen = {"left": order[0], "right": order[1], "even": ""}[vote]
    outcome = "even" if not chosen else "base" if chosen == BASE_ONLY else "adapter"
    return f"左 Left: **{order[0]}** · 右 Right: **{order[1]}**", outcome, *buttons()


def buttons(stop: bool = False, votes: bool = False) -> list[Any]:
    """Ask or Stop, and the votes where two whole replies stand: no button is there that can do nothing."""
    return [gr.update(visible=shown) for shown in (not stop, stop, *[votes] * len(VOTES))]
