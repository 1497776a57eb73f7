"""LocalEngine: transformers and PEFT in this process, one inference thread, each token streamed."""

import itertools
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from filelock import FileLock
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from chat import base as bases
from chat.adapter import WEIGHTS, Adapter, find
from chat.base import CONFIG, MEMORY_7B, MEMORY_MEDIUM, Located, converted_by, dense_folder
from chat.batch import Batch, Request
from chat.decoder import DECODE, Decoder
from chat.engine import (
    BASE_ONLY,
    MAX_NEW_TOKENS,
    PROMPT_TOKENS,
    REPLY_SECONDS,
    Awaited,
    ChatEngine,
    Cost,
    Piece,
    Sampling,
    check_adapters,
    whole_number,
)
from chat.fetch import digest
from chat.machine import ZERO_GPU
from chat.persona import OPENERS, Message
from chat.prompt import prompt_ids, trim

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

PLACES = 32  # conversations at once on a GPU; each keeps 150 MB of the 7B's cache
END, PAD = "<|im_end|>", "<|endoftext|>"


def best_base(bits: int = 16) -> str:
    """The largest base that the GPU (ZeroGPU's, too) has room for, the 7B in so many bits; without one the small."""
    if os.environ.get(ZERO_GPU):
        return "7b"
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "7b" if memory >= MEMORY_7B[bits] else "medium" if memory >= MEMORY_MEDIUM else "small"


def dense(located: Located) -> Located:
    """A folder transformers opens at once: a GGUF file is checked and converted, once, under a lock.

    Reading the GGUF costs a minute at every start; its dense bf16 form opens in a second. The file holds the tied
    embedding twice: `output.weight` is the finer of the two (8 bits), so it is kept for both.
    """
    if located.path.is_dir():
        return located
    folder = dense_folder(located.base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not converted_by(folder):
            located.verify()
            _convert(located, folder)
    return replace(located, path=folder)


def _convert(located: Located, folder: Path) -> None:
    log.info("Converting %s once; about a minute.", located.path.name)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    place, file = str(located.path.parent), located.path.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.tie_word_embeddings = True
    model.model.embed_tokens.weight = model.lm_head.weight
    save_base(model, tokenizer, part)
    bases.seal(part, located.source)
    os.replace(part, folder)


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model, its tokenizer and our sampling as a folder that transformers opens, from 4.45 on."""
    model.generation_config = GenerationConfig(
        **bases.SAMPLING, do_sample=True, eos_token_id=ends(tokenizer), pad_token_id=ends(tokenizer)[1]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template where older programs look, too
    config = bases.read_config(folder)
    # transformers 4 looks for it here alone, and takes 10,000 without a word where it is not.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def places() -> int:
    """How many replies this machine gives at once: more than one on a GPU with Triton, as PLACES says."""
    if not torch.cuda.is_available() or os.environ.get(ZERO_GPU) or not find_spec("triton"):
        return 1  # ZeroGPU's workers are forked for one visitor each
    if torch.cuda.get_device_capability() < (8, 0):
        return 1  # Triton multiplies no bf16 there
    return min(whole_number("PLACES", os.environ.get("PLACES") or str(PLACES)), DECODE[-1])


def load_tokenizer(located: Located) -> "PreTrainedTokenizerFast":
    """The base's own tokenizer, whose template is the only template."""
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(located.path))


