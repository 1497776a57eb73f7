"""Small operations of the fast profile that no library has fused.

LoRA's narrow products with their dropout, its wide ones within SwiGLU and rotary positions: Triton on a GPU, and
the same in plain torch elsewhere, which is what they are tested against. Shapes: T tokens, G linear layers that read
the same input, R their LoRA rank, F the width of the feed-forward.
"""

# Triton's functions have its own types, and constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from chat.kernels import early
from training.tokens import IGNORED

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda
except ImportError:  # torch brings Triton where it has a GPU for it
    triton = None

Tensor = torch.Tensor
Added = tuple[Tensor, Tensor, Tensor]  # a layer's output (T, out), and the LoRA still to be added: h (T, R), b (R, out)
LANES = 8  # decisions of one Philox number: 128 bits in halves of 16
COLUMNS = 64  # of a tile
# Of a tile, each found by trying: tokens, and warps that work on it.
TOKENS = {
    "narrow": 64, "widen": 16, "swiglu": 32, "swiglu_back": 16, "cross": 64, "turn": 32, "norm": 4,
    "attend": 64, "attend_back_q": 64, "attend_back_kv": 16,
}  # fmt: skip
WARPS = {
    "narrow": 4, "widen": 2, "swiglu": 4, "swiglu_back": 4, "cross": 8, "turn": 4, "norm": 8,
    "attend": 4, "attend_back_q": 4, "attend_back_kv": 2,
}  # fmt: skip
ROUNDS = 7  # of Philox: as few as pass every test (Salmon et al. 2011)
# Parts of a batch's tokens, each summed by one program before it is added to what all share.
STRIPES = {"widen": 11, "swiglu_back": 8}
# Tiles that are under way.
AHEAD = {"cross": 3, "widen": 3, "swiglu_back": 3, "attend": 2, "attend_back_q": 2, "attend_back_kv": 3}
WIDE = 8192  # outputs; adding to what all share is slow, and the wider a tile, the less it is done
CROSS = {False: (64, 6), True: (128, 4)}  # columns of a tile and stripes


