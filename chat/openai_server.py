"""One server that speaks OpenAI's protocol: the models it lists, whether it makes our prompt, a reply as a stream."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
import httpx
from httpx_sse import EventSource, SSEError

from chat.adapter import check_name
from chat.download import Unavailable, parse_retry_after
from chat.engine import BASE_ONLY, Busy, Chunk, Chunks, FinishReason, Usage
from chat.persona import GREETING, OPENERS, Message, Refused
from chat.prompt import template_messages
from chat.sampling import Sampling

log = logging.getLogger(__name__)

MAX_MODEL_LEN = 4096  # tokens of prompt and reply together, where the server does not say
STOP = "<|im_end|><|endoftext|>"  # the template's terminator and the tutorial's
MAX_PORT = 65535
USAGE_SECONDS = 2.0  # that the count of tokens may come after the last token
PROBE: list[Message] = [
    {"role": "user", "content": OPENERS[0]}, {"role": "assistant", "content": GREETING},
    {"role": "user", "content": OPENERS[1]},
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds after which a server is given up, or asked again."""

    connect: float = 5
    first_token: float = 60  # the server's own queue included
    next_token: float = 30
    reply: float = 120  # as the local engines'
    retries: float = 90  # with servers that are full or away, before the first token
    backoff: float = 0.5  # before the first retry; doubled for each later one
    poll: float = 5  # between two lists of what a server serves


class NoModels(ValueError):
    """What a server sends as the list of its models is none."""


@dataclass
class Request:
    """One reply: what is asked for, the queue that its chunks go to, and how far it has come."""

    messages: Sequence[Message]
    adapter: str
    sampling: Sampling
    continue_final_message: bool = False
    row: int = 0
    chunks: Chunks = field(default_factory=Chunks)
    started: float = field(default_factory=time.monotonic)
    first_token: float = 0  # when its text came
    tokens: int = 0  # or chunks, until the server tells its count

    def usage(self, finish_reason: FinishReason) -> Usage:
        now = time.monotonic()
        return Usage(finish_reason, self.tokens, (self.first_token or now) - self.started, now - self.started)


