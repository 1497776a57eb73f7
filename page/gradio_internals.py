"""Everything that leans on private or undocumented parts of Gradio 6. Import it before gradio: that halves the time."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any
from unittest import mock

# Gradio writes type stubs for editors into its own package at every import, which takes 2 of its 4 s; it leaves out
# a class whose file it cannot find.
with mock.patch("inspect.getfile", side_effect=OSError):
    import gradio as gr
import gradio.routes
import gradio.utils
import orjson
from gradio.blocks import Block, BlocksConfig
from gradio.events import Dependency, EventListenerMethod
from jinja2 import ChoiceLoader, DictLoader

MALFORMED = (
    "这一问的格式不对，请刷新页面。 These values cannot be read: reload the page, or call it as /gradio_api/info says."
)

_config_for_block = BlocksConfig.config_for_block


def _remembered_config(_id: int, rendered_ids: list[int], block: Block, renderable: Any = None) -> dict[str, Any]:
    """A component's configuration, computed once where a session asks for it, which names no `rendered_ids`.

    Gradio computes all of them for each new session, in 5 ms of the one event loop: a third of what a visitor costs.
    A session writes values into `props`, so each gets its own.
    """
    if renderable or rendered_ids:
        return _config_for_block(_id, rendered_ids, block, renderable)
    if "_session_config" not in vars(block):
        vars(block)["_session_config"] = _config_for_block(_id, rendered_ids, block)
    config: dict[str, Any] = vars(block)["_session_config"]
    return {**config, "props": {**config["props"]}}


BlocksConfig.config_for_block = staticmethod(_remembered_config)  # type: ignore[method-assign]
# Around each event Gradio sets matplotlib's backend, where that is installed: the first visitor waits 0.3 s for its
# import. Nothing here draws.
gradio.utils.MatplotlibBackendMananger = nullcontext  # type: ignore[assignment,misc]


def put_in_document(markup: str) -> None:
    """Let the document hold markup before Gradio's own; `launch(head=...)` adds its own only when scripts have run.

    A shared page gets the same document: Gradio's for those asks S3 for scripts, which POLICY of page.http refuses.
    """
    environment = gradio.routes.templates.env
    loader: Any = environment.loader
    document, *_ = loader.get_source(environment, "frontend/index.html")
    document = document.replace("<gradio-app", f"{{% raw %}}{markup}{{% endraw %}}<gradio-app", 1)
    ours = dict.fromkeys(("frontend/index.html", "frontend/share.html"), document)
    environment.loader = ChoiceLoader([DictLoader(ours), loader])


def name_inputs(handler: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Give the handler's `*values` names and defaults: Gradio reads an API's parameters from the signature alone."""
    own = inspect.signature(handler).parameters.values()
    named = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value)
        for name, value in inputs.items()
    ]
    parameters = [each for each in own if each.kind is not each.VAR_POSITIONAL]
    setattr(handler, "__signature__", inspect.Signature([*parameters, *named]))  # noqa: B010 - mypy knows no such name


def streaming_events(page: gr.Blocks) -> list[Any]:
    """The events that stream a reply: ChatInterface does not hand out its own, so they are found by what they do."""
    return [event for event in page.fns.values() if event.types_generator]


def share_queue(page: gr.Blocks, limit: int) -> None:
    """Let so many visitors in, over all streaming events: a limit on an event alone counts its own visitors only."""
    for event in streaming_events(page):
        event.concurrency_id, event.concurrency_limit = "reply", limit


def following(event: Any) -> Dependency:
    """What Gradio returns for an event of one's own, so that `success` and `failure` can follow ChatInterface's too."""
    return Dependency(None, {}, event._id, event.fn)


def offer_stop(page: gr.Blocks, textbox: Any) -> None:
    """Let the text box's Stop end every streaming event; ChatInterface has it end a question sent and Retry alone.

    The event has no function: the one that Gradio gives cancels the session's name alone, and when that happens twice,
    the next question may be cancelled too. The `failure` of what was cancelled opens the box.
    """
    stops = [event for event in page.fns.values() if (textbox._id, "stop") in event.targets]
    stopped = {number for event in stops for number in event.cancels}
    page.default_config.set_event_trigger(
        targets=[EventListenerMethod(textbox, "stop")], fn=None, inputs=None, outputs=None, queue=False,
        show_progress="hidden", api_visibility="private",
        cancels=[event._id for event in streaming_events(page) if event._id not in stopped],
    )  # fmt: skip


def _chat_event(page: gr.Blocks) -> Any:
    (event,) = [event for event in page.fns.values() if event.api_name == "chat"]
    return event


def answer_in_plain_strings(page: gr.Blocks) -> None:
    """Let `/chat` return her words without the page's notes: ChatInterface takes one function for page and API."""
    event = _chat_event(page)
    stream: Any = event.fn

    @wraps(stream)  # Gradio reads from its signature what to hand over
    async def plain(*inputs: Any) -> Any:
        async for messages, *rest in stream(*inputs):
            yield messages[0]["content"], *rest

    event.fn = plain


def refuse_malformed_calls(page: gr.Blocks) -> None:
    """Answer a call with values that the page cannot have sent by one sentence.

    Gradio would print them, a stranger's words, into the log with a traceback. Lone surrogates and deep nesting it
    passes on, and breaks off the tab's stream of events when they come back: orjson, which writes that, refuses both.
    """
    preprocess = page.preprocess_data

    async def checked(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        try:
            orjson.dumps(inputs)
            values = await preprocess(block_fn, inputs, *args, **kwargs)
            if any(
                isinstance(block, gr.Dropdown) and not isinstance(value, str)
                for block, value in zip(block_fn.inputs, values, strict=True)
            ):
                raise ValueError  # Gradio lets none and lists of choices pass
        except Exception:  # noqa: BLE001 - each component has errors of its own for what it cannot take
            raise gr.Error(MALFORMED, print_exception=False) from None
        blocks = zip(block_fn.inputs, values, strict=True)
        return ["" if value is None and isinstance(block, gr.Textbox) else value for block, value in blocks]

    setattr(page, "preprocess_data", checked)  # noqa: B010 - mypy takes it for a method


def hide_chat_from_tools(page: gr.Blocks) -> None:
    """Leave `/ask` as the one tool: Gradio's MCP server cannot call an event that holds a state, as `/chat` does."""
    _chat_event(page).api_visibility = "undocumented"