def narrow(
    x: Tensor, a: Tensor, h: Tensor, groups: int, seed: Tensor, salt: int, dropout: float, scale: float
) -> Tensor:
    """x (T, in) through dropout and each layer's A, stacked (G·R, in), times `scale`: added to h (T, G·R) in fp32.

    Each layer drops elements of its own. Which were kept is returned for the way back: a bit each on a GPU.
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
    _narrow[(triton.cdiv(tokens, TOKENS["narrow"]), blocks, groups)](
        x, a, h, kept, seed, salt, tokens, width, x.stride(0), round(dropout * 65536), scale / (1 - dropout),
        G=groups, ROUNDS=ROUNDS, **_tile("narrow", a.shape[0] // groups),
    )  # fmt: skip
    return kept


def widen(x: Tensor, a: Tensor, dh: Tensor, dx: Tensor, da: Tensor, kept: Tensor, dropout: float, scale: float) -> None:
    """The way back of `narrow`: from dh (T, G·R), add to dx (T, in) and to da (G·R, in, fp32) in place."""
    (tokens, width), groups = x.shape, len(kept)
    if not x.is_cuda:
        scaled, dh = kept.to(x.dtype) * (scale / (1 - dropout)), dh.to(x.dtype)
        dh, a = dh.view(tokens, groups, -1), a.view(groups, -1, width)
        da += torch.einsum("gti,ti,tgr->gri", scaled, x, dh).flatten(0, 1)
        dx += torch.einsum("gti,gri,tgr->ti", scaled, a, dh)
        return
    _widen[(STRIPES["widen"], triton.cdiv(width, COLUMNS))](
        x, a, dh, dx, da, kept, tokens, width, x.stride(0), scale / (1 - dropout),
        G=groups, AHEAD=AHEAD["widen"], **_tile("widen", a.shape[0] // groups),
    )  # fmt: skip


def swiglu(gate_up: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """SwiGLU of both halves of gate_up (T, 2F), each with its LoRA added: h (T, 2R) times b (2F, R)."""
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated: Tensor = functional.silu(gate) * up
        return gated
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[_tiles("swiglu", tokens, width)](gate_up, h, b, out, tokens, width, **_tile("swiglu", b.shape[1]))
    return out


def swiglu_back(
    dout: Tensor, gate_up: Tensor, h: Tensor, b: Tensor, a: Tensor, dh: Tensor, da: Tensor,
    kept: Tensor, dropout: float, scale: float,
) -> Tensor:  # fmt: skip
    """The way back of `swiglu` and of the one layer's `narrow` that reads it: d gate_up (T, 2F).

    dout (T, F) came through the weights and dh (T, R) through the LoRA; adds to da (R, F) in place.
    """
    (tokens, width), rank = dout.shape, b.shape[1]
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated, whole = torch.sigmoid(gate), dout.clone()
        widen(gate * gated * up, a, dh, whole, da, kept, dropout, scale)
        return torch.cat([whole * up * gated * (1 + gate * (1 - gated)), whole * gate * gated], dim=1)
    dgate_up = torch.empty_like(gate_up)
    _swiglu_back[(STRIPES["swiglu_back"], triton.cdiv(width, COLUMNS))](
        dout, gate_up, h, b, a, dh, kept, dgate_up, da, tokens, width, scale / (1 - dropout),
        AHEAD=AHEAD["swiglu_back"], **_tile("swiglu_back", rank),
    )  # fmt: skip
    return dgate_up


def cross(dy: Tensor, h: Tensor, b: Tensor, dh: Tensor, db: Tensor, outs: Sequence[int]) -> None:
    """The way back of LoRA's wide products of layers side by side, of widths `outs`.

    dy (T, out) came to their outputs, h (T, G·R) went in, b (out, R); adds to dh (T, G·R) and db (out, R), in fp32.
    """
    (tokens, width), rank = dy.shape, b.shape[1]
    if not dy.is_cuda:
        middles = zip(h.to(dy.dtype).split(rank, 1), dh.split(rank, 1), strict=True)
        parts = zip(dy.split(outs, 1), middles, b.split(outs), db.split(outs), strict=True)
        for out, (narrow_, dnarrow), wide, dwide in parts:
            dwide += out.T @ narrow_
            dnarrow += out @ wide
        return
    ends = [*itertools.accumulate(outs), width, width]
    columns, stripes = CROSS[width > WIDE]
    tile = _tile("cross", rank) | {"RANKS": max(16, triton.next_power_of_2(h.shape[1])), "BC": columns}
    _cross[(stripes, triton.cdiv(width, columns))](
        dy, h, b, db, dh, tokens, width, ends[0], ends[1], GR=h.shape[1], AHEAD=AHEAD["cross"], **tile
    )  # fmt: skip


def add_norm(x: Tensor, added: Added | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, hidden) with what a layer adds to it, its RMSNorm, and one over its root mean square, (T, 1)."""
    if not x.is_cuda:
        if added:
            y, h, b = added
            x = x + y + h.to(b.dtype) @ b
        return x, *torch.ops.aten._fused_rms_norm(x, [x.shape[1]], weight, eps)
    (tokens, width), (y, h, b) = x.shape, added or (x, x, x)
    total, normed = torch.empty_like(x) if added else x, torch.empty_like(x)
    rms = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    _add_norm[(triton.cdiv(tokens, TOKENS["norm"]),)](
        x, y, h, b, weight, total, normed, rms, tokens, width, eps,
        ADD=added is not None, R=len(b) if added else 0, BT=TOKENS["norm"],
        BLOCK=triton.next_power_of_2(width), num_warps=WARPS["norm"], **early(),
    )  # fmt: skip
    return total, normed, rms


