"""Around the conversation: scenes, alternatives, edits, files, and a text box that never locks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import gradio as gr
from gradio.events import EventListenerMethod

from chat import persona
from chat.engine import BASE_ONLY, MAX_CHARACTERS, ChatEngine
from chat.persona import PASSER_BY, Message
from page import reply, transcript
from page.reply import Chosen, Replies
from page.transcript import FORMATS, Alternatives, Shown
from page.words import SETTING, VISITORS, word

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
SUGGESTED = 60  # tokens of a line suggested to the visitor
SUFFIX = {"Markdown": "md", "JSON": "json", "ShareGPT": "sharegpt.json"}


def who(request: gr.Request | None) -> str:
    """The visitor, for the allowance: his Hugging Face name where he logged in, else his tab."""
    return str(request.username or request.session_hash) if request else "nobody"


def chosen(*values: Any) -> Chosen:
    """The values of scene, visitor and the controls, in the order they stand on the page."""
    scene, visitor, adapter, temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed = values
    return Chosen(
        scene=scene, visitor=visitor, adapter=adapter, temperature=temperature, top_p=top_p, top_k=top_k,
        repetition_penalty=repetition_penalty, max_new_tokens=max_new_tokens, seed=-1 if seed is None else seed,
    )  # fmt: skip


def setting(scene: str) -> str:
    """Who she is in a scene, in a line."""
    return word(SETTING + scene)


def callers(scene: str | None = None) -> list[tuple[str, str]]:
    """Those who may come to her in a scene, or at all: as the visitor reads them, and by name."""
    names = persona.scene_named(scene).visitors if scene else VISITORS
    return [(word(name), name) for name in names]


def visitors(scene: str, visitor: str = PASSER_BY) -> Any:
    """The choice of those who may come to her in a scene."""
    return gr.update(choices=callers(scene), value=visitor)


@dataclass(frozen=True)
class Talk:
    """The parts of the page that a conversation touches. `inputs` are scene, visitor and the controls, in order."""

    page: gr.Blocks
    chat: gr.ChatInterface
    replies: Replies
    inputs: list[Any]
    setting: gr.Markdown
    status: gr.Markdown
    kept: gr.State = field(default_factory=lambda: gr.State(Alternatives()))
    counter: gr.Markdown = field(
        default_factory=lambda: gr.Markdown(str(Alternatives()), elem_id="counter", render=False)
    )
    carrier: gr.Textbox = field(default_factory=lambda: gr.Textbox(visible=False))  # from and to the browser's own code

    @property
    def shown(self) -> list[Any]:
        """What must change together when the conversation is changed from outside ChatInterface."""
        return [self.chat.chatbot, self.chat.chatbot_state]

    def add_tools(self) -> None:
        """The row below the text box: leaf through replies, go on, suggest, edit; and the drawer of files."""
        with gr.Row(elem_id="tools"):
            for key, step in (("earlier", -1), ("later", 1)):
                button = gr.Button(word(key), size="sm")
                button.click(
                    partial(self.leaf, step), [self.chat.chatbot, self.kept], [*self.shown, self.kept, self.counter],
                    **QUIET,
                )  # fmt: skip
                self.counter.render() if step < 0 else None
            for key, speak, grows in (
                ("go_on", self.go_on, self.chat.chatbot),
                ("suggest", self.suggest, self.chat.textbox),
            ):
                button = gr.Button(word(key), size="sm", elem_id=key)
                button.click(self.speaking, None, [self.chat.textbox], **QUIET)
                button.click(speak, [self.chat.chatbot, *self.inputs], [grows, self.status], api_visibility="private")
            revise = gr.Button(word("revise"), size="sm", elem_id="revise")
        self._add_revision(revise)
        self._add_drawer()

    def _add_revision(self, revise: gr.Button) -> None:
        with gr.Group(visible=False) as group:
            text = gr.Textbox(label=word("revised"), lines=3, elem_id="revised")
            with gr.Row():
                save, cancel = gr.Button(word("save"), variant="primary"), gr.Button(word("cancel"))
        revise.click(
            lambda history: (gr.update(visible=True), transcript.words(transcript.cut(history)[1])),
            [self.chat.chatbot], [group, text], **QUIET,
        )  # fmt: skip
        save.click(
            self.revise, [self.chat.chatbot, text, self.kept], [*self.shown, self.kept, self.counter, group], **QUIET
        )
        cancel.click(lambda: gr.update(visible=False), None, [group], **QUIET)

    def _add_drawer(self) -> None:
        scene, visitor = self.inputs[:2]
        with gr.Accordion(word("keep"), open=False, elem_id="drawer"):
            gr.Markdown(word("private"), elem_id="private")
            with gr.Row():
                for form in FORMATS:
                    gr.Button(word(f"export_{form.lower()}"), size="sm").click(
                        partial(self.export, form), [self.chat.chatbot, scene, visitor], [self.carrier], **QUIET
                    ).then(
                        None, [self.carrier, scene], None,
                        js=f"(text, scene) => {{ zhenhuan.save(text, `甄嬛-${{scene}}.{SUFFIX[form]}`); return [] }}",
                    )  # fmt: skip
                gr.Button(word("import"), size="sm", elem_id="import").click(
                    None, None, [self.carrier], js="() => zhenhuan.open()"
                ).then(self.bring_back, [self.carrier], [*self.inputs[:2], self.setting, *self.shown, self.status],
                       **QUIET)  # fmt: skip
                gr.Button(word("forget"), size="sm", variant="stop", elem_id="forget").click(
                    self.begin_anew, [scene], [*self.shown, self.kept, self.counter], **QUIET,
                    js="(scene) => { zhenhuan.forget(); return scene }",
                )  # fmt: skip

    def connect(self) -> None:
        """Scenes, storage, and what holds for every way to make her speak; called once all are on the page."""
        scene, visitor = self.inputs[:2]
        scene.input(
            self.enter, [scene, self.carrier], [visitor, self.setting, *self.shown, self.kept, self.counter],
            js="(scene, _) => [scene, zhenhuan.recall(scene)]", **QUIET,
        )  # fmt: skip
        self.page.load(
            self.arrive, [self.carrier], [*self.inputs, self.setting, *self.shown, self.chat.textbox],
            js="() => zhenhuan.last()", **QUIET,
        )  # fmt: skip
        self.chat.chatbot.change(
            None, [self.chat.chatbot, scene, visitor], None,
            js="(messages, scene, visitor) => { zhenhuan.keep(messages, scene, visitor); return [] }",
        )  # fmt: skip
        self.chat.chatbot.clear(
            self.begin_anew, [scene], [*self.shown, self.kept, self.counter],
            js="(scene) => { zhenhuan.drop(scene); return scene }", **QUIET,
        )  # fmt: skip
        streaming = [event for event in self.page.fns.values() if event.types_generator]
        self._share_one_line(streaming)
        self._finish(streaming)
        self._offer_stop(streaming)

    def _share_one_line(self, streaming: list[Any]) -> None:
        """Everyone may enter: page.line lets them speak in turn, and tells each his place."""
        for event in streaming:
            event.concurrency_id, event.concurrency_limit = "reply", self.replies.visitors

    def _finish(self, streaming: list[Any]) -> None:
        """Gradio empties the placeholder, and locks the box when an event fails outside us, as a full queue does."""
        for event in streaming:
            for outcome, hint in (("success", word("invitation")), ("failure", persona.CROWDED)):
                self.page.default_config.set_event_trigger(
                    targets=[EventListenerMethod(None, outcome)], fn=partial(self.finish, hint),
                    inputs=[self.chat.chatbot, self.kept], outputs=self._finished, queue=False,
                    api_visibility="private", show_progress="hidden", trigger_after=event._id,
                    trigger_only_on_success=outcome == "success", trigger_only_on_failure=outcome == "failure",
                )  # fmt: skip

    @property
    def _finished(self) -> list[Any]:
        return [self.chat.textbox, self.chat.chatbot_state, self.kept, self.counter]

    def _offer_stop(self, streaming: list[Any]) -> None:
        """Gradio offers Stop to a question sent and to Retry; here also to every other way to make her speak."""
        for begin in (self.chat.chatbot.option_select, self.chat.chatbot.edit):
            begin(self.speaking, None, [self.chat.textbox], **QUIET)
        stops = [event for event in self.page.fns.values() if (self.chat.textbox._id, "stop") in event.targets]
        stopped = {number for event in stops for number in event.cancels}
        # Without a function: Gradio gives one that cancels the session's name alone. Cancelled twice, the next question
        # may be cancelled too. `failure` of what was cancelled opens the box.
        self.page.default_config.set_event_trigger(
            targets=[EventListenerMethod(self.chat.textbox, "stop")], fn=None, inputs=None, outputs=None, queue=False,
            show_progress="hidden", api_visibility="private",
            cancels=[event._id for event in streaming if event._id not in stopped],
        )  # fmt: skip

    @staticmethod
    def speaking() -> gr.Textbox:
        """The text box while she speaks: Stop in place of Send."""
        return gr.Textbox(submit_btn=False, stop_btn=word("stop"))

    def finish(self, hint: str, history: list[Shown], kept: Alternatives) -> tuple[Any, ...]:
        """After a reply, however it ended: the box is open, the reply is remembered."""
        kept = kept.remember(history)
        if transcript.words(transcript.cut(history)[1]):
            hint = word("invitation")  # stopped: she had begun
        box = gr.Textbox(interactive=True, placeholder=hint, submit_btn=word("send"), stop_btn=False)
        return box, history, kept, str(kept)

    def go_on(self, request: gr.Request, history: list[Shown], *values: Any) -> Iterator[tuple[list[Shown], str]]:
        """Continue her last reply in its bubble."""
        before, tail = transcript.cut(history)
        said, picked = transcript.words(tail), chosen(*values)
        turns: list[Message] = [*reply.read_history(before), {"role": "assistant", "content": said}]
        if len(turns) < 2 or not said:
            yield history, reply.about(self.replies.engine)
            return
        for spoken in self.replies.reply(lambda: turns, picked, who(request), said, go_on=True):
            yield (
                [*before, *bubbles(self.replies.engine, picked, spoken)],
                reply.status(self.replies.engine, picked, spoken),
            )

    def suggest(self, request: gr.Request, history: list[Shown], *values: Any) -> Iterator[tuple[Any, str]]:
        """Write a line for the visitor into the text box. The base does it: the adapter learned only her turns."""
        picked = replace(chosen(*values), adapter=BASE_ONLY, max_new_tokens=SUGGESTED)
        turns: list[Message] = [*reply.read_history(history), {"role": "user", "content": ""}]
        for spoken in self.replies.reply(lambda: turns, picked, who(request), go_on=True):
            line = next(iter(spoken.words.strip().splitlines()), "")
            waits = spoken.hint and not spoken.cost  # these are her words then, not the visitor's
            told = spoken.hint or reply.status(self.replies.engine, picked, spoken)
            yield gr.update(value="" if waits else line), told

    def leaf(self, step: int, history: list[Shown], kept: Alternatives) -> tuple[Any, ...]:
        """Show the next or the previous of her replies."""
        history, kept = kept.leaf(history, step)
        return history, history, kept, str(kept)

    def revise(self, history: list[Shown], text: str, kept: Alternatives) -> tuple[Any, ...]:
        """Put the visitor's wording in place of her last reply; the reply as she gave it stays among the others."""
        before, tail = transcript.cut(history)
        if tail and text.strip():
            history = [*before, {"role": "assistant", "content": text.strip()[: reply.LONGEST]}]
            kept = kept.remember(history)
        return history, history, kept, str(kept), gr.update(visible=False)

    def export(self, form: str, history: list[Shown], scene: str, visitor: str) -> str:
        """The conversation as text in that format."""
        return transcript.export(history, scene, visitor, form)

    def bring_back(self, text: str) -> tuple[Any, ...]:
        """The conversation in an exported file; or what is wrong with it, in the status line."""
        if not text:
            return (gr.skip(),) * 6
        try:
            found = transcript.read(text)
        except ValueError as error:
            return *((gr.skip(),) * 5), str(error)
        at = visitors(found.scene, found.visitor)
        return found.scene, at, setting(found.scene), found.messages, found.messages, gr.skip()

    def enter(self, scene: str, saved: str) -> tuple[Any, ...]:
        """A scene, with the conversation that the browser kept for it, or her greeting."""
        found = recalled(saved) or transcript.Transcript(scene, PASSER_BY, [transcript.greeting(scene)])
        return visitors(scene, found.visitor), setting(scene), found.messages, found.messages, *anew()

    def begin_anew(self, scene: str) -> tuple[Any, ...]:
        """A new conversation in the scene."""
        messages = [transcript.greeting(scene)]
        return messages, messages, *anew()

    def arrive(self, saved: str, request: gr.Request) -> dict[Any, Any]:
        """What a visitor finds: the conversation he left, or the question that the link he followed brings."""
        query = dict(request.query_params)
        found = None if "q" in query else recalled(saved)
        changed = self._asked_by_link(query) if "q" in query else {}
        if found:
            changed = self._moved(found.scene, found.visitor) | dict.fromkeys(self.shown, found.messages)
        return changed or self._moved(persona.SCENES[0].name, PASSER_BY)

    def _moved(self, scene: str, visitor: str) -> dict[Any, Any]:
        return {self.inputs[0]: scene, self.inputs[1]: visitors(scene, visitor), self.setting: setting(scene)}

    def _asked_by_link(self, query: dict[str, str]) -> dict[Any, Any]:
        """The values of a link, as far as the page could have made them; a forged one is left out."""
        try:
            scene = persona.scene_named(query.get("scene", persona.SCENES[0].name)).name
            persona.staged([], scene, visitor := query.get("visitor", PASSER_BY))
            numbers = {name: float(query[name]) for name in NUMBERS if name in query}
            adapter = query.get("adapter", self.replies.engine.adapters[0])
            Chosen(adapter=adapter, **cast("dict[str, Any]", numbers)).sampling()
        except ValueError:
            return {}
        if adapter not in self.replies.engine.adapters:
            return {}
        controls = dict(zip(("adapter", *NUMBERS), self.inputs[2:], strict=True))
        changed = {controls[name]: value for name, value in {"adapter": adapter, **numbers}.items()}
        greeted = {part: [transcript.greeting(scene)] for part in self.shown}
        return self._moved(scene, visitor) | changed | greeted | {self.chat.textbox: query["q"][:MAX_CHARACTERS]}


def recalled(saved: str) -> transcript.Transcript | None:
    """What the browser kept, if it can still be read."""
    try:
        return transcript.read(saved) if saved else None
    except ValueError:
        return None


def anew() -> tuple[Alternatives, str]:
    """No replies to leaf through yet."""
    return Alternatives(), str(Alternatives())


def bubbles(engine: ChatEngine, picked: Chosen, spoken: reply.Spoken, asked: str | None = None) -> list[Shown]:
    """Her words as the page shows them; and once they are whole, folded below them, what said them."""
    said: list[Shown] = [{"role": "assistant", "content": spoken.text}]
    if spoken.cost:
        said.append(transcript.note(reply.provenance(engine, picked, spoken, asked)))
    return said
