"""Kernels of the training step that no library has fused: Triton on a GPU, a twin in plain torch elsewhere.

LoRA's A with its dropout, its B within SwiGLU and RoPE, attention within packed rows, norms and the loss, each with its
backward pass. Shapes: T tokens, G linear layers that read the same input, R their LoRA rank, F
the width of the feed-forward, D the width of a head. A kernel has the name of its wrapper, in which its twin stands;
what several programs add up, they add by atomics in fp32.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from qwen2 import IGNORE_INDEX
from qwen2.kernels import Tensor, pdl, rotate, silu_and_mul, tl, triton, wait_for_previous
from qwen2.rope import rotate as rotate_heads

LANES = 8  # decisions of one Philox number: 128 bits in halves of 16
COLUMNS = 64  # of a tile
ROUNDS = 7  # of Philox: as few as pass every test (Salmon et al. 2011)
WIDE = 8192  # outputs; adding by atomics is slow, and the wider a tile of `lora_b_backward`, the less it is done


class Tile(NamedTuple):
    """How a kernel cuts its work, found by trying: tokens of a tile, warps, tiles under way, and stripes.

    A stripe is a part of a batch's tokens that one program sums up before it adds it to what all share.
    """

    tokens: int
    warps: int
    stages: int = 0
    stripes: int = 0


TILES = {
    "lora_a": Tile(64, 4), "lora_a_backward": Tile(16, 2, 3, 11), "lora_b_backward": Tile(64, 8, 3),
    "swiglu": Tile(32, 4), "swiglu_backward": Tile(16, 4, 3, 8), "rope": Tile(32, 4), "norm": Tile(4, 8),
    "attention": Tile(64, 4, 2), "attention_backward_q": Tile(64, 4, 2), "attention_backward_kv": Tile(16, 2, 3),
}  # fmt: skip


class LoraOutput(NamedTuple):
    """What a layer adds to the residual stream, its LoRA still to be added: y + h @ b."""

    y: Tensor  # (T, out)
    h: Tensor  # (T, R) in fp32
    b: Tensor  # (R, out)


def lora_a(
    x: Tensor, a: Tensor, h: Tensor, groups: int, seed: Tensor, salt: int, dropout: float, scale: float
) -> Tensor:
    """Dropout of x (T, in), by each layer's A, stacked (G·R, in), times `scale`: added to h (T, G·R) in fp32.

    Each layer drops elements of its own. Which were kept is returned for the backward pass: (G, T, in) booleans of the
    twin; on a GPU a bit each, drawn by Philox within the product, (G, T, in / 8, rounded up to COLUMNS) in uint8.
    """
    tokens, width = x.shape
    if not x.is_cuda:
        generator = torch.Generator().manual_seed(int(seed) + salt)
        kept = torch.rand(groups, tokens, width, generator=generator) >= dropout
        scaled = kept.to(x.dtype) * (scale / (1 - dropout))
        h += torch.einsum("gti,ti,gri->tgr", scaled, x, a.view(groups, -1, width)).flatten(1)
        return kept
    blocks = triton.cdiv(width, LANES * COLUMNS)
    kept = torch.empty(groups, tokens, blocks * COLUMNS, dtype=torch.uint8, device=x.device)
    _lora_a[(triton.cdiv(tokens, TILES["lora_a"].tokens), blocks, groups)](
        x, a, h, kept, seed, salt, tokens, width, x.stride(0), round(dropout * 65536), scale / (1 - dropout),
        G=groups, ROUNDS=ROUNDS, **_tile("lora_a", a.shape[0] // groups),
    )  # fmt: skip
    return kept


def lora_a_backward(
    x: Tensor, a: Tensor, dh: Tensor, dx: Tensor, da: Tensor, kept: Tensor, dropout: float, scale: float
) -> None:
    """The backward pass of `lora_a`: from dh (T, G·R), add to dx (T, in) and to da (G·R, in, fp32) in place."""
    (tokens, width), groups = x.shape, len(kept)
    if not x.is_cuda:
        scaled, dh = kept.to(x.dtype) * (scale / (1 - dropout)), dh.to(x.dtype)
        dh, a = dh.view(tokens, groups, -1), a.view(groups, -1, width)
        da += torch.einsum("gti,ti,tgr->gri", scaled, x, dh).flatten(0, 1)
        dx += torch.einsum("gti,gri,tgr->ti", scaled, a, dh)
        return
    tile = TILES["lora_a_backward"]
    _lora_a_backward[(tile.stripes, triton.cdiv(width, COLUMNS))](
        x, a, dh, dx, da, kept, tokens, width, x.stride(0), scale / (1 - dropout),
        G=groups, STAGES=tile.stages, **_tile("lora_a_backward", a.shape[0] // groups),
    )  # fmt: skip


def lora_b_backward(dy: Tensor, h: Tensor, b: Tensor, dh: Tensor, db: Tensor, outs: Sequence[int]) -> None:
    """The backward pass of LoRA's products h times B, of layers side by side with widths `outs`.

    dy (T, out) came to their outputs, h (T, G·R) went in, b (out, R); adds to dh (T, G·R) and db (out, R), in fp32.
    """
    (tokens, width), rank = dy.shape, b.shape[1]
    if not dy.is_cuda:
        inputs = zip(h.to(dy.dtype).split(rank, 1), dh.split(rank, 1), b.split(outs), db.split(outs), strict=True)
        for out, (into, dinto, wide, dwide) in zip(dy.split(outs, 1), inputs, strict=True):
            dwide += out.T @ into
            dinto += out @ wide
        return
    ends = [*itertools.accumulate(outs), width, width]
    columns, stripes = (128, 4) if width > WIDE else (64, 6)
    tile = _tile("lora_b_backward", rank)
    tile |= {"RANKS": max(16, triton.next_power_of_2(h.shape[1])), "BC": columns}
    _lora_b_backward[(stripes, triton.cdiv(width, columns))](
        dy, h, b, db, dh, tokens, width, ends[0], ends[1],
        GR=h.shape[1], STAGES=TILES["lora_b_backward"].stages, **tile,
    )  # fmt: skip


def swiglu(gate_up: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """SwiGLU, (T, F), of both halves of gate_up (T, 2F), each with its LoRA added: h (T, 2R) times b (2F, R)."""
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated: Tensor = functional.silu(gate) * up
        return gated
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[(triton.cdiv(tokens, TILES["swiglu"].tokens), triton.cdiv(width, COLUMNS))](
        gate_up, h, b, out, tokens, width, **_tile("swiglu", b.shape[1])
    )
    return out


def swiglu_backward(
    dout: Tensor, gate_up: Tensor, h: Tensor, b: Tensor, a: Tensor, dh: Tensor, da: Tensor,
    kept: Tensor, dropout: float, scale: float,
) -> Tensor:  # fmt: skip
    """The backward pass of `swiglu` and of the one layer's `lora_a` that reads it: d gate_up (T, 2F).

    dout (T, F) came through the weights and dh (T, R) through the LoRA; adds to da (R, F) in place.
    """
    (tokens, width), rank = dout.shape, b.shape[1]
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated, whole = torch.sigmoid(gate), dout.clone()
        lora_a_backward(gate * gated * up, a, dh, whole, da, kept, dropout, scale)
        return torch.cat([whole * up * gated * (1 + gate * (1 - gated)), whole * gate * gated], dim=1)
    dgate_up, tile = torch.empty_like(gate_up), TILES["swiglu_backward"]
    _swiglu_backward[(tile.stripes, triton.cdiv(width, COLUMNS))](
        dout, gate_up, h, b, a, dh, kept, dgate_up, da, tokens, width, scale / (1 - dropout),
        STAGES=tile.stages, **_tile("swiglu_backward", rank),
    )  # fmt: skip
    return dgate_up


def add_rms_norm(x: Tensor, added: LoraOutput | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, hidden) with what a layer adds to it, its RMSNorm, and one over its root mean square, (T, 1)."""
    if not x.is_cuda:
        x = x + added.y + added.h.to(added.b.dtype) @ added.b if added else x
        return x, *torch.ops.aten._fused_rms_norm(x, [x.shape[1]], weight, eps)
    (tokens, width), (y, h, b), tile = x.shape, added or (x, x, x), TILES["norm"]
    total, normed = torch.empty_like(x) if added else x, torch.empty_like(x)
    rms = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    _add_rms_norm[(triton.cdiv(tokens, tile.tokens),)](
        x, y, h, b, weight, total, normed, rms, tokens, width, eps, ADD=added is not None, R=len(b) if added else 0,
        BT=tile.tokens, BLOCK=triton.next_power_of_2(width), num_warps=tile.warps, **pdl(),
    )  # fmt: skip
    return total, normed, rms


