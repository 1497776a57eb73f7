"""One server that speaks the OpenAI protocol: what it serves, whether it makes our prompt, a reply as it comes."""

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from typing import Any

import anyio
import httpx
from httpx_sse import EventSource, SSEError

from chat.adapter import check_name
from chat.engine import BASE_ONLY, Busy, Sampling
from chat.fetch import Unavailable
from chat.persona import GREETING, OPENERS, Message
from chat.prompt import messages

log = logging.getLogger(__name__)

CONTEXT = 4096  # tokens of prompt and reply together, where the server does not say
ENDS = "<|im_end|><|endoftext|>"  # the template's terminator and the tutorial's
DONE = "[DONE]"
FAREWELL = 2.0  # seconds that the count of tokens may come after the last one
LONGEST_PAUSE = 30.0  # seconds that a server's Retry-After is obeyed for
PROBE: list[Message] = [
    {"role": "user", "content": OPENERS[0]},
    {"role": "assistant", "content": GREETING},
    {"role": "user", "content": OPENERS[1]},
]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds after which something is given up, or looked at again."""

    connect: float = 5
    first: float = 60  # to the first token, the server's own queue included
    between: float = 30  # from token to token
    whole: float = 120  # a reply, as the local engine's
    patience: float = 90  # with servers that are full or away, before the first token
    pause: float = 0.5  # before a second attempt; doubled for each later one
    look: float = 5  # between two looks at what a server serves


class Server:
    """An address, and what is known of it. `up` is set by `look`, and unset by whoever finds it silent."""

    def __init__(self, url: str, client: httpx.AsyncClient, limits: Limits, base: str = "") -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise ValueError("ENGINE_URL holds no address like https://engine:8000/v1. A key belongs into ENGINE_KEY.")
        self.url, self.client, self.limits, self.named = url.rstrip("/"), client, limits, base
        self.name = parsed.netloc.decode()  # for the log
        self.up, self.refused = False, ""
        self.running = 0
        self.base, self.context = base, CONTEXT
        self.models: dict[str, str] = {}  # an adapter's name → what the server calls it
        self.ends: list[int] = []  # stop ids, where the server tells its tokens
        self.openai_only = False  # it refuses fields that OpenAI does not have: `transformers serve`

    async def look(self) -> None:
        """Ask what it serves, and on its coming up check its prompt; `refused` says why it is not used."""
        try:
            self._read(await self._cards())
            if not self.up:
                self.refused = await self._unlike() or self.refused
            up = not self.refused
        except Exception as error:  # noqa: BLE001 - whatever a server sends, it must not end the watch
            up, self.refused = False, str(error) if isinstance(error, Unavailable) else ""
        if up != self.up:
            log.info("%s %s", self.name, "answers." if up else f"is left out. {self.refused}")
        self.up = up

    async def _cards(self) -> list[dict[str, Any]]:
        answer = await self.client.get(f"{self.url}/models", timeout=self.limits.connect)
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise Unavailable(f"{self.name} refuses the key. Set ENGINE_KEY to one that it takes.")
        if answer.is_redirect:
            raise Unavailable(f"{self.name} sends us elsewhere, which is not followed. Name that address itself.")
        if self.named and answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
            return list(answer.json().get("data", [])) if answer.is_success else []
        answer.raise_for_status()
        return list(answer.json()["data"])

    def _read(self, cards: Sequence[dict[str, Any]]) -> None:
        """Learn the base and the adapters, named `adapter` (vLLM, SGLang) or `base:adapter` (Ray Serve)."""
        base = next((card for card in cards if not card.get("parent")), {})
        self.base = self.named or base["id"]
        self.context = int(base.get("max_model_len") or CONTEXT)
        models, self.refused = {BASE_ONLY: self.base}, ""
        for card in cards:
            name = card["id"].removeprefix(f"{self.base}:")
            if not card.get("parent") and name == card["id"]:
                continue  # a base
            # SGLang lists plain names, yet takes any plain name for its base.
            sent = f"{self.base}:{name}" if card.get("owned_by") == "sglang" else card["id"]
            try:
                models[check_name(name)] = sent
            except ValueError as error:
                log.warning("%s: %s", self.name, error)
        self.models = models

    async def _unlike(self) -> str:
        """A sentence when its template does not make our prompt of our messages; it is asked once, on coming up.

        Compared are the token ids where it has /tokenize (vLLM, SGLang), else the lengths it counts.
        """
        heard, text = messages(PROBE), chatml(PROBE)
        self.ends = await self._tokens(prompt=ENDS, add_special_tokens=False) or []
        ours = await self._tokens(prompt=text, add_special_tokens=False)
        theirs: Any = await self._tokens(messages=heard)
        if not ours or not theirs:
            ours, theirs = (
                await self._length("completions", prompt=text),
                await self._length("chat/completions", messages=heard),
            )
        if not ours or not theirs:
            log.warning("%s does not tell its prompt; it cannot be compared with ours.", self.name)
            return ""
        if ours == theirs:
            return ""
        return (
            f"{self.name} makes another prompt of our messages than the adapters were trained under. "
            "Start it with the base's own chat template."
        )

    async def _tokens(self, **asked: Any) -> Any:
        found = await self._ask(f"{self.url.removesuffix('/v1')}/tokenize", asked)
        return found.get("tokens")

    async def _length(self, path: str, **asked: Any) -> Any:
        found = await self._ask(f"{self.url}/{path}", {**asked, "max_tokens": 1})
        return (found.get("usage") or {}).get("prompt_tokens")

    async def _ask(self, url: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = await self.client.post(url, json={"model": self.base, **asked}, timeout=self.limits.first)
        found = answer.json() if answer.is_success else {}
        return found if isinstance(found, dict) else {}

    def request(
        self, adapter: str, turns: Sequence[Message], sampling: Sampling, go_on: bool
    ) -> tuple[str, dict[str, Any]]:
        """The path and the body that ask for a reply; a turn is continued from its text, which every server can do."""
        asked: dict[str, Any] = {"prompt": chatml(turns, go_on)} if go_on else {"messages": messages(turns)}
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if self.openai_only:
            own = {"max_new_tokens": sampling.max_new_tokens, "repetition_penalty": float(sampling.repetition_penalty)}
            own |= {"do_sample": True, **drawn} if sampling.temperature else {"do_sample": False}
            asked |= {"generation_config": json.dumps(own)}
        else:
            asked |= {**drawn, "repetition_penalty": sampling.repetition_penalty, "stop_token_ids": self.ends}
            asked |= {"max_tokens": sampling.max_new_tokens, "stream_options": {"include_usage": True}}
        asked |= {"model": self.models[adapter], "stream": True}
        if sampling.seed is not None:
            asked["seed"] = sampling.seed
        return "completions" if go_on else "chat/completions", asked

    async def reply(self, path: str, body: dict[str, Any]) -> AsyncGenerator[tuple[str, str, int], None]:
        """A reply as it comes: text, why it ended (once it has), the tokens it took (where the server counts).

        Raises Busy, ValueError for what it refuses, and Unavailable for anything else that is no whole reply.
        """
        begun = ended = False
        try:
            with anyio.fail_after(self.limits.first):
                asked = self.client.build_request("POST", f"{self.url}/{path}", json=body)
                answer = await self.client.send(asked, stream=True)
            async with aclosing(answer), aclosing(EventSource(answer).aiter_sse()) as events:
                self._accept(answer, body)
                while True:
                    with anyio.fail_after(FAREWELL if ended else self.limits.between if begun else self.limits.first):
                        event = await anext(events, None)
                    if event is None or event.data == DONE:
                        break
                    piece = chunk(event.data)
                    begun, ended = begun or bool(piece[0]), ended or bool(piece[1])
                    yield piece
        except (httpx.HTTPError, TimeoutError, SSEError) as error:
            if not ended:  # else all was said, and only the farewell is missing
                raise Unavailable(f"{self.name} fell silent ({type(error).__name__}).") from error
        if not ended and not (event and begun):
            raise Unavailable(f"{self.name} broke off.")

    def _accept(self, answer: httpx.Response, body: dict[str, Any]) -> None:
        status = answer.status_code
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            raise Busy(f"{self.name} has too much to do.", pause(answer.headers.get("Retry-After", "")))
        if status == HTTPStatus.UNPROCESSABLE_ENTITY and "top_k" in body:
            self.openai_only = True
            raise Busy(f"{self.name} takes OpenAI's own fields only.")
        if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY):
            log.warning("%s refused a question with status %d.", self.name, status)
            raise ValueError("引擎不收这一句，请缩短些再问。 The engine refused it; ask in fewer words.")
        if not answer.is_success:
            raise Unavailable(f"{self.name} answers with status {status}.")


def chatml(turns: Sequence[Message], go_on: bool = False) -> str:
    """The prompt as text, for servers: what the template of every base here makes, as `look` has checked."""
    written = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages(turns))
    return written.removesuffix("<|im_end|>\n") if go_on else written + "<|im_start|>assistant\n"


def chunk(data: str) -> tuple[str, str, int]:
    """Text, reason of the end, and tokens of one event. Raises Unavailable for an error, or for what is no event."""
    try:
        found = json.loads(data)
        if "error" in found or found.get("object") == "error":
            raise Unavailable("The engine broke off with an error.")
        choice = (found.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        ended = choice.get("finish_reason") or ""
        tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Unavailable(f"The engine sent what is no reply ({type(error).__name__}).") from error
    if not isinstance(text, str) or ended in ("abort", "error"):
        raise Unavailable("The engine broke off.")
    return text, ended, tokens


def pause(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; none where it says nothing."""
    try:
        if retry_after.isdigit():
            return min(float(retry_after), LONGEST_PAUSE)
        return min(max(parsedate_to_datetime(retry_after).timestamp() - time(), 0), LONGEST_PAUSE)
    except (ValueError, TypeError, OverflowError):
        return 0