def best_device() -> str:
    """The GPU where there is one; on ZeroGPU it is promised at all times, but there only while she answers."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_bits(bits: int) -> None:
    """Raise ValueError where a base cannot have weights of so many bits, with what to do."""
    if bits not in MEMORY_7B:
        raise ValueError(f"No base has weights of {bits} bits. Choose --bits from {', '.join(map(str, MEMORY_7B))}.")
    if bits != 16 and os.environ.get(ZERO_GPU):
        raise ValueError("bitsandbytes reads a base onto the GPU, which ZeroGPU lends only later. Leave --bits out.")
    if bits != 16 and not find_spec("bitsandbytes"):
        raise ValueError(
            f"{bits} bits need bitsandbytes, which is not here. Install it, `.venv/bin/pip install -c constraints.txt "
            "-r requirements-bits.txt`, or leave --bits out."
        )


def load_base(located: Located, device: str | None = None, bits: int = 16) -> "PreTrainedModel":
    """The base, on the best device unless told: bf16 where there is a GPU, else fp32; a CPU gains little from bf16.

    In fewer bits than 16 it always takes the best device. Raises as `require_bits` does.
    """
    require_bits(bits)
    # cuDNN's attention gave NaN gradients and is chosen by default for packed rows on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.bfloat16 if best_device() == "cuda" else torch.float32
    less = None if bits == 16 else _quantised(bits, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(located.path, dtype=dtype, quantization_config=less)
    if less:
        _keep_unpacked(model)
    else:
        model.to(device or best_device())
    model.config._name_or_path = model.name_or_path = located.base.name  # PEFT writes it into adapter_config.json
    model.generation_config = GenerationConfig()  # generation_config() below says everything
    loaded: PreTrainedModel = model.eval()
    return loaded


def _quantised(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The linear layers in 4 bits (NF4, its scales quantised too) or 8 (LLM.int8), computed in `dtype`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast at each product of 8 bits
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_unpacked(model: Any) -> None:
    """Keep a CPU with AVX512-BF16 from packing the 4 bits anew when it first answers: no gradient would pass then."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load(choice: str | None = None, bits: int = 16) -> Awaited:
    """The engine of this machine, with every adapter that fits its base; its weights are read in the background.

    The base's files are fetched and the adapters' checked before this returns. Raises Unavailable or ValueError.
    """
    require_bits(bits)
    located = dense(bases.locate(choice or best_base(bits)))
    adapters, refused = find(located)
    most = places() if bits == 16 else 1  # the decoder multiplies weights of 16
    if most > 1 and (doras := [adapter.name for adapter in adapters if adapter.dora]):
        log.warning("Visitors are answered one at a time, as %s is a DoRA. Leave it out to serve many.", doras[0])
        most = 1
    for sentence in refused:
        log.warning(sentence)

    def make() -> ChatEngine:
        engine = LocalEngine(located, adapters, bits)
        engine.refused += refused
        if most > 1:
            engine.quicken(most)
        return engine

    awaited = Awaited(_served_by(located, bits), [adapter.name for adapter in adapters], make, most)
    if os.environ.get(ZERO_GPU):
        awaited.wait()  # its workers are forked, and what they share must be in memory before
    return awaited


def _served_by(located: Located, bits: int) -> str:
    return f"{located.base.name} ({located.source}{'' if bits == 16 else f', {bits} bits'})"


