"""The base as a CPU answers with it: Qwen2's forward pass written out, its weights packed in half precision.

A token's cost is the bytes of the weights, each read once, and the calls of many small operations. Packed, a weight
takes two bytes and is multiplied in fp32 (torch's fbgemm kernels); and where the layers of transformers and PEFT make
thousands of calls, this makes some seven hundred. What was read of the last conversations is kept, so that the next
turn of one, or a new one under the same system prompt, reads its new tokens only.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig

from chat import adapter as adapters
from chat.base import Located
from chat.engine import BASE_ONLY

SHARED = (  # linear layers with one input, read as one product
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
CHUNK = 256  # tokens of a prompt read at once: long enough for the kernels, short enough to stop within a second
NO_ADAPTER = "__base__"  # as PEFT calls it in a batch of several voices
HEAD_ROWS = 8192  # of the head in one product: the whole of it takes three times as long to pack
KEPT = 4  # conversations whose keys and values stay in memory: 25 kB a token of the small base
Tensors = Mapping[str, torch.Tensor]
Worn = list[tuple[slice, str]]  # which rows of a product wear which adapter


def fits(located: Located) -> bool:
    """Whether a base can be packed: a plain Qwen2 in safetensors, on a processor with the kernels (x86 with AVX2)."""
    config = AutoConfig.from_pretrained(located.path)
    return (
        "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch.ops.quantized, "linear_prepack_fp16")
        and config.model_type == "qwen2"
        and config.hidden_act == "silu"
        and set(config.layer_types) == {"full_attention"}
        and config.rope_parameters["rope_type"] == "default"
        and getattr(config, "quantization_config", None) is None
        and any(located.path.glob("*.safetensors"))
    )


class Product:
    """Linear layers that share their input as one product; what each adapter adds is kept apart, in fp32."""

    def __init__(self, base: Tensors, layers: Sequence[str]) -> None:
        """Pack the weights, and biases if any, that the base has under the layers' names."""
        weights = [base[f"{layer}.weight"] for layer in layers]
        bias = [base[f"{layer}.bias"].float() for layer in layers if f"{layer}.bias" in base]
        self.layers, self.widths = layers, [len(weight) for weight in weights]
        self.bias = torch.cat(bias) if bias else None
        self.packed = _packed(torch.cat(weights), self.bias)
        self.adapters: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.gains: dict[str, torch.Tensor] = {}

    def adapt(self, name: str, lora: Tensors, scale: float) -> None:
        """Add an adapter: its A beside one another, (in, ranks), its B as blocks on a diagonal, (ranks, out)."""
        stems = [f"base_model.model.{layer}.lora_" for layer in self.layers]
        downs = [lora[f"{stem}A.weight"].float() for stem in stems if f"{stem}A.weight" in lora]
        ups = [
            lora[f"{stem}B.weight"].float() * scale if f"{stem}B.weight" in lora else torch.empty(width, 0)
            for stem, width in zip(stems, self.widths, strict=True)
        ]
        if downs:
            self.adapters[name] = torch.cat(downs).T.contiguous(), torch.block_diag(*ups).T.contiguous()

    def scale(self, name: str, lora: Tensors, base: Tensors) -> None:
        """Add what makes an adapter a DoRA: a factor for each output (Liu et al. 2024, equation 5).

        It is the learned magnitude over the norm of the weight that the LoRA changes; a bias is added after it.
        """
        if name not in self.adapters:
            return
        down, up = self.adapters[name]
        weights = torch.cat([base[f"{layer}.weight"].float() for layer in self.layers])
        norms = weights.add_((down @ up).T).norm(dim=1).split(self.widths)
        stems = [f"base_model.model.{layer}.lora_magnitude_vector" for layer in self.layers]
        self.gains[name] = torch.cat([
            lora[stem].float() / norm if stem in lora else torch.ones_like(norm)
            for stem, norm in zip(stems, norms, strict=True)
        ])  # fmt: skip

    def __call__(self, x: torch.Tensor, worn: Worn) -> torch.Tensor:
        """x of shape (rows, in) to (rows, out)."""
        y = cast("torch.Tensor", torch.ops.quantized.linear_dynamic_fp16(x, self.packed))
        for rows, name in worn:
            if name in self.adapters:
                down, up = self.adapters[name]
                y[rows].addmm_(x[rows] @ down, up)
            if name in self.gains:
                gain, bias = self.gains[name], 0 if self.bias is None else self.bias
                y[rows].sub_(bias).mul_(gain).add_(bias)
        return y


class Layer:
    """One layer of a Qwen2: attention and MLP, each behind its norm."""

    def __init__(self, base: Tensors, stem: str) -> None:
        self.products = [Product(base, [f"{stem}.{layer}" for layer in layers]) for layers in SHARED]
        self.qkv, self.o, self.gate_up, self.down = self.products
        self.norms = [base[f"{stem}.{norm}_layernorm.weight"].float() for norm in ("input", "post_attention")]


