"""Qwen2's forward for a few rows at a time, with a cache of conversations and the draw of the next token on the GPU.

transformers' modeling_qwen2.py and PEFT's LoRA are the originals. All adapters stay in memory: their first halves are
further rows of the weights, so that a product reads both at once, and each conversation takes its own second halves.
A step of given size is recorded once as a CUDA graph; choosing another adapter is another number in a tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from chat import kernels
from chat.engine import Sampling
from chat.kernels import Lora, State

Tensor = torch.Tensor
DECODE = (1, 2, 4, 8, 16, 32)  # conversations that go on together, each recorded apart
FULL = "full_attention"
READ = (32, 64, 128, 256, 512)  # tokens of a prompt that are read at once


class Group:
    """Linear layers that read the same input: one weight with all their rows, then all adapters' first halves."""

    def __init__(self, layers: Sequence[Any], adapters: Sequence[str], parts: int = 1) -> None:
        plain = [getattr(layer, "base_layer", layer) for layer in layers]
        ends = torch.tensor([layer.out_features for layer in plain]).cumsum(0).tolist()
        first, second = _halves(layers, plain, adapters)
        self.weight = torch.cat([*(layer.weight.data for layer in plain), first])
        for layer, end in zip(plain, ends, strict=True):
            layer.weight.data = self.weight[end - layer.out_features : end]
        biases = [layer.bias for layer in plain]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        self.lora, self.parts = Lora(second, tuple(ends)), parts

    def __call__(self, x: Tensor) -> Tensor:
        """The product with all rows, (S, N, O + A·G·R)."""
        return kernels.product(x, self.weight, self.parts)


