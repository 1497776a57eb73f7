"""LocalEngine: transformers and PEFT in this process, on one inference thread.

On a GPU the decoder of qwen2/ takes over as soon as its CUDA graphs are captured, and answers many visitors together.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from tokenizers.decoders import DecodeStream

from chat import checkpoints, engine
from chat.adapter import WEIGHTS, Adapter, find
from chat.base_model import add_adapter, best_device, ends, generation_config, load_base, load_tokenizer, require_bits
from chat.bases import MEMORY_7B, MEMORY_MEDIUM
from chat.checkpoints import Checkpoint
from chat.convert import ensure_converted
from chat.download import digest
from chat.engine import BASE_ONLY, PROMPT_TOKENS, REPLY_SECONDS, Chunk, Chunks, Health, InferenceThreads
from chat.machine import ZERO_GPU
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids, trim
from chat.sampling import MAX_NEW_TOKENS, Sampling
from chat.scheduler import Request, Scheduler
from qwen2.decoder import DECODE_SIZES, Decoder
from qwen2.supported import gpu_supported

log = logging.getLogger(__name__)

MAX_NUM_SEQS = 32  # conversations at once on a GPU; each takes 150 MB of the 7B's KV cache


def best_base(bits: int = 16) -> str:
    """The largest base that the GPU, or ZeroGPU's, has memory for, the 7B in so many bits; `small` without a GPU."""
    if os.environ.get(ZERO_GPU):
        return "7b"
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "7b" if memory >= MEMORY_7B[bits] else "medium" if memory >= MEMORY_MEDIUM else "small"


def num_slots() -> int:
    """How many replies this machine can generate at once: as MAX_NUM_SEQS says where the decoder runs, else one."""
    if os.environ.get(ZERO_GPU) or not gpu_supported():  # ZeroGPU forks a worker for each visitor
        return 1
    return min(engine.max_num_seqs(MAX_NUM_SEQS), DECODE_SIZES[-1])


def load(choice: str | None = None, bits: int = 16) -> "LocalEngine":
    """The engine, once the base's files are fetched and the adapters are checked. Raises Unavailable or ValueError."""
    require_bits(bits)
    checkpoint = checkpoints.locate(choice or best_base(bits))
    adapters, refused = find(checkpoint)
    for sentence in refused:
        log.warning(sentence)
    num_seqs = num_slots() if bits == 16 else 1  # the decoder multiplies weights of 16 bits
    if num_seqs > 1 and (doras := [adapter.name for adapter in adapters if adapter.dora]):
        log.warning("Visitors are answered one at a time, as %s is a DoRA. Leave it out to serve many.", doras[0])
        num_seqs = 1
    return LocalEngine(checkpoint, adapters, bits, num_seqs, refused)