class LocalEngine:
    """A base and its adapters in memory. All model work is done on one thread: an adapter is chosen globally."""

    ready = True

    def __init__(self, located: Located, adapters: Sequence[Adapter] = (), bits: int = 16) -> None:
        located = dense(located)
        self.base = _served_by(located, bits)
        self.tokenizer = load_tokenizer(located)
        # On ZeroGPU nothing can run on the GPU before a visitor asks: there adapters are tried on the CPU.
        on_zero_gpu = bool(os.environ.get(ZERO_GPU))
        base: Any = load_base(located, "cpu" if on_zero_gpu else None, bits)
        self.model = base  # a PeftModel once an adapter is admitted
        self.refused: list[str] = []
        self._served: list[str] = []
        self._digests: dict[str, str] = {}
        self._unmixed = {adapter.name for adapter in adapters if adapter.dora}
        for adapter in adapters:
            self._admit(adapter)
        self.model.to(best_device())
        self._batch: Batch | None = None
        self._most = 1
        self._start_thread()
        os.register_at_fork(after_in_child=self._start_thread)  # ZeroGPU answers from a forked worker

    def _start_thread(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    @property
    def places(self) -> int:
        """Replies at once: one, until it is quick."""
        batch = self._batch
        return len(batch.places) if batch else 1

    @property
    def most(self) -> int:
        """Replies at once that it may come to."""
        return self._most

    def quicken(self, places: int) -> None:
        """Get ready to answer several at once, in the background; until then replies are generated one by one.

        Recording a step takes up to some seconds. Who asks meanwhile is answered between two of them.
        """
        self._most = places
        self._thread.submit(self._quicken, places)

    def _quicken(self, places: int, batch: Batch | None = None, left: Sequence[Callable[[], Any]] = ()) -> None:
        try:
            if not batch:
                decoder = Decoder(self.model, self._served, places, MAX_NEW_TOKENS + PROMPT_TOKENS)
                batch, left = Batch(decoder, self._thread), decoder.rehearsals()
            else:
                left[0]()
                left = left[1:]
        except Exception as error:  # noqa: BLE001 - no room for the cache or a kernel: the plain way goes on
            log.warning("Visitors are answered one at a time: %s. Give a smaller PLACES.", error)
            return
        if left:
            self._thread.submit(self._quicken, places, batch, left)
        else:
            self._batch = batch
            log.info("%d conversations can be answered at once.", len(batch.places))

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that passed the gate, then the base alone."""
        return [*self._served, BASE_ONLY]

    def _admit(self, adapter: Adapter) -> None:
        """Load an adapter, and refuse it when it leaves the logits as they are or makes them infinite."""
        fp32 = self.model.dtype == torch.float32 or adapter.dora  # half precision would blur its magnitudes
        if _wears(self.model):
            self.model.load_adapter(adapter.folder, adapter.name, autocast_adapter_dtype=fp32)
        else:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(
                self.model, adapter.folder, adapter.name, autocast_adapter_dtype=fp32
            )
        self.model.eval()
        if reason := self._unfit(adapter.name):
            self.model.delete_adapter(adapter.name)
            self.refused.append(f"{adapter.folder / WEIGHTS} {reason}. Train it again.")
            log.warning(self.refused[-1])
        else:
            self._served.append(adapter.name)
            self._digests[adapter.name] = digest(adapter.folder / WEIGHTS)[:12]

    @torch.inference_mode()
    def _unfit(self, name: str) -> str:
        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": OPENERS[0]}])
        # Two tokens, so that there is something to attend to; reading the weights is what takes time.
        batch = torch.tensor([ids[:2]], device=self.model.device)
        with self._worn(BASE_ONLY):
            plain = self.model(batch, logits_to_keep=1).logits
        with self._worn(name):
            adapted = self.model(batch, logits_to_keep=1).logits
        if not adapted.isfinite().all():
            return "makes logits that are not finite"
        return "changes no logits" if torch.equal(plain, adapted) else ""

    def _worn(self, name: str) -> Any:
        """A context in which the model wears the adapter of that name, or none."""
        if not _wears(self.model):
            return nullcontext()
        if name == BASE_ONLY:
            return self.model.disable_adapter()
        self.model.set_adapter(name)
        return nullcontext()

    def digest(self, adapter: str) -> str:
        """The first twelve hex digits of the weights' sha256; empty for the base alone."""
        return self._digests.get(adapter, "")

    def stream(
        self, turns: Sequence[Message], adapter: str, sampling: Sampling, cancel: threading.Event, go_on: bool = False
    ) -> Iterator[Piece]:
        """Answer the last turn, a piece for each token; with `go_on` continue it.

        Closing the iterator or setting `cancel` stops within a token. Raises ValueError for an unknown adapter or a
        question too long; a failure of the model reaches the caller.
        """
        for _, piece in self._speak(turns, [adapter], sampling, cancel, go_on):
            yield piece

    def compare(
        self, turns: Sequence[Message], adapters: Sequence[str], sampling: Sampling, cancel: threading.Event
    ) -> Iterator[tuple[int, Piece]]:
        """Answer with several adapters in one batch, each row wearing its own. Raises as `stream` does."""
        return self._speak(turns, adapters, sampling, cancel)

    def _speak(
        self,
        turns: Sequence[Message],
        adapters: Sequence[str],
        sampling: Sampling,
        cancel: threading.Event,
        go_on: bool = False,
    ) -> Iterator[tuple[int, Piece]]:
        check_adapters(adapters, self.adapters)
        kept, ids = trim(self.tokenizer, turns, PROMPT_TOKENS, go_on)
        pieces: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
        work: list[Future[Any]]
        batch = self._batch
        if batch:
            work = self._join(batch, ids, adapters, sampling, cancel, pieces)
        else:
            alone = len(adapters) > 1 and not self._unmixed.isdisjoint(adapters)  # PEFT mixes no DoRA into a batch
            groups = [[adapter] for adapter in adapters] if alone else [adapters]
            work = [
                self._thread.submit(self._reply, ids, group, sampling, cancel, pieces, row)
                for row, group in enumerate(groups)
            ]
        for part in work:
            part.add_done_callback(lambda _: pieces.put(None))
        try:
            for _ in work:
                while spoken := pieces.get():
                    yield spoken
            done: list[Any] = [part.result() for part in work]
            for row, cost in enumerate(done if batch else itertools.chain(*done)):
                yield row, Piece("", replace(cost, forgotten=len(turns) - len(kept)))
        finally:
            cancel.set()

    def _join(
        self,
        batch: Batch,
        ids: list[int],
        adapters: Sequence[str],
        sampling: Sampling,
        cancel: threading.Event,
        pieces: "queue.SimpleQueue[tuple[int, Piece] | None]",
    ) -> list["Future[Cost]"]:
        """The same in the batch, a place for each adapter."""
        voice = _Voice(self.tokenizer, pieces, len(adapters))
        return [
            batch.submit(Request(
                ids, self._served.index(adapter) if adapter != BASE_ONLY else -1, sampling, cancel,
                partial(voice.say, number), REPLY_SECONDS,
            ))
            for number, adapter in enumerate(adapters)
        ]  # fmt: skip

    @torch.inference_mode()
    def _reply(
        self,
        ids: list[int],
        adapters: Sequence[str],
        sampling: Sampling,
        cancel: threading.Event,
        pieces: "queue.SimpleQueue[tuple[int, Piece] | None]",
        first_row: int = 0,
    ) -> list[Cost]:
        """Generate on the inference thread, a row for each adapter; text goes into `pieces` token by token."""
        started = time.perf_counter()
        if cancel.is_set():  # gave up while waiting for the thread
            return [Cost("cancelled", 0, 0, 0)] * len(adapters)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        voice = _Voice(self.tokenizer, pieces, len(adapters), first_row)
        prompt = torch.tensor([ids] * len(adapters), device=self.model.device)
        with self._worn(adapters[0]) if len(adapters) == 1 else nullcontext():
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=generation_config(self.tokenizer, sampling),
                stopping_criteria=[_Cancelled(cancel)],
                streamer=voice,
                **self._mixed(adapters),
            )
        now = time.perf_counter()
        first = (voice.first or now) - started
        return [Cost(_why(row, sampling, cancel), row.tokens, first, now - started) for row in voice.rows]

    def _mixed(self, adapters: Sequence[str]) -> dict[str, list[str]]:
        """PEFT's argument for a batch in which each row wears another adapter; none for a row alone, or no adapter."""
        if len(adapters) == 1 or not self._served:
            return {}
        return {"adapter_names": ["__base__" if name == BASE_ONLY else name for name in adapters]}


