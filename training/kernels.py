"""Small operations of the fast profile that no library has fused.

LoRA's narrow products with their dropout, SwiGLU with the LoRA of its inputs, rotary positions: Triton on a GPU, and
the same in plain torch elsewhere, which is what they are tested against. Shapes: T tokens, G linear layers that read
the same input, R their LoRA rank, F the width of the feed-forward.
"""

# Triton's functions have its own types, and constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings Triton where it has a GPU for it
    triton = None

Tensor = torch.Tensor
LANES = 8  # decisions of one Philox number: 128 bits in halves of 16
COLUMNS = 64  # of a tile
TOKENS = 32
WARPS = 4
ROUNDS = 7  # of Philox: as few as pass every test (Salmon et al. 2011)
STRIPES = 8  # parts of a batch's tokens, each summed by one program before it is added to what all share


def narrow(
    x: Tensor, a: Tensor, groups: int, seed: Tensor, salt: int, dropout: float, scale: float
) -> tuple[Tensor, Tensor]:
    """x (T, in) through dropout and each layer's A, stacked (G·R, in): (T, G·R) in fp32, times `scale`.

    Each layer drops elements of its own. Which were kept is returned for the way back: a bit each on a GPU.
    """
    tokens, width = x.shape
    if not x.is_cuda:
        generator = torch.Generator().manual_seed(int(seed) + salt)
        kept = torch.rand(groups, tokens, width, generator=generator) >= dropout
        scaled = kept.to(x.dtype) * (scale / (1 - dropout))
        products = torch.einsum("gti,ti,gri->tgr", scaled, x, a.view(groups, -1, width))
        return products.flatten(1), kept
    h = torch.zeros(tokens, a.shape[0], dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(width, LANES * COLUMNS)
    kept = torch.empty(groups, tokens, blocks * COLUMNS, dtype=torch.uint8, device=x.device)
    _narrow[(triton.cdiv(tokens, TOKENS), blocks)](
        x, a, h, kept, seed, salt, tokens, width, x.stride(0), round(dropout * 65536), scale / (1 - dropout),
        G=groups, ROUNDS=ROUNDS, **_tile(a.shape[0] // groups),
    )  # fmt: skip
    return h, kept


def widen(x: Tensor, a: Tensor, dh: Tensor, dx: Tensor, da: Tensor, kept: Tensor, dropout: float, scale: float) -> None:
    """The way back of `narrow`: from dh (T, G·R), add to dx (T, in) and to da (G·R, in, fp32) in place."""
    (tokens, width), groups = x.shape, len(kept)
    if not x.is_cuda:
        scaled = kept.to(x.dtype) * (scale / (1 - dropout))
        dh, a = dh.view(tokens, groups, -1), a.view(groups, -1, width)
        da += torch.einsum("gti,ti,tgr->gri", scaled, x, dh).flatten(0, 1)
        dx += torch.einsum("gti,gri,tgr->ti", scaled, a, dh)
        return
    _widen[(triton.cdiv(tokens, TOKENS), triton.cdiv(width, LANES * COLUMNS))](
        x, a, dh, dx, da, kept, tokens, width, x.stride(0), scale / (1 - dropout),
        G=groups, **_tile(a.shape[0] // groups),
    )  # fmt: skip


def swiglu(gate_up: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """SwiGLU of both halves of gate_up (T, 2F), each with its LoRA added: h (T, 2R) times b (2F, R)."""
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated: Tensor = torch.nn.functional.silu(gate) * up
        return gated
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[_tiles(tokens, width)](gate_up, h, b, out, tokens, width, **_tile(b.shape[1]))
    return out


def swiglu_back(
    dout: Tensor, gate_up: Tensor, h: Tensor, b: Tensor, db: Tensor,
    a: Tensor, dh: Tensor, da: Tensor, kept: Tensor, dropout: float, scale: float,
) -> Tensor:  # fmt: skip
    """The way back of `swiglu` and of the one layer's `narrow` that reads it: d gate_up (T, 2F).

    dout (T, F) came through the weights and dh (T, R) through the LoRA; adds to db (2F, R) and da (R, F) in place.
    """
    (tokens, width), rank = dout.shape, b.shape[1]
    if not gate_up.is_cuda:
        gate, up = _with_lora(gate_up, h, b)
        gated, whole = torch.sigmoid(gate), dout.clone()
        widen(gate * gated * up, a, dh, whole, da, kept, dropout, scale)
        d = torch.stack([whole * up * gated * (1 + gate * (1 - gated)), whole * gate * gated])  # (2, T, F)
        db += torch.einsum("gtf,tgr->gfr", d, h.view(tokens, 2, rank)).flatten(0, 1)
        return torch.cat([*d], dim=1)
    dgate_up = torch.empty_like(gate_up)
    _swiglu_back[(STRIPES, triton.cdiv(width, COLUMNS))](
        dout, gate_up, h, b, a, dh, kept, dgate_up, db, da, tokens, width, scale / (1 - dropout), **_tile(rank)
    )  # fmt: skip
    return dgate_up


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> None:
    """Rotary positions on heads (T, heads, D) in place; cos and sin are (T, D/2), `sign` -1 turns back."""
    if not heads.is_cuda:
        first, second = heads.float().chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None] * sign
        heads.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))
        return
    tokens, count, size = heads.shape
    _rotate[(triton.cdiv(tokens, TOKENS), count)](
        heads, cos, sin, sign, tokens, heads.stride(0), heads.stride(1), HALF=size // 2, BT=TOKENS
    )  # fmt: skip


def _with_lora(gate_up: Tensor, h: Tensor, b: Tensor) -> Tensor:
    tokens, width, rank = gate_up.shape[0], gate_up.shape[1] // 2, b.shape[1]
    added: Tensor = torch.einsum("tgr,gfr->gtf", h.view(tokens, 2, rank), b.view(2, width, rank))
    return added + gate_up.view(tokens, 2, width).transpose(0, 1)


def _tile(rank: int) -> dict[str, int]:
    return {"R": rank, "RANKS": max(16, triton.next_power_of_2(rank)), "BT": TOKENS, "BC": COLUMNS, "num_warps": WARPS}


def _tiles(tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(tokens, TOKENS), triton.cdiv(width, COLUMNS)


if triton:

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
    ):  # fmt: skip
        t, c, r = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, RANKS)
        for g in range(G):
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
        G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        t, c, r = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, RANKS)
        blocks, some = tl.cdiv(width, 8 * BC), (t < tokens)[:, None] & (r < R)[None, :]
        for lane in range(8):
            column = (tl.program_id(1) * 8 + lane) * BC + c
            inside, ranks = (
                (t < tokens)[:, None] & (column < width)[None, :],
                (r < R)[:, None] & (column < width)[None, :],
            )
            tile = tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0)
            at = dx + t[:, None] * width + column[None, :]
            total = tl.load(at, mask=inside, other=0).to(tl.float32)
            for g in tl.static_range(G):
                line = (g * tokens + t[:, None]) * blocks + tl.program_id(1)
                bits = tl.load(kept + line * BC + c[None, :], mask=(t < tokens)[:, None], other=0).to(tl.int32)
                stays = ((bits >> lane) & 1) == 1
                back = tl.load(dh + t[:, None] * (G * R) + g * R + r[None, :], mask=some, other=0)
                place = (g * R + r[:, None]) * width + column[None, :]
                tl.atomic_add(da + place, tl.dot(tl.trans(back), tl.where(stays, tile, 0.0)) * scale, mask=ranks)
                grown = tl.dot(back, tl.load(a + place, mask=ranks, other=0)) * scale
                total += tl.where(stays, grown, 0.0)
            tl.store(at, total, mask=inside)

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
        return gate, up, hg, hu, bg, bu

    @triton.jit
    def _swiglu(
        gate_up, h, b, out, tokens, width,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        t, column = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
        inside = (t < tokens)[:, None] & (column < width)[None, :]
        gate, up, _hg, _hu, _bg, _bu = _gate_and_up(
            gate_up, h, b, t, column, tl.arange(0, RANKS), inside, tokens, width, R
        )
        tl.store(out + t[:, None] * width + column[None, :], gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _swiglu_back(
        dout, gate_up, h, b, a, dh, kept, dgate_up, db, da, tokens, width, scale,
        R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        c, r = tl.arange(0, BC), tl.arange(0, RANKS)
        column, lane = tl.program_id(1) * BC + c, tl.program_id(1) % 8
        down = (r < R)[:, None] & (column < width)[None, :]
        at = tl.load(a + r[:, None] * width + column[None, :], mask=down, other=0)
        dbg, dbu = tl.zeros((BC, RANKS), tl.float32), tl.zeros((BC, RANKS), tl.float32)
        dat = tl.zeros((RANKS, BC), tl.float32)
        stripe = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(0))
        for tile in range(tl.program_id(0) * stripe, (tl.program_id(0) + 1) * stripe):
            t = tile * BT + tl.arange(0, BT)
            inside = (t < tokens)[:, None] & (column < width)[None, :]
            gate, up, hg, hu, _bg, _bu = _gate_and_up(gate_up, h, b, t, column, r, inside, tokens, width, R)
            line = t[:, None] * tl.cdiv(width, 8 * BC) + tl.program_id(1) // 8
            bits = tl.load(kept + line * BC + c[None, :], mask=(t < tokens)[:, None], other=0).to(tl.int32)
            stays = ((bits >> lane) & 1) == 1
            back = tl.load(dh + t[:, None] * R + r[None, :], mask=(t < tokens)[:, None] & (r < R)[None, :], other=0)
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
            dbg += tl.dot(tl.trans(dgate), hg)
            dbu += tl.dot(tl.trans(dup), hu)
        tl.atomic_add(da + r[:, None] * width + column[None, :], dat * scale, mask=down)
        up_ = (column < width)[:, None] & (r < R)[None, :]
        tl.atomic_add(db + column[:, None] * R + r[None, :], dbg, mask=up_)
        tl.atomic_add(db + (width + column[:, None]) * R + r[None, :], dbu, mask=up_)

    @triton.jit
    def _rotate(heads, cos, sin, sign, tokens, per_token, per_head, HALF: tl.constexpr, BT: tl.constexpr):
        t, i = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HALF)
        there = (t < tokens)[:, None] & (i < HALF)[None, :]
        first = heads + t[:, None] * per_token + tl.program_id(1) * per_head + i[None, :]
        turn = t[:, None] * HALF + i[None, :]
        c, s = tl.load(cos + turn, mask=there, other=0), tl.load(sin + turn, mask=there, other=0) * sign
        one = tl.load(first, mask=there, other=0).to(tl.float32)
        two = tl.load(first + HALF, mask=there, other=0).to(tl.float32)
        tl.store(first, one * c - two * s, mask=there)
        tl.store(first + HALF, two * c + one * s, mask=there)