class Server:
    """An address, and what is known of it. `poll` sets `up`; the engine unsets it when a reply fails."""

    def __init__(self, url: str, client: httpx.AsyncClient, timeouts: Timeouts, base: str = "") -> None:
        parsed = parse_url(url)
        self.url, self.client, self.timeouts = str(parsed).rstrip("/"), client, timeouts
        self.name = parsed.netloc.decode()  # for the log
        self.up, self.refused = False, ""
        self.fault = ""  # why it was away at the last poll
        self.running = 0  # replies
        self.named, self.base, self.max_model_len = base, base, MAX_MODEL_LEN
        self.models: dict[str, str] = {}  # an adapter's name → what the server calls it
        self.stop_token_ids: list[int] = []  # where the server tells its tokens
        self.openai_fields_only = False  # it refuses all other fields: `transformers serve`

    async def poll(self) -> None:
        """List its models, and compare its prompt with ours when it comes up; `refused` says why it is not used."""
        up, refused, fault = True, "", ""
        try:
            with anyio.fail_after(self.timeouts.connect):  # httpx's own time-out begins anew with each byte
                await self._list_models()
            if not self.up:
                with anyio.fail_after(4 * self.timeouts.first_token):
                    await self._compare_prompts()
        except Exception as error:  # noqa: BLE001 - whatever a server sends, it must not end the polling
            up, refused = False, str(error) if isinstance(error, Unavailable) else ""
            fault = refused or f"{self.name} {_fault(error)}."
        if fault != self.fault or up != self.up:
            log.info("%s", f"{self.name} answers." if up else f"{self.name} is left out: {fault}")
        self.up, self.refused, self.fault = up, refused, fault

    async def _list_models(self) -> None:
        """Learn the base and the adapters, named `adapter` (vLLM, SGLang) or `base:adapter` (Ray Serve)."""
        response = await self.client.get(f"{self.url}/models", timeout=self.timeouts.connect)
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise Unavailable(f"{self.name} refuses the key. Set ENGINE_KEY to one that it takes.")
        if response.is_redirect:
            raise Unavailable(f"{self.name} sends us elsewhere, which is not followed. Name that address itself.")
        if not self.named or response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            response.raise_for_status()
        listed = parse_models(response.content) if response.is_success else []
        base: dict[str, Any] = next((model for model in listed if not model.get("parent")), {})
        if not self.named and not base:
            raise Unavailable(f"{self.name} lists no base. Name it with ENGINE_BASE.")
        self.base = self.named or base["id"]
        self.max_model_len = base.get("max_model_len") or MAX_MODEL_LEN
        models = {BASE_ONLY: self.base}
        for model in listed:
            name = model["id"].removeprefix(f"{self.base}:")
            if not model.get("parent") and name == model["id"]:
                continue  # a base
            # SGLang lists plain names, yet takes any plain name for its base.
            sent = f"{self.base}:{name}" if model.get("owned_by") == "sglang" else model["id"]
            try:
                models[check_name(name)] = sent
            except ValueError as error:
                log.warning("%s: %s", self.name, error)
        self.models = models

    async def _compare_prompts(self) -> None:
        """Raise Unavailable when its template makes another prompt: other ids, or else another count of them."""
        messages, text = template_messages(PROBE), chatml(PROBE)
        tokenize = f"{self.url.removesuffix('/v1')}/tokenize"
        self.stop_token_ids = await self._tokens(tokenize, prompt=STOP, add_special_tokens=False) or []
        ours = await self._tokens(tokenize, prompt=text, add_special_tokens=False)
        theirs = await self._tokens(tokenize, messages=messages)
        if not ours or not theirs:
            ours = await self._tokens(f"{self.url}/completions", prompt=text, max_tokens=1)
            theirs = await self._tokens(f"{self.url}/chat/completions", messages=messages, max_tokens=1)
        if not ours or not theirs:
            log.warning("%s does not tell its prompt; it cannot be compared with ours.", self.name)
        elif ours != theirs:
            raise Unavailable(
                f"{self.name} makes another prompt of our messages than the adapters were trained under. "
                "Start it with the base's own chat template."
            )

    async def _tokens(self, url: str, **body: Any) -> Any:
        """The token ids of a prompt, or else their number, as far as the server tells them."""
        response = await self.client.post(url, json={"model": self.base, **body}, timeout=self.timeouts.first_token)
        if not response.is_success or not isinstance(found := response.json(), dict):
            return None
        return found.get("tokens") or (found.get("usage") or {}).get("prompt_tokens")

    def body(self, request: Request) -> tuple[str, dict[str, Any]]:
        """The path and the JSON body of a request. A message is continued as text, which every server can do."""
        body: dict[str, Any] = {"model": self.models[request.adapter], "stream": True}
        if request.continue_final_message:
            path, body["prompt"] = "completions", chatml(request.messages, continue_final_message=True)
        else:
            path, body["messages"] = "chat/completions", template_messages(request.messages)
        parameters = asdict(request.sampling)
        if (seed := parameters.pop("seed")) is not None:
            body["seed"] = seed
        if self.openai_fields_only:
            if not request.sampling.temperature:
                parameters = {name: parameters[name] for name in ("max_new_tokens", "repetition_penalty")}
            parameters["repetition_penalty"] = float(parameters["repetition_penalty"])  # transformers takes no int
            parameters["do_sample"] = bool(request.sampling.temperature)
            body["generation_config"] = json.dumps(parameters)
        else:
            body |= {"max_tokens": parameters.pop("max_new_tokens"), **parameters}
            body |= {"stop_token_ids": self.stop_token_ids, "stream_options": {"include_usage": True}}
        return path, body

    async def generate(self, request: Request) -> Usage:
        """Put a reply into the request's queue as it comes, and return what it took.

        Raises Busy, Refused for a question that the server does not take, Unavailable for all else that is no reply.
        """
        (path, body), finish_reason = self.body(request), ""
        self.running += 1
        try:
            with anyio.move_on_after(self.timeouts.reply) as limit:
                with anyio.fail_after(self.timeouts.first_token):
                    post = self.client.build_request("POST", f"{self.url}/{path}", json=body)
                    response = await self.client.send(post, stream=True)
                async with aclosing(response), aclosing(EventSource(response).aiter_sse()) as events:
                    self._check_status(response, body)
                    while True:
                        seconds = self.timeouts.next_token if request.first_token else self.timeouts.first_token
                        with anyio.fail_after(USAGE_SECONDS if finish_reason else seconds):
                            event = await anext(events, None)
                        if event is None or event.data == "[DONE]":
                            break
                        text, reason, tokens = parse_event(event.data)
                        finish_reason = reason or finish_reason
                        if text:
                            request.first_token = request.first_token or time.monotonic()
                            request.chunks.put(Chunk(text, request.row))
                        request.tokens = tokens or request.tokens + bool(text)
        except (httpx.HTTPError, TimeoutError, SSEError) as error:
            if not finish_reason:  # else the whole text has come, and only the usage or [DONE] is missing
                raise Unavailable(f"{self.name} fell silent ({type(error).__name__}).") from error
        finally:
            self.running -= 1
        if limit.cancelled_caught:
            return request.usage("time")
        if not finish_reason and not (event and request.first_token):
            raise Unavailable(f"{self.name} broke off.")
        return request.usage("length" if finish_reason == "length" else "stop")

    def _check_status(self, response: httpx.Response, body: dict[str, Any]) -> None:
        status = response.status_code
        if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
            seconds = parse_retry_after(response.headers.get("Retry-After", ""))
            raise Busy(f"{self.name} has too much to do.", seconds)
        if status == httpx.codes.UNPROCESSABLE_ENTITY and "top_k" in body:
            self.openai_fields_only = True
            raise Busy(f"{self.name} takes OpenAI's own fields only.")
        if status in (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.UNPROCESSABLE_ENTITY):
            log.warning("%s refused a question with status %d.", self.name, status)
            raise Refused("引擎不收这一句，请缩短些再问。 The engine refused it; ask in fewer words.")
        if not response.is_success:
            raise Unavailable(f"{self.name} answers with status {status}.")


