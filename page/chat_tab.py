"""The chat: ChatInterface with its `/chat`, and the reply that the browser asks for by `ChatTab.answer`.

The browser keeps the talks (page/static). It sends the messages of one with each question and gets back the reply with
the ids it sent. So the server keeps no talk, and a reply finds its talk whichever is shown when it comes.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from chat.engine import BASE_ONLY, MAX_CHARACTERS, ChatEngine
from chat.persona import PASSER_BY, PERSONA_LIMITS, SCENES
from page import conversation, gradio_internals
from page.conversation import TalkRequest
from page.i18n import text
from page.service import NUMBERS, ChatRequest, ChatService, Reply

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
SUGGESTED_TOKENS = 60  # of a line suggested to the visitor


def visitor_id(request: gr.Request | None) -> str:
    """The visitor, for the rate limiter: his Hugging Face name where he logged in, else his tab."""
    return str(request.username or request.session_hash) if request else "nobody"


def about(engine: ChatEngine) -> str:
    """Which adapter and base will answer, and what is wrong with that."""
    line = f"{engine.adapters[0]} · {engine.base}"
    if engine.adapters[0] == BASE_ONLY:
        line += " · 尚无适配器，只有底座与提示词 No adapter for this base yet"
    if lost := len(engine.refused):
        line += f" · 有 {lost} 个适配器打不开，详见日志 {lost} adapters could not be opened; the log says why"
    return line


def status(engine: ChatEngine, request: ChatRequest, reply: Reply) -> str:
    """Who answers, and at a reply's end how fast: the second value of `/chat`."""
    line = f"{request.adapter} · {engine.base}"
    if not (usage := reply.usage):
        return line
    return f"{line} · 首字 {usage.first_token:.1f} s · {usage.tokens} tokens · {usage.tokens_per_second:.1f} tokens/s"


def facts(engine: ChatEngine, request: ChatRequest, reply: Reply) -> dict[str, Any] | None:
    """What gave a reply, once it is whole: the page shows it, and a link asks for the same again."""
    if not (usage := reply.usage):
        return None
    return {
        "adapter": request.adapter, "digest": engine.digest(request.adapter), "base": engine.base,
        "seed": reply.seed, "tokens": usage.tokens, "first_token": round(usage.first_token, 2),
        "speed": round(usage.tokens_per_second, 1), "finish_reason": usage.finish_reason,
        "link": link(request, reply.seed), "unstated": list(engine.unstated.get(request.adapter, ())),
    }  # fmt: skip


def link(request: ChatRequest, seed: int | None) -> str:
    """The query that fills in the page for the same reply: what differs from the defaults, the adapter, the seed.

    The temperature is always named, as its default depends on the base. The browser adds the question as `q`.
    """
    default = {"scene": SCENES[0].name, "visitor": PASSER_BY, **NUMBERS}
    given = {"scene": request.scene, "visitor": request.visitor, **request.numbers}
    changed = {name: value for name, value in given.items() if value != default[name] or name == "temperature"}
    told = request.persona if isinstance(request.persona, dict) else {}
    own = {name: told[name] for name in PERSONA_LIMITS if told.get(name)}
    return urlencode({**changed, **own, "adapter": request.adapter, "seed": seed})