def norm_back(dy: Tensor, x: Tensor, rms: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """The way back of RMSNorm of x (T, hidden): dx, added to `onto`. rms (T, 1) is one over the root mean square."""
    if not x.is_cuda:
        d, y = dy * weight, x * rms
        dx: Tensor = (d - y * (d * y).mean(-1, keepdim=True)) * rms
        return dx if onto is None else dx + onto
    dx = torch.empty_like(dy)
    block = triton.next_power_of_2(x.shape[1])
    _norm_back[(len(x),)](dy, x, rms, weight, dy if onto is None else onto, dx, x.shape[1],
                          ONTO=onto is not None, BLOCK=block, num_warps=8, **early())  # fmt: skip
    return dx


def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Any]:
    """Causal attention within each row, and what its way back needs. q (T, heads, D), k and v (T, fewer heads, D).

    first (T,) int32 says where the row of each token starts. All three are views of one tensor, or contiguous alike.
    """
    if not q.is_cuda:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            at = torch.arange(len(q))
            seen = (at[None] >= first[:, None]) & (at[None] <= at[:, None])
            a, b, c = (t.transpose(0, 1)[None] for t in (q, k, v))
            whole = functional.scaled_dot_product_attention(a, b, c, seen, enable_gqa=True)
            out = whole[0].transpose(0, 1)
        return out.detach(), (out, q, k, v)
    tokens, heads, size = q.shape
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    _attend[(triton.cdiv(tokens, TOKENS["attend"]), heads)](
        q, k, v, out, lse, first, tokens, q.stride(0), size**-0.5, **_heads_tile("attend", q, k)
    )  # fmt: skip
    return out, lse


def attend_back(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: Any, first: Tensor, last: Tensor, turns: Tensor
) -> Tensor:
    """The way back of `attend` and of `turn_`: gradients side by side, (T, all heads · D).

    last (T,) int32 says where the row of each token ends.
    """
    if not q.is_cuda:
        whole, *inputs = state
        grads = torch.cat([d.flatten(1) for d in torch.autograd.grad(whole, inputs, dout.view_as(whole))], 1)
        _turned(grads[:, : -v[0].numel()], turns, -1)
        return grads
    tokens, heads, size = q.shape
    grads = torch.empty(tokens, (heads + 2 * k.shape[1]) * size, dtype=q.dtype, device=q.device)
    by_head = torch.empty(tokens, 2, heads, size, dtype=q.dtype, device=q.device)  # several share a key
    delta = torch.empty_like(state)
    _attend_back_q[(triton.cdiv(tokens, TOKENS["attend_back_q"]), heads)](
        q, k, v, dout, out, state, delta, grads, first, tokens, q.stride(0), grads.stride(0), size**-0.5,
        **_heads_tile("attend_back_q", q, k),
    )  # fmt: skip
    _attend_back_kv[(triton.cdiv(tokens, TOKENS["attend_back_kv"]), heads)](
        q, k, v, dout, state, delta, by_head, first, last, tokens, q.stride(0), size**-0.5,
        **_heads_tile("attend_back_kv", q, k),
    )  # fmt: skip
    _turn_back[(triton.cdiv(tokens, TOKENS["turn"]), heads + 2 * k.shape[1])](
        grads, by_head, turns, tokens, H=heads, KV=k.shape[1], HALF=size // 2, BT=TOKENS["turn"], **early()
    )  # fmt: skip
    return grads


