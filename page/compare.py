"""Side by side: one question to the adapter and to the base in one batch, a blind vote, and a tally in the browser."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from chat.engine import BASE_ONLY, MAX_CHARACTERS
from page import reply
from page.reply import Replies, Spoken
from page.talk import QUIET, chosen, who
from page.words import word

VOTES = ("left", "even", "right")
ALONE = "尚无适配器，没有可比的。 There is no adapter to compare with."
Tally = dict[str, int]  # votes for the adapter, for the base, and for neither


def add(replies: Replies, inputs: list[Any]) -> None:
    """Lay out the tab. `inputs` are scene, visitor and the controls; the adapter chosen there meets the base."""
    gr.Markdown(word("blind"))
    with gr.Row():
        question = gr.Textbox(label=word("question"), max_length=MAX_CHARACTERS, elem_id="asked", scale=6)
        ask = gr.Button(word("ask"), variant="primary", elem_id="ask", scale=1)
        stop = gr.Button(word("stop"), variant="stop", elem_id="hush", scale=1)
    with gr.Row(equal_height=True):
        sides = [gr.Markdown(container=True, min_height=120, elem_id=side) for side in ("left", "right")]
    with gr.Row(elem_id="votes"):
        votes = [gr.Button(word(vote), interactive=False, size="sm", elem_id=f"vote-{vote}") for vote in VOTES]
    verdict = gr.Markdown(elem_id="verdict")
    order = gr.State(())  # which adapter stands left, which right: the server alone knows until the vote
    tally = gr.BrowserState({}, storage_key="zhenhuan-tally", secret="zhenhuan")

    def both(request: gr.Request, asked: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from compare(replies, who(request), asked, *values)

    asked = gr.on(
        [ask.click, question.submit], both, [question, *inputs],
        [*sides, order, verdict, *votes], api_visibility="private",
    )  # fmt: skip
    stop.click(lambda: _votes(False), None, votes, cancels=[asked], **QUIET)
    for vote, button in zip(VOTES, votes, strict=True):
        button.click(partial(count, vote), [order, tally], [verdict, tally, *votes], **QUIET)


def compare(replies: Replies, visitor: str, question: str, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Both replies as they grow, in an order drawn anew; the votes open when both are whole."""
    picked = chosen(*values)
    if picked.adapter == BASE_ONLY:
        yield ALONE, "", (), "", *_votes(False)
        return
    order = random.sample([picked.adapter, BASE_ONLY], 2)
    pair: tuple[Spoken, ...] = ()
    for pair in replies.compare(lambda: [reply.question(question)], picked, visitor, order):
        yield *(spoken.text for spoken in pair), order, "", *_votes(False)
    if all(spoken.cost for spoken in pair):
        yield *(spoken.text for spoken in pair), order, "", *_votes(True)


def count(vote: str, order: list[str], tally: Tally) -> tuple[Any, ...]:
    """Reveal who stood where, and add the vote to the tally."""
    if len(order) != len(("left", "right")):
        return gr.skip(), gr.skip(), *_votes(False)
    chose = {"left": order[0], "right": order[1], "even": ""}[vote]
    kind = "even" if not chose else "base" if chose == BASE_ONLY else "adapter"
    counted = {key: int((tally or {}).get(key, 0)) for key in ("adapter", "base", "even")}
    counted[kind] += 1
    revealed = f"左 Left: **{order[0]}** · 右 Right: **{order[1]}**"
    score = f"适配器 adapter {counted['adapter']} : 底座 base {counted['base']} · 平 even {counted['even']}"
    return f"{revealed}  \n{score}", counted, *_votes(False)


def _votes(open_: bool) -> list[Any]:
    return [gr.update(interactive=open_) for _ in VOTES]