def rms_norm_backward(dy: Tensor, x: Tensor, rms: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """The backward pass of RMSNorm of x (T, hidden): dx, added to `onto`. rms (T, 1) is as `add_rms_norm` gives it."""
    if not x.is_cuda:
        d, y = dy * weight, x * rms
        dx: Tensor = (d - y * (d * y).mean(-1, keepdim=True)) * rms
        return dx if onto is None else dx + onto
    dx = torch.empty_like(dy)
    _rms_norm_backward[(len(x),)](
        dy, x, rms, weight, dy if onto is None else onto, dx, x.shape[1],
        ONTO=onto is not None, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8, **pdl(),
    )  # fmt: skip
    return dx


def attention(q: Tensor, k: Tensor, v: Tensor, row_start: Tensor) -> tuple[Tensor, Any]:
    """Causal attention within each row, (T, heads, D), and what its backward pass needs.

    q (T, heads, D), k and v (T, fewer heads, D) are views of one tensor, or contiguous alike; row_start (T,) int32 says
    where the row of each token starts.
    """
    if not q.is_cuda:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            at = torch.arange(len(q))
            mask = (at[None] >= row_start[:, None]) & (at[None] <= at[:, None])
            a, b, c = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = functional.scaled_dot_product_attention(a, b, c, mask, enable_gqa=True)[0].transpose(0, 1)
        return out.detach(), (out, q, k, v)
    tokens, heads, size = q.shape
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    _attention[(triton.cdiv(tokens, TILES["attention"].tokens), heads)](
        q, k, v, out, lse, row_start, tokens, q.stride(0), size**-0.5, **_heads_tile("attention", q, k)
    )
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: Any, row_start: Tensor, row_end: Tensor,
    rope_cache: Tensor,
) -> Tensor:  # fmt: skip
    """The backward pass of `attention` and of `apply_rope_`: gradients of q, k and v side by side, (T, all heads · D).

    out and state are as `attention` gives them; row_end (T,) int32 says where the row of each token ends.
    """
    if not q.is_cuda:
        whole, *inputs = state
        grads = torch.cat([d.flatten(1) for d in torch.autograd.grad(whole, inputs, dout.view_as(whole))], 1)
        _rotate_(grads[:, : -v[0].numel()], rope_cache[0], -rope_cache[1])
        return grads
    tokens, heads, size = q.shape
    grads = torch.empty(tokens, (heads + 2 * k.shape[1]) * size, dtype=q.dtype, device=q.device)
    by_head = torch.empty(tokens, 2, heads, size, dtype=q.dtype, device=q.device)  # several share a key
    delta = torch.empty_like(state)
    _attention_backward_q[(triton.cdiv(tokens, TILES["attention_backward_q"].tokens), heads)](
        q, k, v, dout, out, state, delta, grads, row_start, tokens, q.stride(0), grads.stride(0), size**-0.5,
        **_heads_tile("attention_backward_q", q, k),
    )  # fmt: skip
    _attention_backward_kv[(triton.cdiv(tokens, TILES["attention_backward_kv"].tokens), heads)](
        q, k, v, dout, state, delta, by_head, row_start, row_end, tokens, q.stride(0), size**-0.5,
        **_heads_tile("attention_backward_kv", q, k),
    )  # fmt: skip
    _rope_backward[(triton.cdiv(tokens, TILES["rope"].tokens), heads + 2 * k.shape[1])](
        grads, by_head, rope_cache, tokens, H=heads, KV=k.shape[1], HALF=size // 2, BT=TILES["rope"].tokens, **pdl()
    )
    return grads