def _heads_tile(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    warps, stages = WARPS[kernel], AHEAD[kernel]
    tile = {"BT": TOKENS[kernel], "num_warps": warps, "num_stages": stages}
    return {"H": heads, "KV": kv_heads, "D": size, **tile, **early()}


def turn_(qkv: Tensor, h: Tensor, b: Tensor, outs: Sequence[int], turns: Tensor) -> None:
    """Add the LoRA to qkv (T, out) in place, then turn queries and keys to their positions (Su et al. 2021).

    The LoRA is h (T, 3R) times b (out, R); `outs` are the widths of queries, keys and values, turns (2, T, D/2) cosines
    and sines.
    """
    if not qkv.is_cuda:
        for part, added in zip(qkv.split(outs, 1), _wide(h, b, outs), strict=True):
            part += added
        _turned(qkv[:, : sum(outs[:2])], turns)
        return
    (tokens, width), half = qkv.shape, turns.shape[2]
    queries, turned = (out // (2 * half) for out in (outs[0], sum(outs[:2])))
    tile = _tile("turn", b.shape[1])
    del tile["BC"]
    _turn[(triton.cdiv(tokens, tile["BT"]), width // (2 * half))](
        qkv, h, b, turns, tokens, width, queries, turned, HALF=half, **tile
    )  # fmt: skip


def _turned(qk: Tensor, turns: Tensor, sign: int = 1) -> None:
    heads = qk.unflatten(1, (-1, 2, turns.shape[2]))
    (one, two), (c, s) = heads.float().unbind(2), turns[:, :, None]
    heads.copy_(torch.stack([one * c - two * s * sign, two * c + one * s * sign], 2))


def cross_entropy_(logits: Tensor, targets: Tensor, items: Tensor) -> Tensor:
    """Losses of logits (L, V) over `items`, (L,) in fp32; the logits become their gradient. IGNORED targets count 0."""
    if not logits.is_cuda:
        log_p = logits.float().log_softmax(-1)
        losses = functional.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="none") / items
        expected = functional.one_hot(targets.clamp(min=0), logits.shape[1])
        logits.copy_((log_p.exp() - expected) * (targets != IGNORED)[:, None] / items)
        return losses
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, targets, items, losses, logits.shape[1], IGNORED, BLOCK=4096, num_warps=8, **early()
    )
    return losses


def _wide(h: Tensor, b: Tensor, outs: Sequence[int]) -> list[Tensor]:
    """LoRA's wide products of layers side by side: h (T, G·R) times b (out, R), each layer's part apart."""
    middles = h.to(b.dtype).split(b.shape[1], 1)
    return [middle @ part.T for middle, part in zip(middles, b.split(outs), strict=True)]


def _with_lora(gate_up: Tensor, h: Tensor, b: Tensor) -> list[Tensor]:
    halves, outs = gate_up.chunk(2, 1), [len(b) // 2] * 2
    return [half + added for half, added in zip(halves, _wide(h, b, outs), strict=True)]


def _tile(kernel: str, rank: int) -> dict[str, int]:
    ranks = max(16, triton.next_power_of_2(rank))  # a matrix unit takes no fewer
    return {"R": rank, "RANKS": ranks, "BT": TOKENS[kernel], "BC": COLUMNS, "num_warps": WARPS[kernel], **early()}


def _tiles(kernel: str, tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(tokens, TOKENS[kernel]), triton.cdiv(width, COLUMNS)


if triton:

    @triton.jit
    def _begin(PDL: tl.constexpr):
        """Let the next kernel be launched, and wait for what the one before has written."""
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()

    @triton.jit
    def _draw(seed, salt, t, c, width, BC: tl.constexpr, ROUNDS: tl.constexpr):
        """Four words for each token and column of a tile; their halves decide for eight tiles of columns."""
        at = (t[:, None] * tl.cdiv(width, 8 * BC) + tl.program_id(1)) * BC + c[None, :]
        return tl.randint4x(tl.load(seed) + salt, at, ROUNDS)

    @triton.jit
    def _half(w0, w1, w2, w3, lane: tl.constexpr):
        if lane // 2 == 0:
            word = w0
        elif lane // 2 == 1:
            word = w1
        elif lane // 2 == 2:
            word = w2
        else:
            word = w3
        return (word >> (16 * (lane % 2))) & 0xFFFF

    @triton.jit
    def _narrow(
        x, a, h, kept, seed, salt, tokens, width, stride, threshold, scale,
        G: tl.constexpr, ROUNDS: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, c, r = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, RANKS)
        g = tl.program_id(2)
        w0, w1, w2, w3 = _draw(seed, salt + g, t, c, width, BC, ROUNDS)
        total, bits = tl.zeros((BT, RANKS), tl.float32), tl.zeros((BT, BC), tl.int32)
        for lane in tl.static_range(8):
            column = (tl.program_id(1) * 8 + lane) * BC + c
            stays = _half(w0, w1, w2, w3, lane) >= threshold
            bits |= stays.to(tl.int32) << lane
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            tile = tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0)
            tile = tl.where(stays, tile, 0.0)  # not in the mask of the load, which would then be made by elements
            down = tl.load(
                a + (g * R + r[None, :]) * width + column[:, None],
                mask=(r < R)[None, :] & (column < width)[:, None], other=0,
            )  # fmt: skip
            total += tl.dot(tile, down)
        line = (g * tokens + t[:, None]) * tl.cdiv(width, 8 * BC) + tl.program_id(1)
        tl.store(kept + line * BC + c[None, :], bits.to(tl.uint8), mask=(t < tokens)[:, None])
        tl.atomic_add(
            h + t[:, None] * (G * R) + g * R + r[None, :], total * scale,
            mask=(t < tokens)[:, None] & (r < R)[None, :],
        )  # fmt: skip

    @triton.jit
    def _widen(
        x, a, dh, dx, da, kept, tokens, width, stride, scale,
        G: tl.constexpr, AHEAD: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        c, r, column = tl.arange(0, BC), tl.arange(0, RANKS), tl.program_id(1) * BC + tl.arange(0, BC)
        blocks, lane, ranks = tl.cdiv(width, 8 * BC), tl.program_id(1) % 8, (r < R)[:, None] & (column < width)[None, :]
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for g in tl.static_range(G):
            place = (g * R + r[:, None]) * width + column[None, :]
            down, grown = tl.load(a + place, mask=ranks, other=0), tl.zeros((RANKS, BC), tl.float32)
            for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=AHEAD):
                t = tile * BT + tl.arange(0, BT)
                some, inside = (t < tokens)[:, None], (t < tokens)[:, None] & (column < width)[None, :]
                read = tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0)
                line = (g * tokens + t[:, None]) * blocks + tl.program_id(1) // 8
                bits = tl.load(kept + line * BC + c[None, :], mask=some, other=0).to(tl.int32)
                stays = ((bits >> lane) & 1) == 1
                back = tl.load(dh + t[:, None] * (G * R) + g * R + r[None, :], mask=some & (r < R)[None, :], other=0)
                back = back.to(read.dtype)
                grown += tl.dot(tl.trans(back), tl.where(stays, read, 0.0))
                at = dx + t[:, None] * width + column[None, :]
                total = tl.load(at, mask=inside, other=0).to(tl.float32)
                total += tl.where(stays, tl.dot(back, down) * scale, 0.0)
                tl.store(at, total, mask=inside)
            tl.atomic_add(da + place, grown * scale, mask=ranks)
            tl.debug_barrier()  # the next layer adds to what this one has stored

    @triton.jit
    def _gate_and_up(
        gate_up, h, b, t, column, r, inside, tokens, width, R: tl.constexpr
    ):  # fmt: skip
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
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
        inside = (t < tokens)[:, None] & (column < width)[None, :]
        gate, up = _gate_and_up(gate_up, h, b, t, column, tl.arange(0, RANKS), inside, tokens, width, R)
        tl.store(out + t[:, None] * width + column[None, :], gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _swiglu_back(
        dout, gate_up, h, b, a, dh, kept, dgate_up, da, tokens, width, scale,
        AHEAD: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        c, r = tl.arange(0, BC), tl.arange(0, RANKS)
        column, lane = tl.program_id(1) * BC + c, tl.program_id(1) % 8
        down = (r < R)[:, None] & (column < width)[None, :]
        at = tl.load(a + r[:, None] * width + column[None, :], mask=down, other=0)
        dat = tl.zeros((RANKS, BC), tl.float32)
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=AHEAD):
            t = tile * BT + tl.arange(0, BT)
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            gate, up = _gate_and_up(gate_up, h, b, t, column, r, inside, tokens, width, R)
            line = t[:, None] * tl.cdiv(width, 8 * BC) + tl.program_id(1) // 8
            bits = tl.load(kept + line * BC + c[None, :], mask=(t < tokens)[:, None], other=0).to(tl.int32)
            stays = ((bits >> lane) & 1) == 1
            some = (t < tokens)[:, None] & (r < R)[None, :]
            back = tl.load(dh + t[:, None] * R + r[None, :], mask=some, other=0).to(at.dtype)
            gated = tl.sigmoid(gate)
            out = tl.where(stays, gate * gated * up, 0.0).to(at.dtype)
            dat += tl.dot(tl.trans(back), out)
            d = tl.load(dout + t[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
            d += tl.where(stays, tl.dot(back, at) * scale, 0.0)
            dgate = (d * up * gated * (1 + gate * (1 - gated))).to(at.dtype)
            dup = (d * gate * gated).to(at.dtype)
            to = dgate_up + t[:, None] * (2 * width) + column[None, :]
            tl.store(to, dgate, mask=inside)
            tl.store(to + width, dup, mask=inside)
        tl.atomic_add(da + r[:, None] * width + column[None, :], dat * scale, mask=down)

    @triton.jit
    def _cross_entropy(
        logits, targets, items, losses, width, IGNORED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):
        _begin(PDL)
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        target, count = tl.load(targets + row), tl.load(items)
        line = logits + row.to(tl.int64) * width
        highest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            part = tl.load(line + start + c, mask=start + c < width, other=float("-inf")).to(tl.float32)
            new = tl.maximum(highest, part)
            total = total * tl.exp(highest - new) + tl.exp(part - new)
            highest = new
        top = tl.max(highest)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top)))
        hers = tl.load(line + tl.maximum(target, 0)).to(tl.float32)
        learned = tl.where(target == IGNORED, 0.0, 1.0 / count)
        tl.store(losses + row, (log_sum - hers) * learned)
        tl.debug_barrier()  # all have read the target's logit before it is overwritten
        for start in range(0, width, BLOCK):
            at = line + start + c
            part = tl.load(at, mask=start + c < width, other=float("-inf")).to(tl.float32)
            d = (tl.exp(part - log_sum) - tl.where(start + c == target, 1.0, 0.0)) * learned
            tl.store(at, d, mask=start + c < width)

    @triton.jit
    def _cross(
        dy, h, b, db, dh, tokens, width, end0, end1,
        GR: tl.constexpr, AHEAD: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        column, r = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, RANKS)
        layer = (column >= end0).to(tl.int32) + (column >= end1).to(tl.int32)
        rank = r[None, :] - layer[:, None] * R
        own = (rank >= 0) & (rank < R) & (column < width)[:, None]  # of its layer's ranks, (BC, RANKS)
        at = column[:, None] * R + rank
        wide = tl.load(b + at, mask=own, other=0)
        total = tl.zeros((BC, RANKS), tl.float32)
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for tile in tl.range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe, num_stages=AHEAD):
            t = tile * BT + tl.arange(0, BT)
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            some = (t < tokens)[:, None] & (r < GR)[None, :]
            theirs = (r >= tl.min(layer) * R) & (r < (tl.max(layer) + 1) * R)  # the ranks that these columns have
            d = tl.load(dy + t[:, None] * width + column[None, :], mask=inside, other=0)
            narrow_ = tl.load(h + t[:, None] * GR + r[None, :], mask=some, other=0).to(d.dtype)
            total += tl.dot(tl.trans(d), narrow_)
            tl.atomic_add(dh + t[:, None] * GR + r[None, :], tl.dot(d, wide), mask=some & theirs[None, :])
        tl.atomic_add(db + at, total, mask=own)

    @triton.jit
    def _add_norm(
        x, y, h, b, weight, out, normed, rms, tokens, width, eps,
        ADD: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BLOCK)
        inside, at = (t < tokens)[:, None] & (c < width)[None, :], t[:, None] * width + c[None, :]
        total = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        if ADD:
            total += tl.load(y + at, mask=inside, other=0).to(tl.float32)
            for r in tl.static_range(R):
                narrow_ = tl.load(h + t * R + r, mask=t < tokens, other=0).to(b.dtype.element_ty).to(tl.float32)
                total += narrow_[:, None] * tl.load(b + r * width + c, mask=c < width, other=0).to(tl.float32)[None, :]
            total = total.to(out.dtype.element_ty)
            tl.store(out + at, total, mask=inside)
            total = total.to(tl.float32)  # what is stored is what the way back sees
        scale = tl.rsqrt(tl.sum(total * total, 1) / width + eps)
        gain = tl.load(weight + c, mask=c < width, other=0).to(tl.float32)
        tl.store(normed + at, total * scale[:, None] * gain[None, :], mask=inside)
        tl.store(rms + t, scale, mask=t < tokens)

    @triton.jit
    def _norm_back(dy, x, rms, weight, onto, dx, width, ONTO: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        _begin(PDL)
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        inside, at = c < width, tl.program_id(0) * width + c
        scale = tl.load(rms + row)
        d = tl.load(dy + at, mask=inside, other=0).to(tl.float32) * tl.load(weight + c, mask=inside, other=0)
        y = tl.load(x + at, mask=inside, other=0).to(tl.float32) * scale
        out = (d - y * (tl.sum(d * y) / width)) * scale
        if ONTO:
            out += tl.load(onto + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + at, out, mask=inside)

    @triton.jit
    def _attend(
        q, k, v, out, lse, first, tokens, stride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        begin = tl.load(first + t, mask=t < tokens, other=tokens)
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
    def _attend_back_q(
        q, k, v, dout, out, lse, delta, grads, first, tokens, stride, gstride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        inside = (t < tokens)[:, None]
        begin = tl.load(first + t, mask=t < tokens, other=tokens)
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
    def _attend_back_kv(
        q, k, v, dout, lse, delta, by_head, first, last, tokens, stride, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        s, d, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, D), tl.program_id(1)
        inside, kv = (s < tokens)[:, None], head // (H // KV) * D + d[None, :]
        key = tl.load(k + s[:, None] * stride + kv, mask=inside, other=0)
        value = tl.load(v + s[:, None] * stride + kv, mask=inside, other=0)
        dk, dv = tl.zeros((BT, D), tl.float32), tl.zeros((BT, D), tl.float32)
        end = tl.max(tl.load(last + s, mask=s < tokens, other=0))
        for start in range(tl.program_id(0) * BT, end, BT):
            t = start + tl.arange(0, BT)
            there, at = (t < tokens)[:, None], (t[:, None] * H + head) * D + d[None, :]
            begin = tl.load(first + t, mask=t < tokens, other=tokens)
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
    def _turn(
        qkv, h, b, turns, tokens, width, queries, turned,
        HALF: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, i, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HALF), tl.program_id(1)
        there = (t < tokens)[:, None] & (i < HALF)[None, :]
        first = qkv + t[:, None] * width + head * 2 * HALF + i[None, :]
        one = tl.load(first, mask=there, other=0).to(tl.float32)
        two = tl.load(first + HALF, mask=there, other=0).to(tl.float32)
        r, layer = tl.arange(0, RANKS), (head >= queries).to(tl.int32) + (head >= turned).to(tl.int32)
        some, ranks = (t < tokens)[:, None] & (r < R)[None, :], (r < R)[:, None] & (i < HALF)[None, :]
        narrow_ = tl.load(h + t[:, None] * (3 * R) + layer * R + r[None, :], mask=some, other=0)
        narrow_, wide = narrow_.to(b.dtype.element_ty), b + (head * 2 * HALF + i[None, :]) * R + r[:, None]
        one += tl.dot(narrow_, tl.load(wide, mask=ranks, other=0))
        two += tl.dot(narrow_, tl.load(wide + HALF * R, mask=ranks, other=0))
        at, end = turns + t[:, None] * HALF + i[None, :], tl.where(head < turned, tokens, 0)  # values are not turned
        c = tl.load(at, mask=there & (t < end)[:, None], other=1)
        s = tl.load(at + tokens * HALF, mask=there & (t < end)[:, None], other=0)
        tl.store(first, one * c - two * s, mask=there)
        tl.store(first + HALF, two * c + one * s, mask=there)

    @triton.jit
    def _turn_back(
        grads, by_head, turns, tokens,
        H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        _begin(PDL)
        t, i, head = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HALF), tl.program_id(1)
        there = (t < tokens)[:, None] & (i < HALF)[None, :]
        first = grads + t[:, None] * ((H + 2 * KV) * 2 * HALF) + head * 2 * HALF + i[None, :]
        if head < H:
            one = tl.load(first, mask=there, other=0).to(tl.float32)
            two = tl.load(first + HALF, mask=there, other=0).to(tl.float32)
        else:  # keys, then values: sums over the queries' heads that share them
            one, two = tl.zeros((BT, HALF), tl.float32), tl.zeros((BT, HALF), tl.float32)
            each = by_head + (t[:, None] * 2 * H + (head - H) * (H // KV)) * 2 * HALF + i[None, :]
            for n in tl.static_range(H // KV):
                one += tl.load(each + n * 2 * HALF, mask=there, other=0).to(tl.float32)
                two += tl.load(each + n * 2 * HALF + HALF, mask=there, other=0).to(tl.float32)
        at, end = turns + t[:, None] * HALF + i[None, :], tl.where(head < H + KV, tokens, 0)
        c = tl.load(at, mask=there & (t < end)[:, None], other=1)
        s = tl.load(at + tokens * HALF, mask=there & (t < end)[:, None], other=0)
        tl.store(first, one * c + two * s, mask=there)
        tl.store(first + HALF, two * c - one * s, mask=there)
