"""The chat: its handlers, scenes, alternatives, edits, files, links, and a text box that never locks."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import gradio as gr

from chat import persona
from chat.engine import BASE_ONLY, MAX_CHARACTERS, ChatEngine, check_adapters
from chat.persona import NAME, PASSER_BY, SCENES, Message
from page import conversation, gradio_internals
from page.conversation import FORMATS, Alternatives, ChatbotMessage, Transcript
from page.i18n import SCENE_LINE, UNSTATED, VISITORS, text
from page.service import NUMBERS, ChatRequest, ChatService, Reply

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
PORTRAIT = Path(__file__).parent / "static" / "portrait.svg"
SUGGESTED_TOKENS = 60  # of a line suggested to the visitor
FINISH_REASONS = {
    "stop": "自己说完 ended", "length": "到长度上限 length limit",
    "time": "超时 time limit", "cancelled": "被打断 stopped",
}  # fmt: skip


def visitor_id(request: gr.Request | None) -> str:
    """The visitor, for the rate limiter: his Hugging Face name where he logged in, else his tab."""
    return str(request.username or request.session_hash) if request else "nobody"


def visitor_choices(scene: str | None = None) -> list[tuple[str, str]]:
    """Those who may come to her in a scene, or at all: as the visitor reads them, and by name."""
    names = persona.scene_named(scene).visitors if scene else VISITORS
    return [(text(name), name) for name in names]


def about(engine: ChatEngine) -> str:
    """The status line before anything was said: which adapter and base will answer."""
    line = f"{engine.adapters[0]} · {engine.base}"
    if engine.adapters[0] == BASE_ONLY:
        line += " · 尚无适配器，只有底座与提示词 No adapter for this base yet"
    if lost := len(engine.refused):
        line += f" · 有 {lost} 个适配器打不开，详见日志 {lost} adapters could not be opened; the log says why"
    return line


def status(engine: ChatEngine, request: ChatRequest, reply: Reply) -> str:
    """The status line of a reply: who answers, and at its end how fast."""
    line = f"{request.adapter} · {engine.base}"
    if not (usage := reply.usage):
        return line
    return f"{line} · 首字 {usage.first_token:.1f} s · {usage.tokens} tokens · {usage.tokens_per_second:.1f} tokens/s"


def bubbles(engine: ChatEngine, request: ChatRequest, reply: Reply, question: str = "") -> list[ChatbotMessage]:
    """A reply as the page shows it; once it is whole, a folded note below says what gave it and how to have it again.

    `question` is given when it was the first of a conversation: a link asks it again with the same seed.
    """
    shown: list[ChatbotMessage] = [{"role": "assistant", "content": reply.shown}]
    if usage := reply.usage:
        digest, speed = engine.digest(request.adapter), f"{usage.tokens_per_second:.1f} tokens/s"
        facts = [
            f"声音 Adapter: {request.adapter}" + (f" (sha256 {digest}…)" if digest else ""),
            *(UNSTATED[what] for what in engine.unstated.get(request.adapter, ())),
            f"底座 Base: {engine.base}",
            f"种子 Seed: {reply.seed}",
            f"{usage.tokens} tokens · 首字 first token {usage.first_token:.2f} s · {speed}",
            f"收尾 Stop: {FINISH_REASONS[usage.finish_reason]}",
        ]
        if question:
            facts.append(f"[同样的一问 · The same again](?{link(request, reply.seed, question)})")
        shown.append(conversation.note("  \n".join(facts)))
    return shown


def link(request: ChatRequest, seed: int | None, question: str) -> str:
    """The query that fills in the page for the same reply: what differs from the defaults, the adapter, the seed.

    The temperature is always named, as its default depends on the base.
    """
    default = {"scene": SCENES[0].name, "visitor": PASSER_BY, **NUMBERS}
    given = {"scene": request.scene, "visitor": request.visitor, **request.numbers}
    changed = {name: value for name, value in given.items() if value != default[name] or name == "temperature"}
    return urlencode({**changed, "adapter": request.adapter, "seed": seed, "q": question})


def recall(saved: str) -> Transcript | None:
    """What the browser kept, if it can be read."""
    try:
        return conversation.read_transcript(saved)
    except ValueError:
        return None


class ChatTab:
    """The parts of the page that a conversation touches. `inputs` are scene, visitor, adapter and NUMBERS, in order."""

    def __init__(
        self, page: gr.Blocks, service: ChatService, inputs: list[Any], scene_line: gr.Markdown, status: gr.Markdown
    ) -> None:
        """Lay out the conversation, then the row and the drawer below it."""
        self.page, self.service, self.engine = page, service, service.engine
        self.inputs, self.scene_line, self.status = inputs, scene_line, status
        self.scene, self.visitor = inputs[:2]
        self.chat = self._chat_interface()
        self.messages = [self.chat.chatbot, self.chat.chatbot_state]  # to be changed together, from outside of it
        self.alternatives = gr.State(Alternatives())
        self.counter = gr.Markdown(str(Alternatives()), elem_id="counter", render=False)
        self.carrier = gr.Textbox(visible=False)  # text from and to the browser's own code
        self.changed = [*self.messages, self.alternatives, self.counter]
        self._add_tools()
        self._add_drawer()

    def _chat_interface(self) -> gr.ChatInterface:
        """The conversation itself, and the `/chat` API."""

        def chat(
            message: str, history: list[ChatbotMessage], request: gr.Request, *values: Any
        ) -> Iterator[tuple[list[ChatbotMessage], str]]:
            """Answer as 甄嬛 of the Qing court. Yields her words so far, and a line on who answered at what speed."""
            chosen, before = ChatRequest.of(*values), conversation.read_history(history)
            messages = [*before, conversation.question(message)]
            for (reply,) in self.service.generate(messages, chosen, visitor_id(request)):
                shown = bubbles(self.engine, chosen, reply, "" if before else str(message))
                yield shown, status(self.engine, chosen, reply)

        where = {"scene": SCENES[0].name, "visitor": PASSER_BY, "adapter": self.engine.adapters[0]}
        defaults: dict[str, Any] = {**where, **self.service.numbers}
        gradio_internals.name_inputs(chat, defaults)
        return gr.ChatInterface(
            chat,
            chatbot=gr.Chatbot(
                cast("Any", [conversation.greeting()]), show_label=False, label=NAME, allow_tags=False,
                latex_delimiters=[], buttons=["copy"], elem_id="talk", avatar_images=(None, PORTRAIT),
            ),
            textbox=gr.Textbox(
                placeholder=text("invitation"), submit_btn=text("send"), stop_btn=text("stop"),
                label=text("invitation"), show_label=False, max_length=MAX_CHARACTERS, scale=7,
            ),
            additional_inputs=self.inputs,
            additional_outputs=[self.status],
            editable=True, fill_height=True, autofocus=False, analytics_enabled=False,
            api_name="chat", api_description="Ask 甄嬛 of the Qing court; she answers in character, in Chinese.",
        )  # fmt: skip

    def go_on(
        self, request: gr.Request, history: list[ChatbotMessage], *values: Any
    ) -> Iterator[tuple[list[ChatbotMessage], str]]:
        """Continue her last reply in its bubble."""
        before, tail = conversation.split_reply(history)
        last, chosen = conversation.reply_text(tail), ChatRequest.of(*values)
        messages: list[Message] = [*conversation.read_history(before), {"role": "assistant", "content": last}]
        if len(messages) < 2 or not last:
            yield history, about(self.engine)
            return
        for (reply,) in self.service.generate(messages, chosen, visitor_id(request), continue_final_message=True):
            yield [*before, *bubbles(self.engine, chosen, reply)], status(self.engine, chosen, reply)

    def suggest(self, request: gr.Request, history: list[ChatbotMessage], *values: Any) -> Iterator[tuple[Any, str]]:
        """Write a line for the visitor into the text box. The base does it: the adapter learned only her messages."""
        chosen = ChatRequest.of(*values)
        numbers = {**chosen.numbers, "max_new_tokens": SUGGESTED_TOKENS}
        chosen = replace(chosen, adapter=BASE_ONLY, numbers=numbers)
        messages = [*conversation.read_history(history), conversation.question("")]
        for (reply,) in self.service.generate(messages, chosen, visitor_id(request), continue_final_message=True):
            line = next(iter(reply.text.strip().splitlines()), "")
            waiting = reply.hint and not reply.usage  # the text is hers then, not the visitor's
            yield gr.update(value="" if waiting else line), reply.hint or status(self.engine, chosen, reply)

    def _add_tools(self) -> None:
        """The row below the text box: leaf through replies, continue, suggest, edit."""
        chatbot, textbox = self.chat.chatbot, self.chat.textbox
        with gr.Row(elem_id="tools"):
            for key, step in (("earlier", -1), ("later", 1)):
                gr.Button(text(key), size="sm").click(
                    partial(self.leaf, step), [chatbot, self.alternatives], self.changed, **QUIET
                )
                self.counter.render() if step < 0 else None
            for key, handler, output in (("go_on", self.go_on, chatbot), ("suggest", self.suggest, textbox)):
                button = gr.Button(text(key), size="sm", elem_id=key)
                button.click(self.show_stop, None, [textbox], **QUIET)
                button.click(handler, [chatbot, *self.inputs], [output, self.status], api_visibility="private")
            revise = gr.Button(text("revise"), size="sm", elem_id="revise")
        with gr.Group(visible=False) as group:
            revised = gr.Textbox(label=text("revised"), lines=3, elem_id="revised")
            with gr.Row():
                save, cancel = gr.Button(text("save"), variant="primary"), gr.Button(text("cancel"))
        revise.click(
            lambda history: (gr.update(visible=True), conversation.reply_text(conversation.split_reply(history)[1])),
            [chatbot], [group, revised], **QUIET,
        )  # fmt: skip
        save.click(self.revise, [chatbot, revised, self.alternatives], [*self.changed, group], **QUIET)
        cancel.click(lambda: gr.update(visible=False), None, [group], **QUIET)

    def _add_drawer(self) -> None:
        """Files of the conversation: save, open, delete."""
        with gr.Accordion(text("keep"), open=False, elem_id="drawer"):
            gr.Markdown(text("private"), elem_id="private")
            with gr.Row():
                for form, suffix in FORMATS.items():
                    gr.Button(text(f"export_{form.lower()}"), size="sm").click(
                        partial(conversation.export, form=form), [self.chat.chatbot, self.scene, self.visitor],
                        [self.carrier], **QUIET,
                    ).then(
                        None, [self.carrier, self.scene], None,
                        js=f"(text, scene) => {{ zhenhuan.save(text, `甄嬛-${{scene}}.{suffix}`); return [] }}",
                    )  # fmt: skip
                gr.Button(text("import"), size="sm", elem_id="import").click(
                    None, None, [self.carrier], js="() => zhenhuan.open()"
                ).then(
                    self.bring_back, [self.carrier],
                    [self.scene, self.visitor, self.scene_line, *self.messages, self.status], **QUIET,
                )  # fmt: skip
                gr.Button(text("forget"), size="sm", variant="stop", elem_id="forget").click(
                    self.start_over, [self.scene], self.changed, **QUIET,
                    js="(scene) => { zhenhuan.forget(); return scene }",
                )  # fmt: skip

    def connect(self) -> None:
        """Scenes, storage, and what holds for every event that streams; called once all of them are on the page."""
        chatbot, textbox = self.chat.chatbot, self.chat.textbox
        self.scene.input(
            self.enter, [self.scene, self.carrier], [self.visitor, self.scene_line, *self.changed],
            js="(scene, _) => [scene, zhenhuan.recall(scene)]", **QUIET,
        )  # fmt: skip
        self.page.load(
            self.arrive, [self.carrier], [*self.inputs, self.scene_line, *self.messages, textbox],
            js="() => zhenhuan.last()", **QUIET,
        )  # fmt: skip
        chatbot.change(
            None, [chatbot, self.scene, self.visitor], None,
            js="(messages, scene, visitor) => { zhenhuan.keep(messages, scene, visitor); return [] }",
        )  # fmt: skip
        chatbot.clear(
            self.start_over, [self.scene], self.changed, js="(scene) => { zhenhuan.drop(scene); return scene }", **QUIET
        )
        gradio_internals.share_queue(self.page, self.service.max_visitors)  # page.waiting_queue has them take turns
        # Gradio empties the placeholder, and locks the box when an event fails outside of us, as a full queue does.
        for event in gradio_internals.streaming_events(self.page):
            ended = gradio_internals.following(event)
            for outcome, hint in ((ended.success, text("invitation")), (ended.failure, persona.CROWDED)):
                outcome(
                    partial(self.finish, hint), [chatbot, self.alternatives],
                    [textbox, self.chat.chatbot_state, self.alternatives, self.counter], **QUIET,
                )  # fmt: skip
        for asked in (chatbot.option_select, chatbot.edit):  # ChatInterface shows Stop for what is typed and for Retry
            asked(self.show_stop, None, [textbox], **QUIET)
        gradio_internals.offer_stop(self.page, textbox)

    @staticmethod
    def show_stop() -> gr.Textbox:
        """The text box during a reply: Stop in place of Send."""
        return gr.Textbox(submit_btn=False, stop_btn=text("stop"))

    def finish(self, hint: str, history: list[ChatbotMessage], alternatives: Alternatives) -> tuple[Any, ...]:
        """After a reply, however it ended: the box is open, the reply is remembered."""
        alternatives = alternatives.remember(history)
        if conversation.reply_text(conversation.split_reply(history)[1]):
            hint = text("invitation")  # stopped: there is some text
        box = gr.Textbox(interactive=True, placeholder=hint, submit_btn=text("send"), stop_btn=False)
        return box, history, alternatives, str(alternatives)

    def leaf(self, step: int, history: list[ChatbotMessage], alternatives: Alternatives) -> tuple[Any, ...]:
        """Show the next or the previous of her replies."""
        history, alternatives = alternatives.leaf(history, step)
        return history, history, alternatives, str(alternatives)

    def revise(self, history: list[ChatbotMessage], revised: str, alternatives: Alternatives) -> tuple[Any, ...]:
        """Put the visitor's wording in place of her last reply; the reply as she gave it stays among the others."""
        before, tail = conversation.split_reply(history)
        if tail and revised.strip():
            history = [*before, {"role": "assistant", "content": revised.strip()[: conversation.MAX_MESSAGE]}]
            alternatives = alternatives.remember(history)
        return history, history, alternatives, str(alternatives), gr.update(visible=False)

    def start_over(self, scene: str) -> dict[Any, Any]:
        """A new conversation in the scene."""
        new = Alternatives()
        messages = {part: [conversation.greeting(scene)] for part in self.messages}
        return messages | {self.alternatives: new, self.counter: str(new)}

    def _at(self, scene: str, visitor: str) -> dict[Any, Any]:
        choices = gr.update(choices=visitor_choices(scene), value=visitor)
        return {self.visitor: choices, self.scene_line: text(SCENE_LINE + scene)}

    def _show(self, found: Transcript) -> dict[Any, Any]:
        place = {self.scene: found.scene} | self._at(found.scene, found.visitor)
        return place | dict.fromkeys(self.messages, found.messages)

    def enter(self, scene: str, saved: str) -> dict[Any, Any]:
        """A scene, with the conversation that the browser kept for it, or her greeting."""
        found = recall(saved)
        kept = dict.fromkeys(self.messages, found.messages) if found else {}
        return self._at(scene, found.visitor if found else PASSER_BY) | self.start_over(scene) | kept

    def bring_back(self, file: str) -> dict[Any, Any]:
        """The conversation in an exported file; or what is wrong with it, in the status line."""
        try:
            found = conversation.read_transcript(file) if file else None
        except ValueError as error:
            return {self.status: str(error)}
        return self._show(found) if found else {self.status: gr.skip()}

    def arrive(self, saved: str, request: gr.Request) -> dict[Any, Any]:
        """What a visitor finds: the conversation he left, or the question that the link he followed brings."""
        query, found = dict(request.query_params), recall(saved)
        changed = self._follow_link(query) if "q" in query else self._show(found) if found else {}
        return changed or {self.scene: SCENES[0].name} | self._at(SCENES[0].name, PASSER_BY)

    def _follow_link(self, query: dict[str, str]) -> dict[Any, Any]:
        """The values of a link, as far as the page could have made them; a forged one is left out."""
        scene, visitor = query.get("scene", SCENES[0].name), query.get("visitor", PASSER_BY)
        adapter = query.get("adapter", self.engine.adapters[0])
        try:
            persona.with_scene([], scene, visitor)
            numbers = {name: float(query[name]) for name in NUMBERS if name in query}
            ChatRequest(adapter=adapter, numbers=numbers).sampling()
            check_adapters([adapter], self.engine.adapters)
        except ValueError:
            return {}
        controls = dict(zip(("adapter", *NUMBERS), self.inputs[2:], strict=True))
        changed = {controls[name]: value for name, value in {"adapter": adapter, **numbers}.items()}
        greeted = self._show(Transcript(scene, visitor, [conversation.greeting(scene)]))
        return greeted | changed | {self.chat.textbox: query["q"][:MAX_CHARACTERS]}
