"""The fast profile's step, written out by hand and recorded as CUDA graphs; training/fast_trainer.py calls it.

It is Qwen2's forward and backward pass for one packed batch (transformers' modeling_qwen2.py is the original), with
only what a LoRA needs: no gradient of frozen weights, attention within each row, logits of target tokens only, the last
token of a row left out, as nothing is predicted from it. The loss is the sum of the target tokens' cross-entropy over
`num_items_in_batch`, the target tokens of the whole optimiser step. Dropout has the same distribution with other draws.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn import functional

from qwen2 import IGNORE_INDEX
from qwen2 import training_kernels as kernels
from qwen2.graphs import GraphRecorder
from qwen2.kernels import Tensor, fuse
from qwen2.rope import rope_cache
from qwen2.supported import CAN_TRAIN, can_train, require_supported
from qwen2.training_kernels import LoraOutput

STRIDE = 32  # tokens: a batch is padded to a multiple, and each such length is recorded once
SHARES = (0.3125, 0.375, 0.4375, 0.5, 1.0)  # of a batch's tokens that are targets; each share is recorded apart
SALTS = 16  # dropout draws apart of one layer


class LinearInput(NamedTuple):
    """What the backward pass of a FusedLinear needs."""

    x: Tensor  # (T, in)
    h: Tensor  # (T, G·R) in fp32: dropout(x) by A
    kept: Tensor  # what dropout kept, as `kernels.lora_a` gives it


class FusedLinear:
    """Linear layers that read the same input, with their LoRA; one weight of which the layers keep views."""

    h: Tensor  # (T, G·R) in fp32: what A gives and B takes, zeros at the start of a batch
    dh: Tensor  # its gradient, alike
    b_t: Tensor  # (R, out): B of this batch, where a norm reads it rank by rank

    def __init__(self, layers: Sequence[Any], salt: int) -> None:
        self.salt, self.count = salt, len(layers)
        self.outs = [layer.out_features for layer in layers]
        self.weight, self.bias = fuse([layer.base_layer for layer in layers])
        self.scale = layers[0].scaling["default"]
        self.dropout = getattr(layers[0].lora_dropout["default"], "p", 0.0)
        self.parameters = [layer.lora_A["default"].weight for layer in layers]
        self.parameters += [layer.lora_B["default"].weight for layer in layers]
        self.rank = len(self.parameters[0])

    def bind(self, values: Tensor, grads: Tensor) -> None:
        """Take this group's part of the step's flat buffers: all A, then all B."""
        sizes = [self.count * self.parameters[0].numel(), sum(self.outs) * self.rank]
        (a, b), (da, db) = values.split(sizes), grads.split(sizes)
        self.a, self.da = (flat.view(self.count * self.rank, -1) for flat in (a, da))  # (G·R, in)
        self.b, self.db = (flat.view(-1, self.rank) for flat in (b, db))  # (out, R)

    def lora_a(self, x: Tensor, seed: Tensor) -> LinearInput:
        """x (T, in) through dropout and A."""
        h = self.h[: len(x)]
        kept = kernels.lora_a(x, self.a, h, self.count, seed, self.salt, self.dropout, self.scale)
        return LinearInput(x, h, kept)

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, in) through all layers, still without their LoRA: (T, out)."""
        y: Tensor = functional.linear(x, self.weight, self.bias)
        return y

    def lora_b_backward(self, dy: Tensor, h: Tensor) -> Tensor:
        """The gradient of h, (T, G·R), from dy (T, out); adds that of B to the step's buffer."""
        dh: Tensor = self.dh[: len(dy)]
        kernels.lora_b_backward(dy, h, self.b, dh, self.db, self.outs)
        return dh

    def backward(self, dy: Tensor, given: LinearInput) -> Tensor:
        """dx, from dy (T, out); adds the gradients of A and B to the step's buffers."""
        dx, dh = dy @ self.weight, self.lora_b_backward(dy, given.h)
        kernels.lora_a_backward(given.x, self.a, dh, dx, self.da, given.kept, self.dropout, self.scale)
        return dx