@dataclass(frozen=True, eq=False)
class Kept:
    """What was read of a conversation: whose voice, the token ids, and keys and values.

    Shape of `memory`: (layers, 2, key-value heads, ids, head size). It follows from adapter and ids alone, so whoever
    sends the very same ids may have it.
    """

    adapter: str
    ids: list[int]
    memory: torch.Tensor


class Packed:
    """A Qwen2 and its adapters, for one thread at a time; it is called as PEFT's models are."""

    device, dtype = torch.device("cpu"), torch.float32

    @torch.inference_mode()
    def __init__(self, folder: Path) -> None:
        """Read a base that `fits` from its folder and pack it, the layers side by side on all threads."""
        self.folder, config = folder, AutoConfig.from_pretrained(folder)
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.size, 2) / self.size)
        with _opened(folder) as base, ThreadPoolExecutor(torch.get_num_threads()) as threads:
            self.embedding = base["model.embed_tokens.weight"].clone()  # else the whole file stays mapped
            self.norm = base["model.norm.weight"].float()
            head = base.get("lm_head.weight", self.embedding)
            self.head = list(threads.map(_packed, head.split(HEAD_ROWS)))
            stems = [f"model.layers.{n}" for n in range(config.num_hidden_layers)]
            self.layers = list(threads.map(lambda stem: Layer(base, stem), stems))
        self.worn = BASE_ONLY
        self.kept: deque[Kept] = deque(maxlen=KEPT)

    def load_adapter(self, folder: Path, name: str, **_: Any) -> None:
        """Add an adapter that `chat.adapter` let through: a LoRA or DoRA of one rank."""
        config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        lora = load_file(folder / adapters.WEIGHTS)
        self.kept.clear()  # a name stands for these weights from now on
        for product in self._products():
            product.adapt(name, lora, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        if config.get("use_dora"):
            with _opened(self.folder) as base:
                for product in self._products():
                    product.scale(name, lora, base)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self.worn = BASE_ONLY if self.worn == name else self.worn
        for product in self._products():
            product.adapters.pop(name, None)
            product.gains.pop(name, None)

    def _products(self) -> Iterator[Product]:
        return (product for layer in self.layers for product in layer.products)

    def set_adapter(self, name: str) -> None:
        """Wear an adapter from now on."""
        self.worn = name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Wear none within the block."""
        worn, self.worn = self.worn, BASE_ONLY
        try:
            yield
        finally:
            self.worn = worn

    def eval(self) -> None:
        """It knows no training."""

    def to(self, device: str) -> None:
        """It stays where it is."""

    def __call__(self, ids: torch.Tensor, logits_to_keep: int = 0) -> SimpleNamespace:
        """Logits for ids of shape (rows, n): (rows, n, vocabulary), or of the last `logits_to_keep` tokens."""
        hidden = self.read(ids, [self.worn] * len(ids), self._memory(*ids.shape), 0)
        return SimpleNamespace(logits=self.logits(hidden[:, -logits_to_keep:]))

    def _memory(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.empty(len(self.layers), 2, rows, self.groups, tokens, self.size)

    def read(self, ids: torch.Tensor, names: Sequence[str], memory: torch.Tensor, start: int) -> torch.Tensor:
        """Hidden states of shape (rows, n, hidden) for ids of shape (rows, n) that follow `start` tokens read before.

        `memory` holds keys and values, (layers, 2, rows, key-value heads, capacity, head size), and is written to.
        """
        rows, n = ids.shape
        worn = [(slice(row * n, row * n + n), name) for row, name in enumerate(names)]
        x = self.embedding[ids.flatten()].float()
        angles = self._angles(start, n)
        mask = self._mask(n, start)
        for layer, (keys, values) in zip(self.layers, memory, strict=True):
            qkv = layer.qkv(self._normed(x, layer.norms[0]), worn).view(rows, n, -1, keys.shape[-1])
            x = x + layer.o(self._attend(qkv, keys, values, start, angles, mask), worn)
            gate, up = layer.gate_up(self._normed(x, layer.norms[1]), worn).chunk(2, -1)
            x = x + layer.down(functional.silu(gate).mul_(up), worn)
        return self._normed(x, self.norm).view(rows, n, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of shape (…, hidden) to (…, vocabulary)."""
        flat = hidden.flatten(0, -2)
        parts = [torch.ops.quantized.linear_dynamic_fp16(flat, part) for part in self.head]
        return torch.cat(parts, -1).view(*hidden.shape[:-1], -1)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.epsilon)

    def _angles(self, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for each new position, of shape (n, 1, head size / 2); the other half is the same."""
        angles = torch.outer(torch.arange(start, start + n), self.frequencies)[:, None]
        return angles.cos(), angles.sin()

    def _mask(self, n: int, start: int) -> torch.Tensor | None:
        """Which of all tokens each new one may attend to: (heads of a group x n, start + n); a lone one to all."""
        if n == 1:
            return None
        return torch.ones(n, start + n, dtype=torch.bool).tril(start).repeat(self.heads // self.groups, 1)

    def _attend(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of qkv, (rows, n, heads, head size), to all that was read. The heads of a group are queries of
        one head, so that their keys and values are read once."""
        rows, n, _, size = qkv.shape
        turned = _turn(qkv[:, :, : -self.groups], *angles)
        end = start + n
        keys[:, :, start:end] = turned[:, :, self.heads :].transpose(1, 2)
        values[:, :, start:end] = qkv[:, :, -self.groups :].transpose(1, 2)
        queries = turned[:, :, : self.heads].unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        seen: torch.Tensor = functional.scaled_dot_product_attention(
            queries, keys[:, :, :end], values[:, :, :end], attn_mask=mask
        )
        return seen.view(rows, -1, self.heads // self.groups, n, size).permute(0, 3, 1, 2, 4).reshape(rows * n, -1)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: Any,
        stopping_criteria: Sequence[Any],
        streamer: Any,
        adapter_names: Sequence[str] = (),
    ) -> None:
        """As transformers' own, for one prompt in several voices: the ids, (rows, n), differ in their adapter only.

        The streamer gets the prompt, then each row's next token; a row that has ended is padded.
        """
        config, ids = generation_config, input_ids
        limit = time.monotonic() + config.max_time
        rows, n = ids.shape
        names = [BASE_ONLY if name == NO_ADAPTER else name for name in adapter_names or [self.worn] * rows]
        memory = self._memory(rows, n + config.max_new_tokens)
        ended = torch.zeros(rows, dtype=torch.bool)
        streamer.put(ids)
        hidden = self._read_prompt(ids, names, memory, stopping_criteria)
        while hidden is not None:
            drawn = draw(self.logits(hidden), ids, config).masked_fill(ended, config.pad_token_id)
            streamer.put(drawn)
            ids = torch.cat([ids, drawn[:, None]], dim=1)
            ended |= torch.isin(drawn, torch.tensor(config.eos_token_id))
            full = ids.shape[1] == memory.shape[4]
            if full or ended.all() or time.monotonic() > limit or _stopped(stopping_criteria, ids):
                break
            hidden = self.read(drawn[:, None], names, memory, ids.shape[1] - 1)[:, -1]
        else:
            return  # stopped before all of the prompt was read
        self._keep(ids, names, memory)

    def _read_prompt(
        self, ids: torch.Tensor, names: Sequence[str], memory: torch.Tensor, stopping_criteria: Sequence[Any]
    ) -> torch.Tensor | None:
        """Read what no kept conversation has, in chunks; the last hidden state of each row, None when stopped."""
        start = self._recall(ids[0].tolist(), names, memory)
        for begin in range(start, ids.shape[1], CHUNK):
            if _stopped(stopping_criteria, ids):
                return None
            hidden = self.read(ids[:, begin : begin + CHUNK], names, memory, begin)[:, -1]
        return hidden

    def _recall(self, ids: list[int], names: Sequence[str], memory: torch.Tensor) -> int:
        """Copy what was read before of these very ids under these adapters; returns how many tokens that is.

        The last token is always read anew, as its logits are wanted. Rows advance together: the least counts.
        """
        best = []
        for name in names:
            shared = [(_common(kept.ids, ids), kept) for kept in self.kept if kept.adapter == name]
            best.append(max(shared, key=lambda pair: pair[0], default=(0, None)))
        known = min(*(count for count, _ in best), len(ids) - 1)
        for row, (_, kept) in enumerate(best):
            if kept and known:
                memory[:, :, row, :, :known] = kept.memory[:, :, :, :known]
        return known

    def _keep(self, ids: torch.Tensor, names: Sequence[str], memory: torch.Tensor) -> None:
        """Keep each row for its next turn, in place of what it continues; the last token was drawn, not read."""
        for row, (name, whole) in enumerate(zip(names, ids[:, :-1].tolist(), strict=True)):
            for old in [kept for kept in self.kept if kept.adapter == name and whole[: len(kept.ids)] == kept.ids]:
                self.kept.remove(old)
            self.kept.append(Kept(name, whole, memory[:, :, row, :, : len(whole)].clone()))


def draw(logits: torch.Tensor, ids: torch.Tensor, config: Any) -> torch.Tensor:
    """The next token of each row, of shape (rows,), from logits of shape (rows, vocabulary) after ids (rows, n).

    Repetition penalty, temperature, top_k and top_p in transformers' order; top_p among the k alone, as there, but
    without sorting the whole vocabulary.
    """
    said = logits.gather(1, ids)
    penalty = config.repetition_penalty
    logits = logits.scatter(1, ids, torch.where(said < 0, said * penalty, said / penalty))
    if not config.do_sample:
        return logits.argmax(-1)
    best = logits.topk(min(config.top_k, logits.shape[-1]))
    chances = functional.softmax(best.values / config.temperature, -1)
    kept = chances * (chances.cumsum(-1) - chances < config.top_p)
    return best.indices.gather(1, torch.multinomial(kept, 1)).flatten()


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: each half of a head, of shape (…, head size), turned by its angles."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _stopped(criteria: Sequence[Any], ids: torch.Tensor) -> bool:
    return any(bool(criterion(ids, None).all()) for criterion in criteria)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)


@contextmanager
def _opened(folder: Path) -> Iterator[Tensors]:
    """All tensors of a base folder by name, mapped into memory and as they are stored."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        yield {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