def _halves(layers: Sequence[Any], plain: Sequence[Any], adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All first halves (A·G·R, K) and second halves (A, O, R), zero where an adapter leaves a layer alone."""
    rank = max((layer.r.get(name, 0) for layer in layers if hasattr(layer, "r") for name in adapters), default=0)
    weight, outs = plain[0].weight, [layer.out_features for layer in plain]
    first = weight.new_zeros(len(adapters), len(layers), rank, plain[0].in_features)
    second = weight.new_zeros(len(adapters), sum(outs), rank)
    for a, name in enumerate(adapters):
        for g, (layer, rows) in enumerate(zip(layers, second[a].split(outs), strict=True)):
            if getattr(layer, "use_dora", {}).get(name):
                raise RuntimeError(f"the decoder knows no DoRA, and {name} is one")
            if name in getattr(layer, "lora_A", ()):
                own = layer.r[name]
                first[a, g, :own] = layer.lora_A[name].weight.data
                rows[:, :own] = layer.lora_B[name].weight.data * layer.scaling[name]
    return first.flatten(0, 2), second


class Layer:
    """One decoder layer and its part of the cache."""

    def __init__(self, layer: Any, adapters: Sequence[str], slots: int, length: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], adapters)
        self.out = Group([attention.o_proj], adapters)
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], adapters)
        self.down = Group([mlp.down_proj], adapters, parts=2)
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        cache = self.qkv.weight.new_zeros(2, slots, kv_heads, length, attention.head_dim)
        self.keys, self.values = cache

    def __call__(self, x: Tensor, n: Tensor, rows: "Rows", state: State, turns: Tensor, after: Any) -> Any:
        """x (N, hidden) and its norm through the layer; `after` is the norm that follows."""
        who, slots, positions = state.who, rows.slots, rows.positions
        q = kernels.turn_and_keep(
            self.qkv(n), self.qkv.bias, self.qkv.lora, who, slots, positions, turns, self.keys, self.values, self.heads
        )  # fmt: skip
        o = self.out(kernels.attend(q, self.keys, self.values, slots, positions))
        x, n = _add_norm(x, o, self.out.lora, who, slots, self.norms[1])
        s = kernels.swiglu(self.gate_up(n), self.gate_up.lora, who, slots, x.dtype)
        return _add_norm(x, self.down(s), self.down.lora, who, slots, after)


def _add_norm(x: Tensor, y: Tensor | None, lora: Lora | None, who: Tensor, slots: Tensor, norm: Any) -> Any:
    return kernels.add_norm(x, y, lora, who, slots, norm.weight, norm.variance_epsilon)


def _require_plain(config: Any) -> None:
    """Raise RuntimeError for what would be computed wrongly here."""
    plain = config.model_type == "qwen2" and config.hidden_act == "silu" and set(config.layer_types) == {FULL}
    if getattr(config, "quantization_config", None):
        raise RuntimeError("the decoder multiplies weights of 16 bits, and this base has fewer")
    if not plain or config.rope_parameters["rope_type"] != "default":
        raise RuntimeError(f"the decoder knows Qwen2 with full attention, not this {config.model_type}")


@dataclass(frozen=True)
class Rows:
    """The tokens of a step, on the device; those of a prompt stand in order."""

    ids: Tensor
    """(N,)"""
    positions: Tensor
    """(N,) in their conversations."""
    slots: Tensor
    """(N,) which conversations."""


class Decoder:
    """`slots` conversations of at most `length` tokens, in steps. One thread at a time."""

    def __init__(self, model: Any, adapters: Sequence[str], slots: int, length: int) -> None:
        qwen = model.get_base_model() if hasattr(model, "get_base_model") else model
        _require_plain(qwen.config)
        self.device, self.dtype = qwen.device, qwen.dtype
        self.slots, self.length = self._room(qwen.config, slots, length), length
        self.embed, self.norm, self.head = qwen.model.embed_tokens.weight, qwen.model.norm, qwen.lm_head.weight
        slots = self.slots
        self.layers = [Layer(layer, adapters, slots + 1, length) for layer in qwen.model.layers]
        angles = qwen.model.rotary_emb(self.embed.new_zeros(1).float(), torch.arange(length, device=self.device)[None])
        self.turns = torch.stack([part[0].chunk(2, dim=-1)[0].float() for part in angles]).contiguous()
        every = {"device": self.device, "dtype": torch.int64}
        self.state = State(
            who=torch.full((slots + 1,), -1, device=self.device, dtype=torch.int32),
            last=torch.zeros(slots + 1, **every), position=torch.zeros(slots + 1, **every),
            seen=torch.zeros(slots + 1, len(self.head), device=self.device, dtype=torch.uint8),
            law=torch.ones(slots + 1, 4, device=self.device), seed=torch.zeros(slots + 1, **every),
        )  # fmt: skip
        self.top_k = [1] * (slots + 1)
        self.graphs: dict[tuple[str, int, int], tuple[list[Tensor], Any, Tensor]] = {}
        self.pool: Any = None

    def _room(self, config: Any, slots: int, length: int) -> int:
        """As many conversations as the GPU has memory for, with the one for padding and some air to compute in."""
        if self.device.type != "cuda":
            return slots
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * config.num_key_value_heads * size * length * self.dtype.itemsize
        room = int(0.8 * torch.cuda.mem_get_info()[0] // each) - 1
        if room < 1:
            raise RuntimeError("the GPU has no memory left for a second conversation")
        return min(slots, room)

    @torch.inference_mode()
    def begin(self, slot: int, ids: Sequence[int], known: int, adapter: int, sampling: Sampling, seed: int) -> Tensor:
        """Read a prompt of which the cache knows the first tokens already; draw the first token of the reply, (1,)."""
        law = [sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty]
        prompt = torch.tensor(ids, device=self.device)
        self.state.who[slot], self.state.seed[slot] = adapter, seed
        self.state.law[slot] = torch.tensor(law, device=self.device)
        self.top_k[slot] = sampling.top_k
        for start in range(known, len(ids), READ[-1]):
            self.state.seen[slot] = 0  # what was drawn after the part before was not said
            self.state.seen[slot, prompt] = 1
            part = prompt[start : start + READ[-1]]
            last = torch.tensor([len(part) - 1], device=self.device)
            tokens = self._step("read", [*self._padded(part, start, slot), last], self._candidates([slot]))
        return tokens

    @torch.inference_mode()
    def go_on(self, slots: Sequence[int]) -> Tensor:
        """The next token of each of these conversations, (len(slots),)."""
        room = next(size for size in DECODE if size >= len(slots))
        padded = torch.tensor([*slots, *[self.slots] * (room - len(slots))], device=self.device)
        return self._step("decode", [padded], self._candidates(slots))[: len(slots)]

    def _candidates(self, slots: Sequence[int]) -> int:
        widest = max(self.top_k[slot] for slot in slots)
        return next(count for count in kernels.CANDIDATES if count >= widest)

    def rehearsals(self) -> list[Callable[[], Any]]:
        """Record each step there is, one by one: most is done once, at the first start on a machine."""
        pad = torch.full((READ[-1],), self.slots, device=self.device)
        zero = torch.zeros_like(pad)
        steps = [("decode", [pad[:size]]) for size in DECODE if size < 2 * self.slots]
        steps += [("read", [zero[:size], zero[:size], pad[:size], zero[:1]]) for size in READ]
        step = torch.inference_mode()(self._step)
        return [partial(step, kind, given, count) for count in kernels.CANDIDATES for kind, given in steps]

    def _padded(self, ids: Tensor, start: int, slot: int) -> list[Tensor]:
        spare = next(size for size in READ if size >= len(ids)) - len(ids)
        positions = torch.arange(start, start + len(ids), device=self.device)
        slots = torch.full_like(ids, slot)
        pad = torch.nn.functional.pad
        return [pad(ids, (0, spare)), pad(positions, (0, spare)), pad(slots, (0, spare), value=self.slots)]

    def _step(self, kind: str, given: list[Tensor], count: int) -> Tensor:
        if self.device.type != "cuda":
            return self._run(kind, given, count)
        key = (kind, len(given[0]), count)
        if key not in self.graphs:
            self.graphs[key] = self._record(kind, [tensor.clone() for tensor in given], count)
        static, graph, tokens = self.graphs[key]
        for ours, theirs in zip(static, given, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return tokens.clone()

    def _record(self, kind: str, given: list[Tensor], count: int) -> tuple[list[Tensor], Any, Tensor]:
        saved = [tensor.clone() for tensor in (self.state.last, self.state.position)]
        given[-1 if kind == "decode" else 2].fill_(self.slots)  # a rehearsal, on the padding's conversation
        self._run(kind, given, count)  # outside a graph: kernels are compiled, libraries make their workspaces
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            tokens = self._run(kind, given, count)
        self.state.last.copy_(saved[0])
        self.state.position.copy_(saved[1])
        return given, graph, tokens

    def _run(self, kind: str, given: list[Tensor], count: int) -> Tensor:
        if kind == "read":
            ids, positions, slots, picked = given
        else:
            (slots,) = given
            ids, picked = self.state.last[slots], None
            positions = torch.where(slots < self.slots, self.state.position[slots], 0)  # padding stays where it is
        return self._forward(Rows(ids, positions, slots), picked, count)

    def _forward(self, rows: Rows, picked: Tensor | None, count: int) -> Tensor:
        x, n = _add_norm(self.embed[rows.ids], None, None, self.state.who, rows.slots, self.layers[0].norms[0])
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            after = following.norms[0] if following else self.norm
            x, n = layer(x, n, rows, self.state, self.turns, after)
        slots, positions = rows.slots, rows.positions
        if picked is not None:
            n, slots, positions = n[picked], slots[picked], positions[picked]
        return kernels.choose(kernels.product(n, self.head), self.state, slots, positions, self.dtype, count)