class Rows(NamedTuple):
    """What a step reads: one packed, padded batch on the model's device; the padding is a row too."""

    input_ids: Tensor  # (T,)
    row_start: Tensor  # (T,) int32: where the row of each token starts
    row_end: Tensor  # (T,) int32: where it ends
    loss_positions: Tensor  # (L,) tokens from which a target is predicted, padded
    target_ids: Tensor  # (L,) what is predicted, IGNORE_INDEX in the padding
    rope_cache: Tensor  # (2, T, D/2) in fp32: cosines and sines of each token's position in its row
    num_items: Tensor  # () fp32: targets of the whole optimiser step


class Saved(NamedTuple):
    """What the backward pass of a layer needs; from `out` on, the last layer has L tokens instead of T."""

    x: Tensor  # (T, hidden): the residual stream
    rms: Tensor  # (T, 1): one over its root mean square
    qkv: LinearInput
    heads: tuple[Tensor, Tensor, Tensor]  # q, k and v, (T, heads, D), rotated
    attended: Tensor  # (T, heads, D)
    attention_state: Any  # as `kernels.attention` gives it
    out: LinearInput
    middle: Tensor  # (T, hidden): the residual stream after attention
    middle_rms: Tensor
    gate_up: LinearInput
    gate_up_y: Tensor  # (T, 2F): without its LoRA
    down_h: Tensor  # as in LinearInput; `kernels.swiglu_backward` computes the input anew
    down_kept: Tensor


class Layer:
    """One decoder layer, forward and backward, without autograd."""

    def __init__(self, layer: Any, number: int) -> None:
        attention, mlp, salt = layer.self_attn, layer.mlp, number * SALTS
        self.head = attention.head_dim
        self.qkv = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj], salt)
        self.out = FusedLinear([attention.o_proj], salt + 4)
        self.gate_up = FusedLinear([mlp.gate_proj, mlp.up_proj], salt + 5)
        self.down = FusedLinear([mlp.down_proj], salt + 8)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in norms]

    def forward(
        self, x: Tensor, added: LoraOutput | None, rows: Rows, seed: Tensor, is_last: bool
    ) -> tuple[Tensor, LoraOutput, Saved]:
        """x (T, hidden), with what the layer before adds to it, through this one; after the last only loss positions.

        What this one adds comes apart, as the norm that follows adds it.
        """
        x, n, rms = kernels.add_rms_norm(x, added, *self.norms[0])
        qkv_in, qkv = self.qkv.lora_a(n, seed), self.qkv(n)
        kernels.apply_rope_(qkv, qkv_in.h, self.qkv.b, self.qkv.outs, rows.rope_cache)
        q, k, v = (part.unflatten(1, (-1, self.head)) for part in qkv.split(self.qkv.outs, 1))
        attended, state = kernels.attention(q, k, v, rows.row_start)
        a, residual = (t[rows.loss_positions] if is_last else t for t in (attended.flatten(1), x))
        out_in = self.out.lora_a(a, seed)
        out = LoraOutput(self.out(a), out_in.h, self.out.b_t)
        middle, n, middle_rms = kernels.add_rms_norm(residual, out, *self.norms[1])
        gate_up_in, gate_up = self.gate_up.lora_a(n, seed), self.gate_up(n)
        s = kernels.swiglu(gate_up, gate_up_in.h, self.gate_up.b)
        _, down_h, down_kept = self.down.lora_a(s, seed)
        saved = Saved(x, rms, qkv_in, (q, k, v), attended, state, out_in, middle, middle_rms, gate_up_in, gate_up,
                      down_h, down_kept)  # fmt: skip
        return middle, LoraOutput(self.down(s), down_h, self.down.b_t), saved

    def backward(self, dy: Tensor, saved: Saved, rows: Rows, is_last: bool) -> Tensor:
        """dx, from dy (T, hidden), or of the last layer from that of the loss positions."""
        up, down = self.gate_up, self.down
        ds, dh = dy @ down.weight, down.lora_b_backward(dy, saved.down_h)
        dgate_up = kernels.swiglu_backward(
            ds, saved.gate_up_y, saved.gate_up.h, up.b, down.a, dh, down.da, saved.down_kept, down.dropout, down.scale
        )
        dn = up.backward(dgate_up, saved.gate_up)
        dx = kernels.rms_norm_backward(dn, saved.middle, saved.middle_rms, self.norms[1][0], onto=dy)
        da = self.out.backward(dx, saved.out)
        if is_last:
            count = len(saved.x)
            da, dx = (t.new_zeros(count, t.shape[1]).index_add_(0, rows.loss_positions, t) for t in (da, dx))
        dqkv = kernels.attention_backward(
            da, *saved.heads, saved.attended, saved.attention_state, rows.row_start, rows.row_end, rows.rope_cache
        )
        dn = self.qkv.backward(dqkv, saved.qkv)
        return kernels.rms_norm_backward(dn, saved.x, saved.rms, self.norms[0][0], onto=dx)