def chatml(messages: Sequence[Message], continue_final_message: bool = False) -> str:
    """The prompt as text: what the template of every base here makes; `Server.poll` checks that a server's does too."""
    text = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in template_messages(messages))
    return text.removesuffix("<|im_end|>\n") if continue_final_message else f"{text}<|im_start|>assistant\n"


def _fault(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"gives status {error.response.status_code} for {error.request.url.path}"
    return str(error) if isinstance(error, NoModels) else f"does not answer ({type(error).__name__})"


def parse_url(url: str) -> httpx.URL:
    """An address of ENGINE_URL; where it has no path, /v1 is added, as every such server has it. Raises ValueError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    named = parsed.scheme in ("http", "https") and parsed.host and "%" not in parsed.host
    if not named or parsed.userinfo or (parsed.port or 1) > MAX_PORT:
        raise ValueError("ENGINE_URL holds no address like https://engine:8000/v1. A key belongs into ENGINE_KEY.")
    return parsed.copy_with(path="/v1") if parsed.path in ("", "/") else parsed


def parse_models(answer: bytes) -> list[dict[str, Any]]:
    """The models of a server's list, each with an id and perhaps a length. Raises NoModels."""
    try:
        listed = json.loads(answer)["data"]
        for model in listed:
            if not model["id"].encode() or not isinstance(model.get("max_model_len") or 0, int):
                raise ValueError
        return list(listed)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise NoModels("lists what are no models") from error


def parse_event(data: str) -> tuple[str, str, int]:
    """Text, finish reason and count of tokens of one event. Raises Unavailable for an error, or what is no event."""
    try:
        found = json.loads(data)
        if "error" in found or found.get("object") == "error":
            raise Unavailable("The engine broke off with an error.")
        choice = (found.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        finish_reason = choice.get("finish_reason") or ""
        tokens = max(0, int((found.get("usage") or {}).get("completion_tokens") or 0))
        text.encode()  # half a surrogate pair would break the page's own stream
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise Unavailable(f"The engine sent what is no reply ({type(error).__name__}).") from error
    if finish_reason in ("abort", "error"):
        raise Unavailable("The engine broke off.")
    return text, finish_reason, tokens