class ChatTab:
    """ChatInterface, and the ports through which the browser's modules ask. `inputs` are scene, visitor, adapter and
    NUMBERS, in order."""

    def __init__(self, page: gr.Blocks, service: ChatService, inputs: list[Any]) -> None:
        """Lay out the text box, and connect it."""
        self.service, self.engine, self.inputs = service, service.engine, inputs
        self.chat = self._chat_interface()
        gradio_internals.keep_only_chat_api(page)
        self._connect(page)

    def _chat_interface(self) -> gr.ChatInterface:
        """The text box with Send and Stop, and the `/chat` API."""

        def chat(
            message: str, history: list[dict[str, Any]], request: gr.Request, *values: Any
        ) -> Iterator[tuple[str, str]]:
            """Answer as 甄嬛 of the Qing court. Yields her words so far, and a line on who answered at what speed."""
            chosen, before = ChatRequest.of(*values), conversation.read_history(history)
            messages = [*before, conversation.question(message)]
            for (reply,) in self.service.generate(messages, chosen, visitor_id(request)):
                yield reply.shown, status(self.engine, chosen, reply)

        where = {"scene": SCENES[0].name, "visitor": PASSER_BY, "adapter": self.engine.adapters[0]}
        gradio_internals.name_inputs(chat, {**where, **self.service.numbers})
        return gr.ChatInterface(
            chat,
            chatbot=gr.Chatbot(visible=False),  # page/static/bubbles.js shows the talk: any talk, with what can be done
            textbox=gr.Textbox(
                placeholder=text("invitation"), submit_btn=text("send"), stop_btn=text("stop"), elem_id="composer",
                label=text("invitation"), show_label=False, max_length=MAX_CHARACTERS, max_lines=6, scale=7,
            ),
            additional_inputs=self.inputs,
            additional_outputs=[gr.Textbox(visible=False)],
            fill_height=False, autofocus=False, analytics_enabled=False,
            api_name="chat", api_description="Ask 甄嬛 of the Qing court; she answers in character, in Chinese.",
        )  # fmt: skip

    def _connect(self, page: gr.Blocks) -> None:
        """The ports: hidden parts that page/static/gradio.js presses and reads."""
        textbox, controls = self.chat.textbox, self.inputs[2:]
        textbox.stop_btn = text("stop")  # page.css shows Send or Stop
        textbox.submit(None, [textbox], [textbox], js="(text) => zhenhuan.submitted(text)", **QUIET)
        reply = gr.Textbox(visible="hidden", elem_id="port-reply")
        reply.change(None, [reply], None, js="(reply) => zhenhuan.replied(reply)", **QUIET)
        ask = gr.Button(visible="hidden", elem_id="port-ask")
        asked = ask.click(
            self.answer, [reply, *controls], [reply], js="(_, ...controls) => [zhenhuan.request(), ...controls]",
            trigger_mode="multiple",  # one that broke must not bar the next
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        asked.success(None, [reply], None, js="(reply) => zhenhuan.ended(reply)", **QUIET)
        asked.failure(None, None, None, js="() => zhenhuan.ended()", **QUIET)
        gradio_internals.offer_stop(page, textbox, asked)
        gr.Button(visible="hidden", elem_id="port-controls").click(
            None, controls, controls, js="(...values) => zhenhuan.chosen(values)", **QUIET
        )
        for control in controls:
            control.change(None, controls, None, js="(...values) => zhenhuan.choose(values)", **QUIET)

    def answer(self, request: gr.Request, asked: str, *values: Any) -> Iterator[str]:
        """One reply as it grows, to what the browser asked; each time as JSON with the ids that came with it."""
        try:
            talk = TalkRequest.parse(asked)
        except ValueError as error:
            yield json.dumps({"hint": str(error)}, ensure_ascii=False)
            return
        chosen = replace(ChatRequest.of(talk.scene, talk.visitor, *values), persona=talk.persona)
        if talk.mode == "suggest":  # the base does it: the adapter learned only her messages
            numbers = {**chosen.numbers, "max_new_tokens": SUGGESTED_TOKENS}
            chosen = replace(chosen, adapter=BASE_ONLY, numbers=numbers)
        going_on = talk.mode != "ask"
        for (reply,) in self.service.generate(
            talk.messages, chosen, visitor_id(request), continue_final_message=going_on
        ):
            sent = {"text": reply.text, "hint": reply.hint, "facts": facts(self.engine, chosen, reply)}
            yield json.dumps({**talk.ids, **sent}, ensure_ascii=False)