class TrainingStep:
    """Loss and gradients of a batch. On a GPU each shape is recorded at its first batch and replayed after that.

    `grads` are views of `flat_grads` (fp32), one for each of `names`, the LoRA's parameters. Raises RuntimeError for a
    base or a LoRA that is not computed here.
    """

    def __init__(self, model: PeftModel, max_length: int) -> None:
        qwen: Any = model.get_base_model()
        lora: Any = model.peft_config["default"]
        require_supported(qwen.config, {"default": lora})
        if not can_train(lora.target_modules, lora.r, lora.use_dora, 16):
            raise RuntimeError(f"the training step adapts {CAN_TRAIN}")
        self.embed, self.norm, self.head = qwen.model.embed_tokens, qwen.model.norm, qwen.lm_head
        self.device, self.dtype = qwen.device, qwen.dtype
        self.rope_cache = rope_cache(qwen, max(max_length, STRIDE))
        self.layers = [Layer(layer, number) for number, layer in enumerate(qwen.model.layers)]
        self.groups = [group for each in self.layers for group in (each.qkv, each.out, each.gate_up, each.down)]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.parameters]
        sizes = [parameter.numel() for parameter in self.parameters]
        flat_values = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device)  # what multiplies
        self.flat_grads = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        self.values, self.grads = (
            [view.view_as(p) for view, p in zip(flat.split(sizes), self.parameters, strict=True)]
            for flat in (flat_values, self.flat_grads)
        )
        parts = [sum(p.numel() for p in group.parameters) for group in self.groups]
        for group, *both in zip(self.groups, flat_values.split(parts), self.flat_grads.split(parts), strict=True):
            group.bind(*both)
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.recorder = GraphRecorder(self.device)
        self.graphs = self.recorder.graphs  # one for each shape

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], num_items_in_batch: int, seed: int) -> Tensor:
        """The summed loss () of a batch of `collate` over num_items_in_batch; leaves gradients on the parameters."""
        self.seed.fill_(seed)
        if self.parameters[0].grad is None:  # a new optimiser step
            self.flat_grads.zero_()
        names = ("position_ids", *Rows._fields[:-2])
        positions, *tensors = (batch[name].to(self.device, non_blocking=True) for name in names)
        num_items = torch.full((), num_items_in_batch, dtype=torch.float32, device=self.device)
        rows = Rows._make((*tensors, self.rope_cache[:, positions], num_items))
        # Kernels are compiled at the first shape, for all of them.
        warm_up = None if self.graphs else self._warm_up
        self.recorder(batch_shape(batch), self._run, rows, warm_up)
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()

    def _warm_up(self, *inputs: Tensor) -> None:
        self._run(*inputs)
        self.flat_grads.zero_()

    def _run(self, *inputs: Tensor) -> None:
        """Forward and backward; the loss and the gradients are left in the step's buffers."""
        rows, tokens = Rows(*inputs), len(inputs[0])
        torch._foreach_copy_(self.values, self.parameters)
        # What is summed by atomics is zeroed at once.
        sizes = [2 * tokens * len(group.a) for group in self.groups]
        zeros = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        for group, part in zip(self.groups, zeros.split(sizes), strict=True):
            group.h, group.dh = part.view(2, tokens, -1)
        adding = [group for layer in self.layers for group in (layer.out, layer.down)]
        for group, b_t in zip(adding, torch.stack([group.b for group in adding]).mT.contiguous(), strict=True):
            group.b_t = b_t
        x, added, saved = self.embed(rows.input_ids), None, []
        for layer in self.layers:
            x, added, needed = layer.forward(x, added, rows, self.seed, layer is self.layers[-1])
            saved.append(needed)
        d = self._loss(x, added, rows)
        for layer in reversed(self.layers):
            d = layer.backward(d, saved.pop(), rows, layer is self.layers[-1])

    def _loss(self, x: Tensor, added: LoraOutput | None, rows: Rows) -> Tensor:
        """Cross-entropy at the loss positions, x (L, hidden) with what the last layer adds; returns dx."""
        x, n, rms = kernels.add_rms_norm(x, added, self.norm.weight, self.norm.variance_epsilon)
        logits = self.head(n)
        losses = kernels.cross_entropy_(logits, rows.target_ids, rows.num_items)
        self.loss.copy_(losses.sum())
        return kernels.rms_norm_backward(logits @ self.head.weight, x, rms, self.norm.weight)


