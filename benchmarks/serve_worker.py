"""One engine in a process of its own, asked by benchmarks.serve: a JSON line in, a JSON line out.

It is run by its path, so that it serves the `chat` of any checkout that PYTHONPATH names, the older ones too. Nothing
of ours is imported before an engine is opened: bare llama.cpp is to see none of our settings.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypedDict


class Asked(TypedDict):
    """A conversation, as messages and as the token ids of its prompt."""

    messages: list[Any]
    ids: list[int]


class Reply(TypedDict):
    """Tokens of a reply, and the seconds from the question to its first token and to its end."""

    tokens: int
    first: float
    end: float


class Opened(Protocol):
    """An engine that can be timed."""

    def ask(self, asked: Sequence[Asked], adapter: str, sampling: dict[str, Any]) -> list[Reply]:
        """Answer conversations that come at the same moment."""


class Chat:
    """An engine of `chat`, this checkout's or another's, asked as the page asks it: a thread for each visitor."""

    def __init__(self, base: str, engine: str | None) -> None:
        import chat

        loading: Any = chat.load_here(base, engine=engine) if engine else chat.load(base)
        self.engine = loading.wait() or loading  # an older build's `wait` returned the engine

    def ask(self, asked: Sequence[Asked], adapter: str, sampling: dict[str, Any]) -> list[Reply]:
        """Answer conversations that come at the same moment."""
        engine: Any = import_module("chat.engine")
        older, make_sampling = hasattr(engine, "Cost"), engine.Sampling
        began = time.perf_counter()

        def one(n: int) -> Reply:
            drawn = make_sampling(**{**sampling, "seed": sampling["seed"] + n})
            adapters: Any = adapter if older else [adapter]
            *_, last = self.engine.stream(asked[n]["messages"], adapters, drawn, threading.Event())
            end, usage = time.perf_counter() - began, last.cost if older else last.usage
            return {"tokens": usage.tokens, "first": end - (usage.seconds - usage.first_token), "end": end}

        with ThreadPoolExecutor(len(asked)) as threads:
            return list(threads.map(one, range(len(asked))))


class BareLlama:
    """xllamacpp's server as it comes, with slots, threads and context as ours has them."""

    def __init__(self, gguf: str, lora: str, slots: int, context: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 0.0)]
        params.n_parallel, params.n_ctx, params.cache_ram_mib = slots, slots * context, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.context = context
        self.server: Any = xllamacpp.Server(params)

    def ask(self, asked: Sequence[Asked], adapter: str, sampling: dict[str, Any]) -> list[Reply]:
        """Answer conversations that come at the same moment."""
        bodies = [self._body(one["ids"], adapter, {**sampling, "seed": sampling["seed"] + n})
                  for n, one in enumerate(asked)]  # fmt: skip
        began = time.perf_counter()

        def one(body: dict[str, Any]) -> Reply:
            times: list[float] = []
            events: list[Any] = []

            def note(event: Any) -> bool:
                times.append(time.perf_counter() - began)
                events.append(event)
                return False

            self.server.handle_completions(body, note)
            return {"tokens": events[-1]["usage"]["completion_tokens"], "first": times[0], "end": times[-1]}

        with ThreadPoolExecutor(len(asked)) as threads:
            return list(threads.map(one, bodies))

    def _body(self, ids: list[int], adapter: str, sampling: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": ids, "stream": True, "max_tokens": sampling["max_new_tokens"],
            "samplers": ["penalties", "temperature", "top_k", "top_p"],
            "temperature": sampling["temperature"], "top_k": sampling["top_k"], "top_p": sampling["top_p"],
            "repeat_penalty": sampling["repetition_penalty"], "repeat_last_n": self.context, "seed": sampling["seed"],
            "lora": [{"id": 0, "scale": float(adapter != "base")}],
        }  # fmt: skip


class Tutorial:
    """As self-llm's notebook answers: the base by transformers in fp32, the adapter by PEFT, `generate`."""

    def __init__(self, base: str, folder: str, adapter: str, name: str) -> None:
        from peft import PeftModel

        from chat import base_model
        from chat.bases import BASES
        from chat.checkpoints import NAMED, Checkpoint

        checkpoint = Checkpoint(BASES[base], Path(folder), NAMED)
        self.tokenizer = base_model.load_tokenizer(checkpoint)
        self.model: Any = PeftModel.from_pretrained(base_model.load_base(checkpoint), adapter, name).eval()

    def ask(self, asked: Sequence[Asked], adapter: str, sampling: dict[str, Any]) -> list[Reply]:
        """Answer conversations that come at the same moment, one after the other."""
        began, layers = time.perf_counter(), self.model.base_model
        layers.disable_adapter_layers() if adapter == "base" else layers.enable_adapter_layers()
        return [self._one(one["ids"], {**sampling, "seed": sampling["seed"] + n}, began)
                for n, one in enumerate(asked)]  # fmt: skip

    def _one(self, ids: list[int], sampling: dict[str, Any], began: float) -> Reply:
        import torch

        from chat import base_model
        from chat.sampling import Sampling

        times: list[float] = []  # of the prompt, then of each token
        torch.manual_seed(sampling["seed"])
        with torch.inference_mode():
            self.model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                generation_config=base_model.generation_config(self.tokenizer, Sampling(**sampling)),
                streamer=_clock(times),
            )  # fmt: skip
        return {"tokens": len(times) - 1, "first": times[1] - began, "end": times[-1] - began}


def _clock(times: list[float]) -> Any:
    """A streamer that notes when it is called."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    return Clock()


KINDS = {"chat": Chat, "bare": BareLlama, "tutorial": Tutorial}


def memory() -> dict[str, float]:
    """Resident memory of this process in MB, now and at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = dict(line.split(":", 1) for line in lines)
    return {name: int(held[key].split()[0]) * 1024 / 1e6 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def main() -> None:
    """Open the engine of the first line, then answer line by line until there are none."""
    own = Path(__file__).parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != own.resolve()]  # its neighbours are no modules
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the log
    engine: Opened | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if request["do"] == "open":
            engine = KINDS[request["kind"]](**request["with"])
        elif request["do"] == "ask" and engine:
            answer = engine.ask(request["asked"], request["adapter"], request["sampling"])
        elif request["do"] == "memory":
            answer = memory()
        elif request["do"] == "quit":
            break
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