def _wears(model: Any) -> bool:
    """Whether a model is PEFT's, which puts on adapters by name; importing PEFT takes two seconds."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def ends(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Both terminators: the template's `<|im_end|>` and the tutorial's `<|endoftext|>`."""
    return cast("list[int]", tokenizer.convert_tokens_to_ids([END, PAD]))


def generation_config(tokenizer: "PreTrainedTokenizerFast", sampling: Sampling) -> GenerationConfig:
    """Our sampling, written out in full: what a base folder says is not relied on."""
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "max_time": REPLY_SECONDS,
        "repetition_penalty": float(sampling.repetition_penalty),  # a slider at 1 sends an int, which is refused
        "eos_token_id": ends(tokenizer),
        "pad_token_id": ends(tokenizer)[1],
    }
    if sampling.temperature == 0:
        return GenerationConfig(**common, do_sample=False)
    drawn = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": sampling.top_k}
    return GenerationConfig(**common, **drawn, do_sample=True)


class _Cancelled(StoppingCriteria):
    def __init__(self, cancel: threading.Event) -> None:
        self.cancel = cancel

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancel.is_set(), device=input_ids.device)


class _Row:
    """What one row of a batch has said so far."""

    def __init__(self) -> None:
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.tokens = 0
        self.ended = False


def _why(row: _Row, sampling: Sampling, cancel: threading.Event) -> Literal["end", "length", "time", "cancelled"]:
    """Why a reply ended."""
    if row.ended:
        return "end"
    if cancel.is_set():
        return "cancelled"
    return "length" if row.tokens >= sampling.max_new_tokens else "time"


class _Voice(BaseStreamer):
    """Turns each new token into text at once; a character of several tokens waits for its last."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        pieces: "queue.SimpleQueue[tuple[int, Piece] | None]",
        rows: int,
        first_row: int = 0,
    ) -> None:
        self.tokenizer = tokenizer.backend_tokenizer
        self.ends = ends(tokenizer)
        self.pieces = pieces
        self.rows, self.first_row = [_Row() for _ in range(rows)], first_row
        self.prompt_seen = False
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then a token for each row; rows that have ended are padded, which is not speech."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.first = self.first or time.perf_counter()
        for number, (row, token) in enumerate(zip(self.rows, value.flatten().tolist(), strict=True)):
            if not row.ended:
                self.say(number, token)

    def say(self, number: int, token: int) -> bool:
        """Say a token of one row; whether it ends the row's reply."""
        row = self.rows[number]
        row.tokens += 1
        row.ended = token in self.ends
        if text := row.decoder.step(self.tokenizer, token):
            self.pieces.put((self.first_row + number, Piece(text)))
        return row.ended

    def end(self) -> None:
        """Nothing is held back."""
