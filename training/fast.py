"""The fast profile: the Trainer's loop around a step written out by hand and recorded as CUDA graphs.

The step is Qwen2's forward and backward for one flattened batch (transformers' modeling_qwen2.py is the original), with
only what a LoRA needs: no gradient of frozen weights, attention within each row, the head on learned tokens only, the
last token of a row left out, as nothing is predicted from it. Rows, order, loss, optimiser and schedule are the
Trainer's own; dropout has the same law with other draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from training import kernels, ranks
from training.tokens import IGNORED

Tensor = torch.Tensor
STRIDE = 32  # tokens: a batch is padded to a multiple, and each such length is recorded once
SHARES = (0.3125, 0.375, 0.4375, 0.5, 1.0)  # of a batch's tokens that are learned; each share is recorded apart
SALTS = 16  # dropout draws apart of one layer


class Group:
    """Linear layers that read the same input, as one product: their weights become views of one tensor."""

    def __init__(self, layers: Sequence[Any], salt: int) -> None:
        self.salt = salt
        self.count = len(layers)
        self.outs = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.base_layer.weight.data for layer in layers])
        for layer, rows in zip(layers, self.weight.split(self.outs), strict=True):
            layer.base_layer.weight.data = rows
        biases = [layer.base_layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        self.scale = layers[0].scaling["default"]
        self.dropout = getattr(layers[0].lora_dropout["default"], "p", 0.0)
        self.parameters = [layer.lora_A["default"].weight for layer in layers]
        self.parameters += [layer.lora_B["default"].weight for layer in layers]
        self.across: Tensor  # (R, out): B of this batch, where a norm reads it rank by rank

    def bind(self, values: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Take views of the step's flat buffers: all A, then all B."""
        self.a, self.da = (_joined(part[: self.count]) for part in (values, grads))  # (G·R, in)
        self.b, self.db = (_joined(part[self.count :]) for part in (values, grads))  # (out, R)

    def lend(self, zeros: Tensor) -> None:
        """Take (2, T, G·R) in fp32 for a batch: the LoRA's narrow middle, and its gradient."""
        self.middle, self.dmiddle = zeros

    def down(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """The LoRA's narrow middle, (T, G·R), and what dropout kept."""
        h = self.middle[: len(x)]
        return h, kernels.narrow(x, self.a, h, self.count, seed, self.salt, self.dropout, self.scale)

    def wide(self, x: Tensor) -> Tensor:
        """x (T, in) through all layers, still without their LoRA: (T, out)."""
        y: Tensor = functional.linear(x, self.weight, self.bias)
        return y

    def cross(self, dy: Tensor, h: Tensor) -> Tensor:
        """The gradient of the LoRA's narrow middle, (T, G·R); adds that of B to the step's buffer."""
        dh: Tensor = self.dmiddle[: len(dy)]
        kernels.cross(dy, h, self.b, dh, self.db, self.outs)
        return dh

    def back(self, dy: Tensor, h: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        """dx, from dy (T, out); adds the gradients of A and B to the step's buffers."""
        dx = dy @ self.weight
        kernels.widen(x, self.a, self.cross(dy, h), dx, self.da, kept, self.dropout, self.scale)
        return dx


def _joined(views: Sequence[Tensor]) -> Tensor:
    """Neighbouring views of one buffer as one view."""
    rows = sum(len(view) for view in views)
    return views[0].as_strided((rows, views[0].shape[1]), views[0].stride())


@dataclass(frozen=True)
class Rows:
    """What a step reads: one flattened, padded batch. All tensors lie on the model's device."""

    input_ids: Tensor
    """(T,)"""
    turns: Tensor
    """(2, T, head/2) in fp32: cosines and sines of each token's position in its row."""
    first: Tensor
    """(T,) int32: where the row of each token starts; the padding is a row too."""
    last: Tensor
    """(T,) int32: where it ends."""
    picked: Tensor
    """(L,) tokens from which a learned one is predicted, padded."""
    targets: Tensor
    """(L,) what is predicted, IGNORED in the padding."""
    items: Tensor
    """() learned tokens of the whole optimiser step."""


class Layer:
    """One decoder layer, forward and backward, without autograd."""

    def __init__(self, layer: Any, number: int) -> None:
        attention, mlp, salt = layer.self_attn, layer.mlp, number * SALTS
        self.head = attention.head_dim
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], salt)
        self.out = Group([attention.o_proj], salt + 4)
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], salt + 5)
        self.down = Group([mlp.down_proj], salt + 8)
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm,
                                                                       layer.post_attention_layernorm)]  # fmt: skip
        self.groups = (self.qkv, self.out, self.gate_up, self.down)

    def forward(
        self, x: Tensor, added: kernels.Added | None, rows: Rows, seed: Tensor, last: bool
    ) -> tuple[Tensor, kernels.Added, list[Any]]:
        """x (T, hidden), with what the layer before adds to it, through this one; after the `last` only picked tokens.

        What this one adds comes apart, and what the way back needs.
        """
        x, n1, r1 = kernels.add_norm(x, added, *self.norms[0])
        h1, k1 = self.qkv.down(n1, seed)
        qkv = self.qkv.wide(n1)
        kernels.turn_(qkv, h1, self.qkv.b, self.qkv.outs, rows.turns)
        q, k, v = (part.unflatten(1, (-1, self.head)) for part in qkv.split(self.qkv.outs, 1))
        whole, state = kernels.attend(q, k, v, rows.first)
        a, x2 = (t[rows.picked] if last else t for t in (whole.flatten(1), x))
        h2, k2 = self.out.down(a, seed)
        middle, n2, r2 = kernels.add_norm(x2, (self.out.wide(a), h2, self.out.across), *self.norms[1])
        h3, k3 = self.gate_up.down(n2, seed)
        wide = self.gate_up.wide(n2)
        s = kernels.swiglu(wide, h3, self.gate_up.b)
        h4, k4 = self.down.down(s, seed)
        kept = [x, n1, r1, h1, k1, q, k, v, whole, state, a, h2, k2, middle, n2, r2, h3, k3, wide, h4, k4]
        return middle, (self.down.wide(s), h4, self.down.across), kept

    def backward(self, dy: Tensor, kept: list[Any], rows: Rows, last: bool) -> Tensor:
        """dx, from dy (T, hidden), or of the `last` layer from that of the picked tokens."""
        x, n1, r1, h1, k1, q, k, v, whole, state, a, h2, k2, middle, n2, r2, h3, k3, wide, h4, k4 = kept
        up, down = self.gate_up, self.down
        dwide = kernels.swiglu_back(
            dy @ down.weight, wide, h3, up.b, down.a, down.cross(dy, h4), down.da, k4, down.dropout, down.scale
        )
        dn2 = up.back(dwide, h3, n2, k3)
        dx = kernels.norm_back(dn2, middle, r2, self.norms[1][0], onto=dy)
        da = self.out.back(dx, h2, a, k2)
        if last:
            da, dx = (t.new_zeros(len(x), t.shape[1]).index_add_(0, rows.picked, t) for t in (da, dx))
        dqkv = kernels.attend_back(da, q, k, v, whole, state, rows.first, rows.last, rows.turns)
        dn1 = self.qkv.back(dqkv, h1, n1, k1)
        return kernels.norm_back(dn1, x, r1, self.norms[0][0], onto=dx)


