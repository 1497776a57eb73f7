"""Qwen2's forward for a few rows at a time, with a KV cache of conversations and the draw of the next token on the GPU.

transformers' modeling_qwen2.py and PEFT's LoRA are the originals. All adapters stay in memory: their A are further rows
of the weights, so that one product reads both, and each conversation takes its own B. A step of a given size is
recorded once as a CUDA graph; choosing another adapter is another number in a tensor.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from qwen2 import decode_kernels as kernels
from qwen2.decode_kernels import LoraB, SlotState
from qwen2.graphs import GraphRecorder
from qwen2.kernels import Tensor, fuse
from qwen2.rope import rope_cache
from qwen2.supported import require_supported

DECODE_SIZES = (1, 2, 4, 8, 16, 32)  # conversations that decode together, each recorded apart
PREFILL_SIZES = (32, 64, 128, 256, 512)  # tokens of a prompt that are read at once


class SamplingParams(NamedTuple):
    """How a conversation's tokens are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


class FusedLinear:
    """Linear layers that read the same input: one weight with all their rows, then all adapters' A."""

    def __init__(self, layers: Sequence[Any], adapters: Sequence[str], splits: int = 1) -> None:
        plain = [getattr(layer, "base_layer", layer) for layer in layers]
        outs = [layer.out_features for layer in plain]
        rank = max((layer.r.get(name, 0) for layer in layers if hasattr(layer, "r") for name in adapters), default=0)
        # A (A, G, R, K) and B (A, O, R) of all adapters: zero where one leaves a layer alone, or has a smaller rank.
        a = plain[0].weight.new_zeros(len(adapters), len(layers), rank, plain[0].in_features)
        b = plain[0].weight.new_zeros(len(adapters), sum(outs), rank)
        for n, name in enumerate(adapters):
            for g, (layer, rows) in enumerate(zip(layers, b[n].split(outs), strict=True)):
                if name in getattr(layer, "lora_A", ()):
                    own = layer.r[name]
                    a[n, g, :own] = layer.lora_A[name].weight.data
                    rows[:, :own] = layer.lora_B[name].weight.data * layer.scaling[name]
        self.weight, self.bias = fuse(plain, a.flatten(0, 2))
        self.lora, self.splits = LoraB(b, tuple(accumulate(outs))), splits

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, K) by all rows, (S, N, O + A·G·R)."""
        return kernels.linear(x, self.weight, self.splits)


class Rows(NamedTuple):
    """The tokens of a step and their conversations; those of a prompt stand in order."""

    slots: Tensor  # (N,)
    positions: Tensor  # (N,) in their conversations
    lora_ids: Tensor  # (C,) of the slots
    rope_cache: Tensor  # (2, length, D/2)


class Layer:
    """One decoder layer and its part of the KV cache."""

    def __init__(self, layer: Any, adapters: Sequence[str], slots: int, length: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.qkv = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], adapters)
        self.out = FusedLinear([attention.o_proj], adapters)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], adapters)
        self.down = FusedLinear([mlp.down_proj], adapters, splits=2)
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.keys, self.values = self.qkv.weight.new_zeros(2, slots, kv_heads, length, attention.head_dim)

    def __call__(self, x: Tensor, n: Tensor, rows: Rows, next_norm: Any) -> tuple[Tensor, Tensor]:
        """x (N, hidden) and its norm n through the layer: the sum and its norm by the layer that follows."""
        slots, positions, lora_ids, rope = rows
        q = kernels.apply_rope_and_cache_kv(
            self.qkv(n), self.qkv.bias, self.qkv.lora, lora_ids, slots, positions, rope, self.keys, self.values,
            self.heads,
        )  # fmt: skip
        o = self.out(kernels.attention(q, self.keys, self.values, slots, positions))
        x, n = _add_rms_norm(x, o, self.out.lora, rows, self.norms[1])
        s = kernels.swiglu(self.gate_up(n), self.gate_up.lora, lora_ids, slots, x.dtype)
        return _add_rms_norm(x, self.down(s), self.down.lora, rows, next_norm)


def _add_rms_norm(x: Tensor, y: Tensor | None, lora: LoraB | None, rows: Rows, norm: Any) -> tuple[Tensor, Tensor]:
    return kernels.add_rms_norm(x, y, lora, rows.lora_ids, rows.slots, norm.weight, norm.variance_epsilon)


class Decoder:
    """`num_slots` conversations of at most `length` tokens, in steps. One thread at a time.

    Raises RuntimeError for a model or an adapter that is not computed here, or when the GPU has no room for one slot.
    """

    def __init__(self, model: Any, adapters: Sequence[str], num_slots: int, length: int) -> None:
        qwen = model.get_base_model() if hasattr(model, "get_base_model") else model
        require_supported(qwen.config, {name: model.peft_config[name] for name in adapters})
        self.device, self.dtype = qwen.device, qwen.dtype
        self.num_slots, self.length = self._fitting(qwen.config, num_slots, length), length
        self.embed, self.norm, self.head = qwen.model.embed_tokens.weight, qwen.model.norm, qwen.lm_head.weight
        slots = self.num_slots + 1  # the last one is for padding
        self.layers = [Layer(layer, adapters, slots, length) for layer in qwen.model.layers]
        self.rope_cache = rope_cache(qwen, length)
        zeros = torch.zeros(slots, device=self.device, dtype=torch.int64)
        seen = torch.zeros(slots, len(self.head), device=self.device, dtype=torch.uint8)
        params = torch.ones(slots, len(SamplingParams._fields), device=self.device)
        self.state = SlotState(zeros.int() - 1, zeros, zeros.clone(), seen, params, zeros.clone())
        self.top_k = [1] * slots
        self.recorder = GraphRecorder(self.device)

    def _fitting(self, config: Any, slots: int, length: int) -> int:
        """As many slots as the GPU has memory for, with the one for padding and some air to compute in."""
        if self.device.type != "cuda":
            return slots
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * config.num_key_value_heads * size * length * self.dtype.itemsize
        fitting = int(0.8 * torch.cuda.mem_get_info()[0] // each) - 1
        if fitting < 1:
            raise RuntimeError("the GPU has no memory left for a second conversation")
        return min(slots, fitting)

    @torch.inference_mode()
    def prefill(
        self, slot: int, ids: Sequence[int], num_cached: int, lora_id: int, params: SamplingParams, seed: int
    ) -> Tensor:
        """Read a prompt, whose first `num_cached` tokens the slot's cache has; draw the reply's first token, (1,).

        lora_id is the adapter's number among those given at the start, -1 for none.
        """
        prompt = torch.tensor(ids, device=self.device)
        self.state.lora_ids[slot], self.state.seed[slot], self.top_k[slot] = lora_id, seed, params.top_k
        self.state.sampling_params[slot] = torch.tensor(params, device=self.device)
        for start in range(num_cached, len(ids), PREFILL_SIZES[-1]):
            self.state.seen[slot] = 0  # what was drawn after the part before is no token of the reply
            self.state.seen[slot, prompt] = 1
            part = prompt[start : start + PREFILL_SIZES[-1]]
            size = next(size for size in PREFILL_SIZES if size >= len(part))
            pad = partial(functional.pad, pad=(0, size - len(part)))
            slots = pad(torch.full_like(part, slot), value=self.num_slots)
            positions = torch.arange(start, start + len(part), device=self.device)
            last = torch.tensor([len(part) - 1], device=self.device)
            tokens = self._step(self._prefill, self._candidates([slot]), slots, pad(part), pad(positions), last)
        return tokens

    @torch.inference_mode()
    def decode_step(self, slots: Sequence[int]) -> Tensor:
        """The next token of each of these conversations, (len(slots),)."""
        size = next(size for size in DECODE_SIZES if size >= len(slots))
        padded = torch.tensor([*slots, *[self.num_slots] * (size - len(slots))], device=self.device)
        return self._step(self._decode, self._candidates(slots), padded)[: len(slots)]

    def capture_graphs(self) -> Iterator[None]:
        """Record each step there is, one for each `next`: most is done once, at the first start on a machine."""
        pad = torch.full((PREFILL_SIZES[-1],), self.num_slots, device=self.device)
        zero = torch.zeros_like(pad)
        steps: list[tuple[Any, ...]] = [(self._decode, pad[:n]) for n in DECODE_SIZES if n < 2 * self.num_slots]
        steps += [(self._prefill, pad[:n], zero[:n], zero[:n], zero[:1]) for n in PREFILL_SIZES]
        for count in kernels.CANDIDATES:
            for run, *inputs in steps:
                with torch.inference_mode():
                    self._step(run, count, *inputs)
                yield

    def _candidates(self, slots: Sequence[int]) -> int:
        widest = max(self.top_k[slot] for slot in slots)
        return next(count for count in kernels.CANDIDATES if count >= widest)

    def _step(self, step: Any, count: int, slots: Tensor, *more: Tensor) -> Tensor:
        def warm_up(slots: Tensor, *more: Tensor) -> None:
            step(count, slots.fill_(self.num_slots), *more)  # on the padding's slot, which no conversation reads

        key = (step.__name__, len(slots), count)
        tokens: Tensor = self.recorder(key, partial(step, count), [slots, *more], warm_up)
        return tokens.clone()

    def _prefill(self, count: int, slots: Tensor, ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        return self._forward(count, slots, ids, positions, last)

    def _decode(self, count: int, slots: Tensor) -> Tensor:
        positions = torch.where(slots < self.num_slots, self.state.position[slots], 0)  # padding stays where it is
        return self._forward(count, slots, self.state.last_token[slots], positions)

    def _forward(
        self, count: int, slots: Tensor, ids: Tensor, positions: Tensor, logit_rows: Tensor | None = None
    ) -> Tensor:
        """The next tokens of all rows, or of `logit_rows`, drawn from at most `count` candidates."""
        rows = Rows(slots, positions, self.state.lora_ids, self.rope_cache)
        norms = [*(layer.norms[0] for layer in self.layers), self.norm]
        x, n = _add_rms_norm(self.embed[ids], None, None, rows, norms[0])
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            x, n = layer(x, n, rows, next_norm)
        if logit_rows is not None:
            n, slots, positions = n[logit_rows], slots[logit_rows], positions[logit_rows]
        return kernels.sample(kernels.linear(n, self.head), self.state, slots, positions, self.dtype, count)