def dropout_seed(base: int, step: int, rank: int = 0, world_size: int = 1) -> int:
    """What the dropout of a step is drawn from, apart for each process; the layers take what follows it, apart."""
    return ((base % 2**20) << 40) + ((step * world_size + rank) << 12)


def num_target_tokens(rows: Sequence[dict[str, list[int]]]) -> int:
    """How many tokens of these rows enter the loss. The first of a row never does: nothing stands before it."""
    return sum(len(row["labels"]) - 1 - row["labels"][1:].count(IGNORE_INDEX) for row in rows)


def batch_shape(batch: dict[str, Tensor]) -> tuple[int, int]:
    """(T, L) of a batch of `collate`: what is recorded apart."""
    return len(batch["input_ids"]), len(batch["loss_positions"])


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of input_ids and labels as one packed batch for TrainingStep, on the CPU; of no rows at all, only padding.

    Each row is without its last token, as nothing is predicted from that. It holds position_ids (T,), from which comes
    `Rows.rope_cache`, and the other tensors of `Rows` but num_items.
    """
    ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    for row in rows:
        spans.append((len(ids), len(ids) + len(row["input_ids"]) - 1))
        ids += row["input_ids"][:-1]
        labels += row["labels"][1:]
    tokens = _padded(max(len(ids), 1))
    targets = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
    room = next(room for share in SHARES if (room := _padded(math.ceil(tokens * share))) >= len(targets))
    spans.append((len(ids), tokens))
    spare = room - len(targets)
    return {
        "input_ids": torch.tensor(ids + [0] * (tokens - len(ids))),
        "position_ids": torch.tensor([at for start, end in spans for at in range(end - start)]),
        "row_start": torch.tensor([start for start, end in spans for _ in range(start, end)], dtype=torch.int32),
        "row_end": torch.tensor([end for start, end in spans for _ in range(start, end)], dtype=torch.int32),
        "loss_positions": torch.tensor(targets + [0] * spare),
        "target_ids": torch.tensor([labels[at] for at in targets] + [IGNORE_INDEX] * spare),
    }


def _padded(count: int) -> int:
    """The next multiple of STRIDE."""
    return math.ceil(count / STRIDE) * STRIDE
