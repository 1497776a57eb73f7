"""Everything that leans on private or undocumented parts of Gradio 6. Import it before gradio: that halves the time."""

import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Gradio writes type stubs for editors into its own package at every import, which takes 2 of its 4 s; it leaves out
# a class whose file it cannot find.
with mock.patch("inspect.getfile", side_effect=OSError):
    import gradio as gr
import gradio.queueing
import gradio.route_utils
import gradio.routes
import gradio.utils
import orjson
from gradio.blocks import Block, BlocksConfig
from gradio.events import EventListenerMethod
from jinja2 import ChoiceLoader, DictLoader

log = logging.getLogger(__name__)
MANIFEST = '<link rel="manifest" href="/manifest.json" />'  # as Gradio's document has it
FRAMES = 5  # of a traceback in the log
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


def log_failure() -> None:
    """Log the exception being handled: its type and where, but not its text, which may quote what a visitor sent."""
    error = sys.exc_info()[1]
    if error:
        log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__, -FRAMES)))


for _module in (gradio.queueing, gradio.route_utils, gradio.routes):
    setattr(_module, "traceback", SimpleNamespace(print_exc=log_failure))  # noqa: B010 - mypy knows no such name


def explain_bad_inputs(page: gr.Blocks) -> None:
    """Tell a caller of the API what is wrong with his values: Gradio sends an empty error, and logs the values.

    Lone surrogates and deep nesting it passes on, and breaks off the tab's stream of events when they come back:
    orjson, which writes that, refuses both.
    """
    preprocess_data = page.preprocess_data

    async def explained(event: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        try:
            orjson.dumps(inputs)
            values = await preprocess_data(event, inputs, *rest, **named)
            pairs = list(zip(event.inputs, values, strict=True))
            if any(isinstance(block, gr.Dropdown) and not isinstance(value, str) for block, value in pairs):
                raise ValueError  # Gradio lets none and lists of choices pass
        except Exception as error:  # noqa: BLE001 - whatever Gradio's components raise at a stranger's values
            raise gr.Error(_bad_inputs(page, event, inputs, error), print_exception=False) from None
        return ["" if value is None and isinstance(block, gr.Textbox) else value for block, value in pairs]

    setattr(page, "preprocess_data", explained)  # noqa: B010 - mypy takes no such function


def _bad_inputs(page: gr.Blocks, event: Any, inputs: list[Any], error: Exception) -> str:
    if isinstance(error, gr.Error):
        return str(error.message)
    endpoint = page.get_api_info(all_endpoints=True)["named_endpoints"].get(f"/{event.api_name}")
    if not endpoint:
        return "This is not what the page sends."
    wrong = f"Only {len(inputs)} values came" if len(inputs) < len(event.inputs) else "A value is of the wrong type"
    names = ", ".join(each["parameter_name"] for each in endpoint["parameters"])
    by_name = f"/gradio_api/call/v2/{event.api_name}"
    return f"{wrong}. Needed, in order: {names}. {by_name} takes them by name, and fills in what you leave out."


def put_in_document(head: str, markup: str) -> None:
    """Let the document hold markup before Gradio's own; `launch(head=...)` adds its own only when scripts have run.

    `head` stands in place of Gradio's link to its manifest, which names addresses from the host's root: below a path
    they are another program's.

    A shared page gets the same document: Gradio's for those asks S3 for scripts, which POLICY of page.http refuses.
    """
    environment = gradio.routes.templates.env
    loader: Any = environment.loader
    document, *_ = loader.get_source(environment, "frontend/index.html")
    for place, ours in ((MANIFEST, head), ("<gradio-app", f"{markup}<gradio-app")):
        document = document.replace(place, f"{{% raw %}}{ours}{{% endraw %}}", 1)
    documents = dict.fromkeys(("frontend/index.html", "frontend/share.html"), document)
    environment.loader = ChoiceLoader([DictLoader(documents), loader])


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


def offer_stop(page: gr.Blocks, textbox: Any, event: Any) -> None:
    """Let the text box's Stop end the event.

    The event has no function: the one that Gradio gives cancels the session's name alone, and when that happens twice,
    the next question may be cancelled too.
    """
    page.default_config.set_event_trigger(
        targets=[EventListenerMethod(textbox, "stop")], fn=None, inputs=None, outputs=None, queue=False,
        show_progress="hidden", api_visibility="private", cancels=[event["id"]],
    )  # fmt: skip


def keep_only_chat_api(page: gr.Blocks) -> None:
    """Take away all events but `/chat`: ChatInterface's keep one conversation on the server, and lock the text box.

    Called as soon as ChatInterface is there, before other events are.
    """
    for number, event in list(page.default_config.fns.items()):
        if event.api_name != "chat":
            del page.default_config.fns[number]


def _chat_event(page: gr.Blocks) -> Any:
    (event,) = [event for event in page.fns.values() if event.api_name == "chat"]
    return event


def hide_chat_from_tools(page: gr.Blocks) -> None:
    """Leave `/ask` as the one tool: Gradio's MCP server cannot call an event that holds a state, as `/chat` does."""
    _chat_event(page).api_visibility = "undocumented"