class LocalEngine:
    """A base and its adapters in memory. One thread does all work, as PEFT switches adapters on for all."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter] = (), bits: int = 16, max_num_seqs: int = 1,
                 refused: Sequence[str] = ()) -> None:  # fmt: skip
        """Return at once, but on ZeroGPU: its workers are forked and share only what was in memory before."""
        self.base = f"{checkpoint.base.name} ({checkpoint.source}{'' if bits == 16 else f', {bits} bits'})"
        self.adapters = [*(adapter.name for adapter in adapters), BASE_ONLY]
        self.temperature = checkpoint.base.temperature
        self.refused, self.max_num_seqs = list(refused), max_num_seqs
        self.unstated = {adapter.name: adapter.unstated for adapter in adapters}
        self._digests: dict[str, str] = {}
        self._doras = {adapter.name for adapter in adapters if adapter.dora}
        self._scheduler: Scheduler | None = None
        self._start_thread()
        os.register_at_fork(after_in_child=self._start_thread)
        self._loading = self._thread.submit(self._load, checkpoint, adapters, bits)
        if os.environ.get(ZERO_GPU):
            self.wait()

    def _start_thread(self) -> None:
        self._thread = InferenceThreads(1, "inference")

    def _load(self, checkpoint: Checkpoint, adapters: Sequence[Adapter], bits: int) -> None:
        checkpoint = ensure_converted(checkpoint)
        self.tokenizer = load_tokenizer(checkpoint)
        # ZeroGPU lends its GPU only when a visitor asks: there the adapters are tried on the CPU.
        self.model = cast("Any", load_base(checkpoint, "cpu" if os.environ.get(ZERO_GPU) else None, bits))
        for layer in self.model.get_decoder().layers:  # on a CPU a long prefill takes a minute, a layer of it seconds
            layer.register_forward_hook(lambda *_: self._thread.progress())
        for adapter in adapters:
            self._admit(adapter)
        self.model.to(best_device())
        self._thread.progress()
        if self.max_num_seqs > 1:
            self.start_batching(self.max_num_seqs)

    def _admit(self, adapter: Adapter) -> None:
        """Load an adapter; turn it down when it leaves the logits as they are or makes them infinite."""
        # A DoRA's magnitudes would keep three digits in half precision.
        self.model = add_adapter(self.model, adapter, in_fp32=self.model.dtype == torch.float32 or adapter.dora)
        if reason := self._fault(adapter.name):
            self.model.delete_adapter(adapter.name)
            self.adapters = [name for name in self.adapters if name != adapter.name]
            self.refused.append(f"{adapter.folder / WEIGHTS} {reason}. Train it again.")
            log.warning(self.refused[-1])
        else:
            self._digests[adapter.name] = digest(adapter.folder / WEIGHTS)[:12]

    @torch.inference_mode()
    def _fault(self, name: str) -> str:
        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": OPENERS[0]}])
        # Two tokens, so that there is something to attend to; reading the weights is what takes time.
        batch = torch.tensor([ids[:2]], device=self.model.device)
        with self._use_adapter(BASE_ONLY):
            plain = self.model(batch, logits_to_keep=1).logits
        with self._use_adapter(name):
            adapted = self.model(batch, logits_to_keep=1).logits
        if not adapted.isfinite().all():
            return "makes logits that are not finite"
        return "changes no logits" if torch.equal(plain, adapted) else ""

    def _use_adapter(self, name: str) -> AbstractContextManager[Any]:
        """A context in which the model computes with the adapter of that name, or as the base alone."""
        if not hasattr(self.model, "disable_adapter"):  # no adapter was loaded: it is no PeftModel
            return nullcontext()
        if name == BASE_ONLY:
            return cast("AbstractContextManager[Any]", self.model.disable_adapter())
        self.model.set_adapter(name)
        return nullcontext()

    def start_batching(self, max_num_seqs: int) -> None:
        """Prepare to answer several visitors together, in the background; until then replies are generated in turn."""
        self.max_num_seqs = max_num_seqs
        self._thread.submit(self._next_capture, self._captures(max_num_seqs))

    def _captures(self, max_num_seqs: int) -> Iterator[None]:
        decoder = Decoder(self.model, self.adapters[:-1], max_num_seqs, MAX_NEW_TOKENS + PROMPT_TOKENS)
        yield from decoder.capture_graphs()
        self._scheduler = Scheduler(decoder, self._thread)
        log.info("%d conversations can be answered at once.", self.num_slots)

    def _next_capture(self, captures: Iterator[None]) -> None:
        """Capture one graph, in up to some seconds; replies asked for meanwhile go before the next one."""
        try:
            for _ in captures:
                self._thread.progress()
                self._thread.submit(self._next_capture, captures)
                return
        except Exception as error:  # noqa: BLE001 - no memory for the KV cache, or a kernel fails: `generate` goes on
            log.warning("Visitors are answered one at a time: %s. Lower MAX_NUM_SEQS.", error)

    @property
    def num_slots(self) -> int:
        return len(self._scheduler.slots) if self._scheduler else 1

    @property
    def ready(self) -> bool:
        return self._loading.done()

    @property
    def health(self) -> Health:
        return self._thread.health if self.ready else "loading"

    def wait(self) -> None:
        self._loading.result()

    def digest(self, adapter: str) -> str:
        return self._digests.get(adapter, "")

    def stream(self, messages: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event,
               continue_final_message: bool = False) -> Iterator[Chunk]:  # fmt: skip
        """As ChatEngine says; it stops within a token, and raises what the model raised."""
        yield from engine.until_loaded(self._loading, self._thread)
        engine.check_adapters(adapters, self.adapters)
        kept, ids = trim(self.tokenizer, messages, PROMPT_TOKENS, continue_final_message)
        chunks, lora_ids = Chunks(), {name: n for n, name in enumerate(self.adapters[:-1])}
        requests = [
            Request(ids, lora_ids.get(name, -1), sampling, cancel, self._on_token(row, chunks), REPLY_SECONDS)
            for row, name in enumerate(adapters)
        ]
        if self._scheduler:
            for request in requests:
                self._scheduler.submit(request)
        else:  # one batch; PEFT mixes no DoRA into a batch
            for batch in [requests] if self._doras.isdisjoint(adapters) else [[request] for request in requests]:
                self._thread.submit(self._generate, batch)
        try:
            replies = [request.usage for request in requests]
            yield from engine.drain(chunks, replies, len(messages) - len(kept), self._thread)
        finally:
            cancel.set()

    def _on_token(self, row: int, chunks: Chunks) -> Callable[[int], bool]:
        """What takes the tokens of a row: their text goes into `chunks`, each character whole; True at a terminator."""
        decoder, terminators = DecodeStream(skip_special_tokens=True), ends(self.tokenizer)

        def take(token: int) -> bool:
            self._thread.progress()
            if text := decoder.step(self.tokenizer.backend_tokenizer, token):
                chunks.put(Chunk(text, row))
            return token in terminators

        return take

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> None:
        """Generate the replies to one prompt, by one adapter each, as one batch."""
        adapters = [self.adapters[request.lora_id] for request in requests]
        mixed = len(adapters) > 1 and len(self.adapters) > 1
        names = ["__base__" if name == BASE_ONLY else name for name in adapters]  # as PEFT calls them
        ids, sampling, cancel = requests[0].ids, requests[0].sampling, requests[0].cancel

        def done(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Hand out the new token of each row; (rows,), whether its reply has ended."""
            for request, token in zip(requests, input_ids[:, -1].tolist(), strict=True):
                if not request.usage.done() and (reason := request.add(token)):
                    request.finish(reason)
            return torch.tensor([request.usage.done() for request in requests], device=input_ids.device)

        for request in requests:
            request.started = time.perf_counter()
        try:
            if not cancel.is_set():  # the visitor may have left while this waited for the thread
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                prompt = torch.tensor([ids] * len(requests), device=self.model.device)
                with nullcontext() if mixed else self._use_adapter(adapters[0]):
                    self.model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[done],
                        generation_config=generation_config(self.tokenizer, sampling),
                        **({"adapter_names": names} if mixed else {}),
                    )  # fmt: skip
            for request in requests:
                if not request.usage.done():
                    request.finish("cancelled" if cancel.is_set() else "time")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it reaches those who asked
            for request in requests:
                if not request.usage.done():
                    request.usage.set_exception(error)