class Step:
    """Loss and gradients of a batch. On a GPU each shape is recorded at its first batch and replayed after that."""

    def __init__(self, model: PeftModel, longest: int) -> None:
        qwen: Any = model.get_base_model()
        self.embed, self.norm, self.head = qwen.model.embed_tokens, qwen.model.norm, qwen.lm_head
        everywhere = torch.arange(max(longest, STRIDE), device=qwen.device)[None]
        angles = qwen.model.rotary_emb(torch.zeros(1, device=qwen.device), everywhere)
        self.turns = torch.stack([part[0].chunk(2, dim=-1)[0] for part in angles])
        self.layers = [Layer(layer, number) for number, layer in enumerate(qwen.model.layers)]
        groups = self.groups = [group for layer in self.layers for group in layer.groups]
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        self.device, self.dtype = qwen.device, qwen.dtype
        sizes = [parameter.numel() for parameter in self.parameters]
        values = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device)  # what multiplies: in the base's type
        grads = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        self.values, self.grads = (
            [view.view_as(p) for view, p in zip(flat.split(sizes), self.parameters, strict=True)]
            for flat in (values, grads)
        )
        self.flat_grads = grads
        views = zip(self.values, self.grads, strict=True)
        for group in groups:
            value, grad = zip(*[next(views) for _ in group.parameters], strict=True)
            group.bind(value, grad)
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.graphs: dict[tuple[int, ...], tuple[Rows, Any]] = {}
        self.pool: Any = None

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], items: int, seed: int) -> Tensor:
        """The summed loss of a batch of `collate` over `items`; gradients are left on the LoRA's parameters."""
        self.seed.fill_(seed)
        if self.parameters[0].grad is None:  # a new optimiser step
            self.flat_grads.zero_()
        shape = (len(batch["input_ids"]), len(batch["picked"]))
        if self.device.type != "cuda":
            self._run(self._rows(batch, items))
        else:
            self._replay(shape, batch, items)
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()

    def _rows(self, batch: dict[str, Tensor], items: int) -> Rows:
        on = {name: batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "first", "last", "picked")}
        turns = self.turns[:, batch["position_ids"].to(self.device, non_blocking=True)]
        targets = batch["targets"].to(self.device, non_blocking=True)
        count = torch.full((), items, dtype=torch.float32, device=self.device)
        return Rows(turns=turns, targets=targets, items=count, **on)

    def _replay(self, shape: tuple[int, ...], batch: dict[str, Tensor], items: int) -> None:
        given = self._rows(batch, items)
        if shape not in self.graphs:
            self.graphs[shape] = given, self._record(given)
        static, graph = self.graphs[shape]
        for name, tensor in vars(static).items():
            if isinstance(tensor, Tensor) and tensor is not getattr(given, name):
                tensor.copy_(getattr(given, name))
        graph.replay()

    def _record(self, rows: Rows) -> Any:
        if self.pool is None:  # once outside a graph: kernels are compiled, libraries make their workspaces
            self.pool = torch.cuda.graph_pool_handle()
            self._run(rows)
            self.flat_grads.zero_()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are held to the rules of recording: NCCL's watchdog looks at events on another.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._run(rows)
        return graph

    def _run(self, rows: Rows) -> None:
        """Forward and backward; the loss and the gradients are left in the step's buffers."""
        torch._foreach_copy_(self.values, self.parameters)
        self._lend(len(rows.input_ids))
        self._lay_across()
        x = self.embed(rows.input_ids)
        added, memory = None, []
        for layer in self.layers:
            x, added, kept = layer.forward(x, added, rows, self.seed, last=layer is self.layers[-1])
            memory.append(kept)
        d = self._loss(x, added, rows)
        for layer in reversed(self.layers):
            d = layer.backward(d, memory.pop(), rows, last=layer is self.layers[-1])

    def _lend(self, tokens: int) -> None:
        """The narrow middles of all groups and their gradients are sums: one buffer, zeroed at once."""
        sizes = [2 * tokens * len(group.a) for group in self.groups]
        zeros = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        for group, part in zip(self.groups, zeros.split(sizes), strict=True):
            group.lend(part.view(2, tokens, -1))

    def _lay_across(self) -> None:
        """B of the layers whose LoRA a norm adds, (R, hidden)."""
        added = [group for layer in self.layers for group in (layer.out, layer.down)]
        for group, across in zip(added, torch.stack([group.b for group in added]).mT.contiguous(), strict=True):
            group.across = across

    def _loss(self, x: Tensor, added: kernels.Added | None, rows: Rows) -> Tensor:
        """Cross-entropy on the picked tokens, x (L, hidden) with what the last layer adds; returns dx."""
        x, normed, rms = kernels.add_norm(x, added, self.norm.weight, self.norm.variance_epsilon)
        logits = self.head(normed)
        losses = kernels.cross_entropy_(logits, rows.targets, rows.items)
        self.loss.copy_(losses.sum())
        return kernels.norm_back(logits @ self.head.weight, x, rms, self.norm.weight)