def apply_rope_(qkv: Tensor, h: Tensor, b: Tensor, outs: Sequence[int], rope_cache: Tensor) -> None:
    """Add the LoRA to qkv (T, out) in place, then rotate queries and keys to their positions.

    The LoRA is h (T, 3R) times b (out, R); `outs` are the widths of queries, keys and values; rope_cache (2, T, D/2)
    holds cosines and sines of each token's position.
    """
    if not qkv.is_cuda:
        for part, added in zip(qkv.split(outs, 1), _lora_b(h, b, outs), strict=True):
            part += added
        _rotate_(qkv[:, : sum(outs[:2])], *rope_cache)
        return
    (tokens, width), half = qkv.shape, rope_cache.shape[2]
    queries, rotated = (out // (2 * half) for out in (outs[0], sum(outs[:2])))
    tile = _tile("rope", b.shape[1])
    del tile["BC"]
    _apply_rope_[(triton.cdiv(tokens, tile["BT"]), width // (2 * half))](
        qkv, h, b, rope_cache, tokens, width, queries, rotated, HALF=half, **tile
    )


def cross_entropy_(logits: Tensor, targets: Tensor, num_items: Tensor) -> Tensor:
    """Losses (L,) in fp32 of logits (L, V), each over num_items (); the logits become their gradient.

    A target (L,) that is IGNORE_INDEX has neither loss nor gradient.
    """
    if not logits.is_cuda:
        log_p = logits.float().log_softmax(-1)
        losses = functional.nll_loss(log_p, targets, ignore_index=IGNORE_INDEX, reduction="none") / num_items
        expected = functional.one_hot(targets.clamp(min=0), logits.shape[1])
        logits.copy_((log_p.exp() - expected) * (targets != IGNORE_INDEX)[:, None] / num_items)
        return losses
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy_[(len(logits),)](
        logits, targets, num_items, losses, logits.shape[1], IGNORE_INDEX, BLOCK=4096, num_warps=8, **pdl()
    )
    return losses


def _rotate_(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    heads = qk.unflatten(1, (-1, 2 * cos.shape[1]))
    heads.copy_(rotate_heads(heads, cos, sin))


def _lora_b(h: Tensor, b: Tensor, outs: Sequence[int]) -> list[Tensor]:
    """LoRA's products with B, of layers side by side: h (T, G·R) times b (out, R), each layer's part apart."""
    inputs = h.to(b.dtype).split(b.shape[1], 1)
    return [each @ part.T for each, part in zip(inputs, b.split(outs), strict=True)]


def _with_lora(gate_up: Tensor, h: Tensor, b: Tensor) -> list[Tensor]:
    added = _lora_b(h, b, [len(b) // 2] * 2)
    return [half + more for half, more in zip(gate_up.chunk(2, 1), added, strict=True)]


def _tile(kernel: str, rank: int) -> dict[str, int]:
    ranks, tile = max(16, triton.next_power_of_2(rank)), TILES[kernel]  # a matrix unit takes no fewer ranks
    return {"R": rank, "RANKS": ranks, "BT": tile.tokens, "BC": COLUMNS, "num_warps": tile.warps, **pdl()}


def _heads_tile(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    tile = TILES[kernel]
    sizes = {"H": q.shape[1], "KV": k.shape[1], "D": q.shape[2], "BT": tile.tokens}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages, **pdl()}


if triton:

    @triton.jit
    def _lora_a(
        x, a, h, kept, seed, salt, tokens, width, stride, threshold, scale,
        G: tl.constexpr, ROUNDS: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """One layer, BT tokens, eight tiles of BC inputs: one draw of Philox decides for all eight."""
        wait_for_previous(PDL)
        t, c, r = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, RANKS)
        g = tl.program_id(2)
        at = (t[:, None] * tl.cdiv(width, 8 * BC) + tl.program_id(1)) * BC + c[None, :]
        words = tl.randint4x(tl.load(seed) + (salt + g), at, ROUNDS)  # four, each half of which decides for a lane
        total, bits = tl.zeros((BT, RANKS), tl.float32), tl.zeros((BT, BC), tl.int32)
        for lane in tl.static_range(8):
            column = (tl.program_id(1) * 8 + lane) * BC + c
            stays = ((words[lane // 2] >> (16 * (lane % 2))) & 0xFFFF) >= threshold
            bits |= stays.to(tl.int32) << lane
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            tile = tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0)
            tile = tl.where(stays, tile, 0.0)  # not in the mask of the load, which would then be made by elements
            mask = (r < R)[None, :] & (column < width)[:, None]
            down = tl.load(a + (g * R + r[None, :]) * width + column[:, None], mask=mask, other=0)
            total += tl.dot(tile, down)
        line = (g * tokens + t[:, None]) * tl.cdiv(width, 8 * BC) + tl.program_id(1)
        tl.store(kept + line * BC + c[None, :], bits.to(tl.uint8), mask=(t < tokens)[:, None])
        mask = (t < tokens)[:, None] & (r < R)[None, :]
        tl.atomic_add(h + t[:, None] * (G * R) + g * R + r[None, :], total * scale, mask=mask)

    @triton.jit
    def _lora_a_backward(
        x, a, dh, dx, da, kept, tokens, width, stride, scale, G: tl.constexpr, STAGES: tl.constexpr,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One stripe of tokens and BC inputs: dx of all layers, and the stripe's part of da."""
        wait_for_previous(PDL)
        c, r, column = tl.arange(0, BC), tl.arange(0, RANKS), tl.program_id(1) * BC + tl.arange(0, BC)
        blocks, lane, ranks = tl.cdiv(width, 8 * BC), tl.program_id(1) % 8, (r < R)[:, None] & (column < width)[None, :]
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for g in tl.static_range(G):
            offset = (g * R + r[:, None]) * width + column[None, :]
            down, total = tl.load(a + offset, mask=ranks, other=0), tl.zeros((RANKS, BC), tl.float32)
            for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=STAGES):
                t = tile * BT + tl.arange(0, BT)
                some, inside = (t < tokens)[:, None], (t < tokens)[:, None] & (column < width)[None, :]
                read = tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0)
                line = (g * tokens + t[:, None]) * blocks + tl.program_id(1) // 8
                bits = tl.load(kept + line * BC + c[None, :], mask=some, other=0).to(tl.int32)
                stays = ((bits >> lane) & 1) == 1
                d = tl.load(dh + t[:, None] * (G * R) + g * R + r[None, :], mask=some & (r < R)[None, :], other=0)
                d = d.to(read.dtype)
                total += tl.dot(tl.trans(d), tl.where(stays, read, 0.0))
                at = dx + t[:, None] * width + column[None, :]
                onto = tl.load(at, mask=inside, other=0).to(tl.float32)
                onto += tl.where(stays, tl.dot(d, down) * scale, 0.0)
                tl.store(at, onto, mask=inside)
            tl.atomic_add(da + offset, total * scale, mask=ranks)
            tl.debug_barrier()  # the next layer adds to what this one has stored

    @triton.jit
    def _lora_b_backward(
        dy, h, b, db, dh, tokens, width, end0, end1, GR: tl.constexpr, STAGES: tl.constexpr,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One stripe of tokens and BC outputs of up to three layers: its part of db, and its outputs' part of dh."""
        wait_for_previous(PDL)
        column, r = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, RANKS)
        layer = (column >= end0).to(tl.int32) + (column >= end1).to(tl.int32)
        rank = r[None, :] - layer[:, None] * R
        own = (rank >= 0) & (rank < R) & (column < width)[:, None]  # of its layer's ranks, (BC, RANKS)
        at = column[:, None] * R + rank
        wide = tl.load(b + at, mask=own, other=0)
        total = tl.zeros((BC, RANKS), tl.float32)
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=STAGES):
            t = tile * BT + tl.arange(0, BT)
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            some = (t < tokens)[:, None] & (r < GR)[None, :]
            theirs = (r >= tl.min(layer) * R) & (r < (tl.max(layer) + 1) * R)  # the ranks that these columns have
            d = tl.load(dy + t[:, None] * width + column[None, :], mask=inside, other=0)
            into = tl.load(h + t[:, None] * GR + r[None, :], mask=some, other=0).to(d.dtype)
            total += tl.dot(tl.trans(d), into)
            tl.atomic_add(dh + t[:, None] * GR + r[None, :], tl.dot(d, wide), mask=some & theirs[None, :])
        tl.atomic_add(db + at, total, mask=own)

    @triton.jit
    def _gate_and_up(gate_up, h, b, t, column, r, inside, tokens, width, R: tl.constexpr):
        """A tile of gate and of up, in fp32, each with its LoRA; twin: `_with_lora`."""
        ranks, some = (r < R)[:, None] & (column < width)[None, :], (t < tokens)[:, None] & (r < R)[None, :]
        hg = tl.load(h + t[:, None] * (2 * R) + r[None, :], mask=some, other=0).to(b.dtype.element_ty)
        hu = tl.load(h + t[:, None] * (2 * R) + R + r[None, :], mask=some, other=0).to(b.dtype.element_ty)
        bg = tl.load(b + column[None, :] * R + r[:, None], mask=ranks, other=0)
        bu = tl.load(b + (width + column[None, :]) * R + r[:, None], mask=ranks, other=0)
        at = gate_up + t[:, None] * (2 * width) + column[None, :]
        gate = tl.load(at, mask=inside, other=0).to(tl.float32) + tl.dot(hg, bg)
        up = tl.load(at + width, mask=inside, other=0).to(tl.float32) + tl.dot(hu, bu)
        return gate, up

    @triton.jit
    def _swiglu(
        gate_up, h, b, out, tokens, width,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BT tokens, BC outputs."""
        wait_for_previous(PDL)
        t, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
        inside = (t < tokens)[:, None] & (column < width)[None, :]
        gate, up = _gate_and_up(gate_up, h, b, t, column, tl.arange(0, RANKS), inside, tokens, width, R)
        tl.store(out + t[:, None] * width + column[None, :], silu_and_mul(gate, up), mask=inside)

    @triton.jit
    def _swiglu_backward(
        dout, gate_up, h, b, a, dh, kept, dgate_up, da, tokens, width, scale, STAGES: tl.constexpr,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One stripe of tokens and BC of the F columns; SwiGLU's output is computed again, not kept."""
        wait_for_previous(PDL)
        c, r = tl.arange(0, BC), tl.arange(0, RANKS)
        column, lane = tl.program_id(1) * BC + c, tl.program_id(1) % 8
        ranks = (r < R)[:, None] & (column < width)[None, :]
        down = tl.load(a + r[:, None] * width + column[None, :], mask=ranks, other=0)
        total = tl.zeros((RANKS, BC), tl.float32)
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=STAGES):
            t = tile * BT + tl.arange(0, BT)
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            gate, up = _gate_and_up(gate_up, h, b, t, column, r, inside, tokens, width, R)
            line = t[:, None] * tl.cdiv(width, 8 * BC) + tl.program_id(1) // 8
            bits = tl.load(kept + line * BC + c[None, :], mask=(t < tokens)[:, None], other=0).to(tl.int32)
            stays = ((bits >> lane) & 1) == 1
            some = (t < tokens)[:, None] & (r < R)[None, :]
            into = tl.load(dh + t[:, None] * R + r[None, :], mask=some, other=0).to(down.dtype)
            gated = tl.sigmoid(gate)
            out = tl.where(stays, gate * gated * up, 0.0).to(down.dtype)
            total += tl.dot(tl.trans(into), out)
            d = tl.load(dout + t[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
            d += tl.where(stays, tl.dot(into, down) * scale, 0.0)
            dgate = (d * up * gated * (1 + gate * (1 - gated))).to(down.dtype)
            dup = (d * gate * gated).to(down.dtype)
            at = dgate_up + t[:, None] * (2 * width) + column[None, :]
            tl.store(at, dgate, mask=inside)
            tl.store(at + width, dup, mask=inside)
        tl.atomic_add(da + r[:, None] * width + column[None, :], total * scale, mask=ranks)

    @triton.jit
    def _add_rms_norm(
        x, y, h, b, weight, out, normed, rms, tokens, width, eps,
        ADD: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BT whole tokens; the LoRA is added rank by rank."""
        wait_for_previous(PDL)
        t, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BLOCK)
        inside, at = (t < tokens)[:, None] & (c < width)[None, :], t[:, None] * width + c[None, :]
        total = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        if ADD:
            total += tl.load(y + at, mask=inside, other=0).to(tl.float32)
            for r in tl.static_range(R):
                into = tl.load(h + t * R + r, mask=t < tokens, other=0).to(b.dtype.element_ty).to(tl.float32)
                total += into[:, None] * tl.load(b + r * width + c, mask=c < width, other=0).to(tl.float32)[None, :]
            total = total.to(out.dtype.element_ty)
            tl.store(out + at, total, mask=inside)
            total = total.to(tl.float32)  # what is stored is what the backward pass sees
        scale = tl.rsqrt(tl.sum(total * total, 1) / width + eps)
        gain = tl.load(weight + c, mask=c < width, other=0).to(tl.float32)
        tl.store(normed + at, total * scale[:, None] * gain[None, :], mask=inside)
        tl.store(rms + t, scale, mask=t < tokens)

    @triton.jit
    def _rms_norm_backward(
        dy, x, rms, weight, onto, dx, width, ONTO: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        """One token."""
        wait_for_previous(PDL)
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        inside, at = c < width, row * width + c
        scale = tl.load(rms + row)
        d = tl.load(dy + at, mask=inside, other=0).to(tl.float32) * tl.load(weight + c, mask=inside, other=0)
        y = tl.load(x + at, mask=inside, other=0).to(tl.float32) * scale
        out = (d - y * (tl.sum(d * y) / width)) * scale
        if ONTO:
            out += tl.load(onto + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + at, out, mask=inside)

    @triton.jit
    def _attention(
        q, k, v, out, lse, row_start, tokens, stride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One head of BT queries, over the keys of their rows (FlashAttention, Dao 2023)."""
        wait_for_previous(PDL)
        t, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        begin = tl.load(row_start + t, mask=t < tokens, other=tokens)
        query = tl.load(q + t[:, None] * stride + head * D + d[None, :], mask=(t < tokens)[:, None], other=0)
        kv = head // (H // KV) * D + d[None, :]
        highest, total = tl.full((BT,), -1e30, tl.float32), tl.zeros((BT,), tl.float32)
        summed = tl.zeros((BT, D), tl.float32)
        for start in range(tl.min(begin) // BT * BT, (tl.program_id(0) + 1) * BT, BT):
            s = start + tl.arange(0, BT)
            key = tl.load(k + s[:, None] * stride + kv, mask=(s < tokens)[:, None], other=0)
            value = tl.load(v + s[:, None] * stride + kv, mask=(s < tokens)[:, None], other=0)
            seen = (s[None, :] >= begin[:, None]) & (s[None, :] <= t[:, None])
            scores = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, -1e30)
            new = tl.maximum(highest, tl.max(scores, 1))
            p, shrink = tl.where(seen, tl.exp(scores - new[:, None]), 0.0), tl.exp(highest - new)
            total, highest = total * shrink + tl.sum(p, 1), new
            summed = summed * shrink[:, None] + tl.dot(p.to(value.dtype), value)
        total = tl.where(total == 0, 1.0, total)  # beyond the last token
        at = (t[:, None] * H + head) * D + d[None, :]
        tl.store(out + at, summed / total[:, None], mask=(t < tokens)[:, None])
        tl.store(lse + t * H + head, highest + tl.log(total), mask=t < tokens)

    @triton.jit
    def _attention_backward_q(
        q, k, v, dout, out, lse, delta, grads, row_start, tokens, stride, gstride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """The gradient of one head of BT queries; delta, the sum of dout times out, is for `_attention_backward_kv`."""
        wait_for_previous(PDL)
        t, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        inside = (t < tokens)[:, None]
        begin = tl.load(row_start + t, mask=t < tokens, other=tokens)
        query = tl.load(q + t[:, None] * stride + head * D + d[None, :], mask=inside, other=0)
        at = (t[:, None] * H + head) * D + d[None, :]
        do = tl.load(dout + at, mask=inside, other=0)
        weighted = tl.sum(do.to(tl.float32) * tl.load(out + at, mask=inside, other=0).to(tl.float32), 1)
        tl.store(delta + t * H + head, weighted, mask=t < tokens)
        log_sum = tl.load(lse + t * H + head, mask=t < tokens, other=0)
        kv = head // (H // KV) * D + d[None, :]
        dq = tl.zeros((BT, D), tl.float32)
        for start in range(tl.min(begin) // BT * BT, (tl.program_id(0) + 1) * BT, BT):
            s = start + tl.arange(0, BT)
            key = tl.load(k + s[:, None] * stride + kv, mask=(s < tokens)[:, None], other=0)
            value = tl.load(v + s[:, None] * stride + kv, mask=(s < tokens)[:, None], other=0)
            seen = (s[None, :] >= begin[:, None]) & (s[None, :] <= t[:, None])
            p = tl.where(seen, tl.exp(tl.dot(query, tl.trans(key)) * scale - log_sum[:, None]), 0.0)
            ds = p * (tl.dot(do, tl.trans(value)) - weighted[:, None]) * scale
            dq += tl.dot(ds.to(key.dtype), key)
        tl.store(grads + t[:, None] * gstride + head * D + d[None, :], dq, mask=inside)

    @triton.jit
    def _attention_backward_kv(
        q, k, v, dout, lse, delta, by_head, row_start, row_end, tokens, stride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """The gradients of BT keys and values from one head of queries; `_rope_backward` sums the heads."""
        wait_for_previous(PDL)
        s, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        inside, kv = (s < tokens)[:, None], head // (H // KV) * D + d[None, :]
        key = tl.load(k + s[:, None] * stride + kv, mask=inside, other=0)
        value = tl.load(v + s[:, None] * stride + kv, mask=inside, other=0)
        dk, dv = tl.zeros((BT, D), tl.float32), tl.zeros((BT, D), tl.float32)
        end = tl.max(tl.load(row_end + s, mask=s < tokens, other=0))
        for start in range(tl.program_id(0) * BT, end, BT):
            t = start + tl.arange(0, BT)
            there, at = (t < tokens)[:, None], (t[:, None] * H + head) * D + d[None, :]
            begin = tl.load(row_start + t, mask=t < tokens, other=tokens)
            query = tl.load(q + t[:, None] * stride + head * D + d[None, :], mask=there, other=0)
            do = tl.load(dout + at, mask=there, other=0)
            log_sum = tl.load(lse + t * H + head, mask=t < tokens, other=0)
            weighted = tl.load(delta + t * H + head, mask=t < tokens, other=0)
            seen = (s[:, None] >= begin[None, :]) & (s[:, None] <= t[None, :])
            p = tl.where(seen, tl.exp(tl.dot(key, tl.trans(query)) * scale - log_sum[None, :]), 0.0)
            dv += tl.dot(p.to(do.dtype), do)
            ds = p * (tl.dot(value, tl.trans(do)) - weighted[None, :]) * scale
            dk += tl.dot(ds.to(query.dtype), query)
        at = by_head + (s[:, None] * 2 * H + head) * D + d[None, :]
        tl.store(at, dk, mask=inside)
        tl.store(at + H * D, dv, mask=inside)

    @triton.jit
    def _apply_rope_(
        qkv, h, b, rope_cache, tokens, width, queries, rotated,
        HALF: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One head of BT tokens; the first `queries` heads are queries, the first `rotated` queries and keys."""
        wait_for_previous(PDL)
        t, i, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HALF), tl.program_id(1)
        there = (t < tokens)[:, None] & (i < HALF)[None, :]
        first = qkv + t[:, None] * width + head * 2 * HALF + i[None, :]
        one = tl.load(first, mask=there, other=0).to(tl.float32)
        two = tl.load(first + HALF, mask=there, other=0).to(tl.float32)
        r, layer = tl.arange(0, RANKS), (head >= queries).to(tl.int32) + (head >= rotated).to(tl.int32)
        some, ranks = (t < tokens)[:, None] & (r < R)[None, :], (r < R)[:, None] & (i < HALF)[None, :]
        into = tl.load(h + t[:, None] * (3 * R) + layer * R + r[None, :], mask=some, other=0)
        into, wide = into.to(b.dtype.element_ty), b + (head * 2 * HALF + i[None, :]) * R + r[:, None]
        one += tl.dot(into, tl.load(wide, mask=ranks, other=0))
        two += tl.dot(into, tl.load(wide + HALF * R, mask=ranks, other=0))
        at, end = rope_cache + t[:, None] * HALF + i[None, :], tl.where(head < rotated, tokens, 0)  # values stay
        cos = tl.load(at, mask=there & (t < end)[:, None], other=1)
        sin = tl.load(at + tokens * HALF, mask=there & (t < end)[:, None], other=0)
        one, two = rotate(one, two, cos, sin)
        tl.store(first, one, mask=there)
        tl.store(first + HALF, two, mask=there)

    @triton.jit
    def _rope_backward(
        grads, by_head, rope_cache, tokens,
        H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One head of BT tokens: a key's or a value's gradient is first summed over the queries that share it."""
        wait_for_previous(PDL)
        t, i, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HALF), tl.program_id(1)
        there = (t < tokens)[:, None] & (i < HALF)[None, :]
        first = grads + t[:, None] * ((H + 2 * KV) * 2 * HALF) + head * 2 * HALF + i[None, :]
        if head < H:
            one = tl.load(first, mask=there, other=0).to(tl.float32)
            two = tl.load(first + HALF, mask=there, other=0).to(tl.float32)
        else:  # keys, then values
            one, two = tl.zeros((BT, HALF), tl.float32), tl.zeros((BT, HALF), tl.float32)
            each = by_head + (t[:, None] * 2 * H + (head - H) * (H // KV)) * 2 * HALF + i[None, :]
            for n in tl.static_range(H // KV):
                one += tl.load(each + n * 2 * HALF, mask=there, other=0).to(tl.float32)
                two += tl.load(each + n * 2 * HALF + HALF, mask=there, other=0).to(tl.float32)
        at, end = rope_cache + t[:, None] * HALF + i[None, :], tl.where(head < H + KV, tokens, 0)
        cos = tl.load(at, mask=there & (t < end)[:, None], other=1)
        sin = tl.load(at + tokens * HALF, mask=there & (t < end)[:, None], other=0)
        tl.store(first, one * cos + two * sin, mask=there)
        tl.store(first + HALF, two * cos - one * sin, mask=there)

    @triton.jit
    def _cross_entropy_(
        logits, targets, num_items, losses, width, IGNORE_INDEX: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        """One line of logits, read twice: for its log-sum-exp, and to become its gradient."""
        wait_for_previous(PDL)
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        target, count = tl.load(targets + row), tl.load(num_items)
        line = logits + row.to(tl.int64) * width
        highest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            part = tl.load(line + start + c, mask=start + c < width, other=float("-inf")).to(tl.float32)
            new = tl.maximum(highest, part)
            total = total * tl.exp(highest - new) + tl.exp(part - new)
            highest = new
        top = tl.max(highest)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top)))
        logit = tl.load(line + tl.maximum(target, 0)).to(tl.float32)
        weight = tl.where(target == IGNORE_INDEX, 0.0, 1.0 / count)
        tl.store(losses + row, (log_sum - logit) * weight)
        tl.debug_barrier()  # all have read the target's logit before it is overwritten
        for start in range(0, width, BLOCK):
            at = line + start + c
            part = tl.load(at, mask=start + c < width, other=float("-inf")).to(tl.float32)
            d = (tl.exp(part - log_sum) - tl.where(start + c == target, 1.0, 0.0)) * weight
            tl.store(at, d, mask=start + c < width)