def seed(base: int, step: int, place: int = 0, count: int = 1) -> int:
    """What the dropout of a step is drawn from, apart for each process; the layers take what follows it, apart."""
    return ((base % 2**20) << 40) + ((step * count + place) << 12)


def padded(count: int) -> int:
    """The next multiple of STRIDE."""
    return math.ceil(count / STRIDE) * STRIDE


def collate(features: Sequence[dict[str, list[int]]], place: int = 0, count: int = 1) -> dict[str, Any]:
    """Rows, or the share of them of one process of `count`, as one padded batch for `Step`.

    It holds input_ids, position_ids, first, last, picked and targets of the share. Of all the rows, `tokens` says how
    many there are in them, `learned` how many of these are learned.
    """
    known = {
        "tokens": sum(len(row["input_ids"]) for row in features),
        "learned": sum(len(row["labels"]) - 1 - row["labels"][1:].count(IGNORED) for row in features),
    }
    return _join(ranks.deal(features, place, count)) | known


def _join(features: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Each row without its last token, as nothing is predicted from that; of no rows at all, only padding."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    first: list[int] = []
    last: list[int] = []
    for row in features:
        ids += row["input_ids"][:-1]
        labels += row["labels"][1:]
        count = len(row["input_ids"]) - 1
        positions += range(count)
        first += [len(ids) - count] * count
        last += [len(ids)] * count
    tokens = padded(max(len(ids), 1))
    learned = [at for at, label in enumerate(labels) if label != IGNORED]
    room = next(room for share in SHARES if (room := padded(math.ceil(tokens * share))) >= len(learned))
    padding, spare = tokens - len(ids), room - len(learned)
    return {
        "input_ids": torch.tensor(ids + [0] * padding),
        "position_ids": torch.tensor([*positions, *range(padding)]),
        "first": torch.tensor(first + [len(ids)] * padding, dtype=torch.int32),
        "last": torch.tensor(last + [tokens] * padding, dtype=torch.int32),
        "picked": torch.tensor(learned + [0] * spare),
        "targets": torch.tensor([labels[at] for at in learned] + [IGNORED] * spare),
    }
