"""Operations of the decoder, for a handful of rows at a time: Triton on a GPU, plain torch elsewhere.

A row is one token of one conversation. Shapes: N rows, K inputs, O outputs, S parts of a sum over K that whoever reads
it adds up, A adapters of rank R, C conversations of which the last is for padding. Every row is computed in an order
of its own, whatever stands beside it, so a reply in company is to the bit the reply alone.
"""

# Triton's functions have their own types, and constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
from torch.nn import functional

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda
except ImportError:  # torch brings Triton where it has a GPU for it
    triton = None

Tensor = torch.Tensor
CANDIDATES = 200  # most tokens that top_k can leave; they are ordered, so they are few
CHUNKS = 64  # of the vocabulary, searched side by side
# Tiles of a product, found by trying: at most so many rows, outputs, inputs at once, warps, stages. The order in which
# a row's products are summed is the same in all.
TILES = ((16, 16, 256, 4, 4), (32, 16, 256, 4, 4), (128, 32, 128, 4, 3))
STRETCH = 256  # inputs; a part of a sum is a multiple
CONTEXT = 64  # keys at once
EARLY = {"PDL": False, "launch_pdl": False}  # launch a kernel while the one before it ends
FETCHED = 512  # inputs of each output's weights that are asked for while it waits


@dataclass(frozen=True)
class Lora:
    """The second halves of adapters on layers that read the same input; their first halves are rows of its weight."""

    b: Tensor
    """(A, O, R), scaling included."""
    ends: tuple[int, ...]
    """Where the outputs of each of the layers end, in O."""


def product(x: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
    """x (N, K) by weight (O, K): (S, N, O) in fp32."""
    rows, width = x.shape
    if not x.is_cuda:
        return functional.linear(x, weight)[None].float()
    y = torch.empty(parts, rows, len(weight), dtype=torch.float32, device=x.device)
    tall, outs, ins, warps, stages = next((tile for tile in TILES if rows <= tile[0]), TILES[-1])
    each = triton.cdiv(triton.cdiv(width, STRETCH), parts) * STRETCH
    _product[(triton.cdiv(rows, tall), triton.cdiv(len(weight), outs), parts)](
        x, weight, y, rows, len(weight), width, each,
        BN=tall, BO=outs, BK=ins, FETCHED=FETCHED, num_warps=warps, num_stages=stages, **EARLY,
    )  # fmt: skip
    return y


def turn_and_keep(
    y: Tensor, bias: Tensor | None, lora: Lora, who: Tensor, slots: Tensor, positions: Tensor, turns: Tensor,
    keys: Tensor, values: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    """Queries, turned to their positions, (N, heads, D); keys and values go into the cache, (C, kv heads, length, D).

    y (S, N, O + A·G·R) is the product of the input with queries', keys' and values' weights and all first halves.
    who (C,) is the adapter of each conversation, -1 for none; turns (2, length, D/2) are cosines and sines.
    """
    rows, (kv_heads, size) = len(slots), keys.shape[1::2]
    if not y.is_cuda:
        qkv = _whole(y, lora, who[slots])
        qkv = qkv if bias is None else qkv + bias
        every = qkv.unflatten(1, (-1, size))
        cos, sin = turns[:, positions][:, :, None]
        first, second = every[:, : heads + kv_heads].chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(keys.dtype)
        keys[slots, :, positions] = turned[:, heads:]
        values[slots, :, positions] = every[:, heads + kv_heads :].to(keys.dtype)
        return turned[:, :heads]
    q = torch.empty(rows, heads, size, dtype=keys.dtype, device=y.device)
    _turn_and_keep[(rows, heads + 2 * kv_heads)](
        y, y if bias is None else bias, lora.b, who, slots, positions, turns, keys, values, q, len(y), rows,
        y.shape[2], turns.shape[1], keys.shape[2], H=heads, KV=kv_heads, HALF=size // 2, BIAS=bias is not None,
        **_ranks(lora), num_warps=2, **EARLY,
    )  # fmt: skip
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Each row to its conversation up to its own position: (N, heads · D)."""
    rows, heads, size = q.shape
    if not q.is_cuda:
        longest = int(positions.max()) + 1
        k, v = (cache[slots, :, :longest] for cache in (keys, values))
        seen = (torch.arange(longest) <= positions[:, None])[:, None, None]
        told: Tensor = functional.scaled_dot_product_attention(q[:, :, None], k, v, seen, enable_gqa=True)
        return told[:, :, 0].flatten(1)
    out = torch.empty(rows, heads * size, dtype=q.dtype, device=q.device)
    _attend[(rows, keys.shape[1])](
        q, keys, values, out, slots, positions, keys.shape[2], size**-0.5,
        H=heads, GROUP=heads // keys.shape[1], D=size, BLOCK=CONTEXT, num_warps=4, **EARLY,
    )  # fmt: skip
    return out


def add_norm(
    x: Tensor, y: Tensor | None, lora: Lora | None, who: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x (N, hidden) with a product y added, and its RMSNorm."""
    if not x.is_cuda:
        x = x if y is None or lora is None else (x + _whole(y, lora, who[slots])).to(x.dtype)
        return x, functional.rms_norm(x.float(), x.shape[1:], weight.float(), eps).to(x.dtype)
    added, normed = torch.empty_like(x), torch.empty_like(x)
    rows, width = x.shape
    tile = _ranks(lora) if lora else {"OUT": width, "G": 1, "R": 1, "RANKS": 1}
    _add_norm[(rows,)](
        x, y if y is not None else x, lora.b if lora else x, who, slots, weight, added, normed, eps,
        0 if y is None else len(y), rows, 0 if y is None else y.shape[2], width,
        BLOCK=triton.next_power_of_2(width), LORA=lora is not None and len(lora.b) > 0, **tile, num_warps=16, **EARLY,
    )  # fmt: skip
    return added, normed


def swiglu(y: Tensor, lora: Lora, who: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """SwiGLU of the product of gate and up, side by side in y: (N, F)."""
    width = lora.ends[0]
    if not y.is_cuda:
        gate, up = _whole(y, lora, who[slots]).chunk(2, 1)
        return (functional.silu(gate) * up).to(dtype)
    rows = len(slots)
    out = torch.empty(rows, width, dtype=dtype, device=y.device)
    _swiglu[(rows, triton.cdiv(width, 512))](
        y, lora.b, who, slots, out, len(y), rows, y.shape[2], width, BLOCK=512, **_ranks(lora), num_warps=4, **EARLY,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class State:
    """What is known of each conversation, on the device; the last one is for padding."""

    who: Tensor
    """(C,) int32: its adapter, -1 for none."""
    last: Tensor
    """(C,) int64: the token said last, which is read next."""
    position: Tensor
    """(C,) int64: where that one stands."""
    seen: Tensor
    """(C, vocabulary) uint8: what was read or said, for the repetition penalty."""
    law: Tensor
    """(C, 4) fp32: temperature, top_p, top_k, repetition penalty."""
    seed: Tensor
    """(C,) int64."""


def choose(y: Tensor, state: State, slots: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw the next token of each row from logits y (S, N, vocabulary), note it in the state, and return it, (N,).

    In Qwen2.5's order: repetition penalty, temperature, top_k, top_p; at temperature 0 the likeliest, of equals the
    first. The draw depends on the conversation's seed and position alone. Logits are rounded to `dtype` before.
    """
    rows, width = y.shape[1:]
    penalty = state.law[slots, 3][:, None]
    logits = y.sum(0).to(dtype).float() if len(y) > 1 else y[0].to(dtype).float()
    fined = torch.where(logits > 0, logits / penalty, logits * penalty)
    scores = torch.where(state.seen[slots] > 0, fined, logits)
    values, ids = _highest(scores, min(CANDIDATES, width))
    tokens = torch.empty(rows, dtype=torch.int64, device=y.device)
    if not y.is_cuda:
        for row, slot in enumerate(slots.tolist()):
            tokens[row] = _draw(values[row], ids[row], state.law[slot], int(state.seed[slot]), int(positions[row]))
        state.last[slots], state.position[slots], state.seen[slots, tokens] = tokens, positions + 1, 1
        return tokens
    _choose[(rows,)](
        values, ids, state.law, state.seed, slots, positions, tokens, state.last, state.position, state.seen,
        values.shape[1], width, BLOCK=triton.next_power_of_2(values.shape[1]), num_warps=4,
    )  # fmt: skip
    return tokens


def _highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and where they are, in order; first of each chunk, then of those."""
    rows, width = scores.shape
    each = width // CHUNKS
    if width % CHUNKS or each < count:
        return scores.topk(count)
    values, ids = scores.view(rows, CHUNKS, each).topk(count, sorted=False)
    ids += torch.arange(0, width, each, device=ids.device)[:, None]
    values, among = values.flatten(1).topk(count)
    return values, ids.flatten(1).gather(1, among)


def _draw(values: Tensor, ids: Tensor, law: Tensor, seed: int, position: int) -> Tensor:
    temperature, top_p, top_k, _ = law.tolist()
    if temperature == 0:
        return ids[values == values[0]].min()
    scores = values / temperature
    kept: Tensor = values >= values[min(int(top_k), len(values)) - 1]
    p = torch.where(kept, scores, -torch.inf).softmax(0)
    kept &= p.cumsum(0) - p < top_p
    uniform = torch.rand(len(p), generator=torch.Generator().manual_seed(seed * 1_000_003 + position))
    return ids[torch.where(kept, scores - (-uniform.log()).log(), -torch.inf).argmax()]


def _whole(y: Tensor, lora: Lora, who: Tensor) -> Tensor:
    """Sum the parts of y and add each row's own adapter: (N, O) in fp32."""
    whole = y.sum(0)
    if not len(lora.b):
        return whole
    count, outs, rank = lora.b.shape
    plain, halves = whole.split([outs, whole.shape[1] - outs], 1)
    rows = torch.arange(len(who), device=y.device)
    own = halves.view(len(who), count, len(lora.ends), rank)[rows, who.clamp(min=0)]  # (N, G, R)
    b = lora.b[who.clamp(min=0)].float()  # (N, O, R)
    starts = (0, *lora.ends)
    added = [b[:, a:z] @ own[:, g, :, None] for g, (a, z) in enumerate(zip(starts, lora.ends, strict=False))]
    return plain + torch.cat(added, 1)[:, :, 0] * (who >= 0)[:, None]


def _ranks(lora: Lora) -> dict[str, int]:
    _, outs, rank = lora.b.shape
    return {"OUT": outs, "G": len(lora.ends), "R": rank, "RANKS": triton.next_power_of_2(max(rank, 1))}


if triton:

    @triton.jit
    def _product(
        x, w, y, rows, outs, width, each,
        BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, FETCHED: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        o, n = tl.program_id(1) * BO + tl.arange(0, BO), tl.program_id(0) * BN + tl.arange(0, BN)
        if PDL:
            cuda.gdc_launch_dependents()
            if FETCHED:  # the weights depend on no kernel before
                ahead = tl.minimum(o, outs - 1)[:, None] * width + tl.program_id(2) * each
                ahead += tl.arange(0, FETCHED // 64)[None, :] * 64  # in lines of 128 bytes
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [w + ahead],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            cuda.gdc_wait()
        total = tl.zeros((BO, BN), tl.float32)
        for start in range(0, each, BK):
            k = tl.program_id(2) * each + start + tl.arange(0, BK)
            inside = k < width
            tile = tl.load(w + o[:, None] * width + k[None, :], mask=(o < outs)[:, None] & inside[None, :], other=0)
            row = tl.load(x + n[None, :] * width + k[:, None], mask=(n < rows)[None, :] & inside[:, None], other=0)
            total = tl.dot(tile, row, total, input_precision="ieee")
        at = (tl.program_id(2) * rows + n[None, :]) * outs + o[:, None]
        tl.store(y + at, total, mask=(o < outs)[:, None] & (n < rows)[None, :])

    @triton.jit
    def _column(
        y, b, parts, rows, stride, row, column, inside, layer, adapter,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
    ):  # fmt: skip
        """Some outputs of a row: the parts summed, and its adapter added."""
        total = tl.zeros(column.shape, tl.float32)
        for part in range(parts):
            total += tl.load(y + (part * rows + row) * stride + column, mask=inside, other=0)
        if adapter >= 0:
            r = tl.arange(0, RANKS)
            h = tl.zeros((RANKS,), tl.float32)
            for part in range(parts):
                at = (part * rows + row) * stride + OUT + (adapter * G + layer) * R + r
                h += tl.load(y + at, mask=r < R, other=0)
            at = (adapter * OUT + column[:, None]) * R + r[None, :]
            wide = tl.load(b + at, mask=inside[:, None] & (r < R)[None, :], other=0).to(tl.float32)
            total += tl.sum(wide * h[None, :], 1)
        return total

    @triton.jit
    def _turn_and_keep(
        y, bias, b, who, slots, positions, turns, keys, values, q, parts, rows, stride, longest, length,
        H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
        slot, position = tl.load(slots + row), tl.load(positions + row)
        adapter = tl.load(who + slot)
        layer = (head >= H).to(tl.int32) + (head >= H + KV).to(tl.int32)
        column = head * 2 * HALF + i
        one = _column(y, b, parts, rows, stride, row, column, i < HALF, layer, adapter, OUT, G, R, RANKS)
        two = _column(y, b, parts, rows, stride, row, column + HALF, i < HALF, layer, adapter, OUT, G, R, RANKS)
        if BIAS:
            one += tl.load(bias + column)
            two += tl.load(bias + column + HALF)
        cos, sin = tl.load(turns + position * HALF + i), tl.load(turns + (longest + position) * HALF + i)
        if head < H:
            at = q + (row * H + head) * 2 * HALF + i
            tl.store(at, one * cos - two * sin)
            tl.store(at + HALF, two * cos + one * sin)
        elif head < H + KV:
            at = keys + ((slot * KV + head - H) * length + position) * 2 * HALF + i
            tl.store(at, one * cos - two * sin)
            tl.store(at + HALF, two * cos + one * sin)
        else:
            at = values + ((slot * KV + head - H - KV) * length + position) * 2 * HALF + i
            tl.store(at, one)
            tl.store(at + HALF, two)

    @triton.jit
    def _attend(
        q, keys, values, out, slots, positions, length, scale,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        row, kv, i, d = tl.program_id(0), tl.program_id(1), tl.arange(0, 16), tl.arange(0, D)
        slot, position = tl.load(slots + row), tl.load(positions + row)
        at, own = (row * H + kv * GROUP + i[:, None]) * D + d[None, :], (i < GROUP)[:, None]  # heads that share a key
        query = tl.load(q + at, mask=own, other=0)
        cache = (slot * (H // GROUP) + kv) * length * D
        highest, total = tl.full((16,), float("-inf"), tl.float32), tl.zeros((16,), tl.float32)
        summed = tl.zeros((16, D), tl.float32)
        for start in range(0, position + 1, BLOCK):
            s = start + tl.arange(0, BLOCK)
            there = s <= position
            key = tl.load(keys + cache + s[None, :] * D + d[:, None], mask=there[None, :], other=0)
            value = tl.load(values + cache + s[:, None] * D + d[None, :], mask=there[:, None], other=0)
            scores = tl.dot(query, key, input_precision="ieee") * scale
            scores = tl.where(there[None, :], scores, float("-inf"))
            new = tl.maximum(highest, tl.max(scores, 1))
            p, shrink = tl.exp(scores - new[:, None]), tl.exp(highest - new)
            total, highest = total * shrink + tl.sum(p, 1), new
            summed = summed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        tl.store(out + at, summed / total[:, None], mask=own)

    @triton.jit
    def _add_norm(
        x, y, b, who, slots, weight, added, normed, eps, parts, rows, stride, width,
        BLOCK: tl.constexpr, LORA: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        inside, adapter = c < width, -1
        if LORA:
            adapter = tl.load(who + tl.load(slots + row))
        total = tl.load(x + row * width + c, mask=inside, other=0).to(tl.float32)
        total += _column(y, b, parts, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        total = total.to(x.dtype.element_ty).to(tl.float32)
        tl.store(added + row * width + c, total, mask=inside)
        scale = tl.rsqrt(tl.sum(total * total) / width + eps)
        out = total * scale * tl.load(weight + c, mask=inside, other=0).to(tl.float32)
        tl.store(normed + row * width + c, out, mask=inside)

    @triton.jit
    def _swiglu(
        y, b, who, slots, out, parts, rows, stride, width, BLOCK: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, adapter = c < width, tl.load(who + tl.load(slots + row))
        gate = _column(y, b, parts, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        up = _column(y, b, parts, rows, stride, row, c + width, inside, 1, adapter, OUT, G, R, RANKS)
        tl.store(out + row * width + c, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _choose(
        values, ids, law, seed, slots, positions, tokens, last, position, seen, count, vocabulary, BLOCK: tl.constexpr
    ):  # fmt: skip
        row, i = tl.program_id(0), tl.arange(0, BLOCK)
        slot, at = tl.load(slots + row), tl.load(positions + row)
        value = tl.load(values + row * count + i, mask=i < count, other=float("-inf"))
        token = tl.load(ids + row * count + i, mask=i < count, other=2147483647)
        highest = tl.max(value)
        likeliest = tl.min(tl.where(value == highest, token, 2147483647))
        temperature, top_p = tl.load(law + slot * 4), tl.load(law + slot * 4 + 1)
        top_k = tl.load(law + slot * 4 + 2).to(tl.int32)
        scores = (value - highest) / tl.where(temperature == 0, 1.0, temperature)
        kept = value >= tl.min(tl.where(i < tl.minimum(top_k, count), value, float("inf")))
        p = tl.where(kept, tl.exp(scores), 0.0)
        p /= tl.sum(p)
        kept = kept & (tl.cumsum(p) - p < top_p)
        uniform = tl.rand(tl.load(seed + slot), at.to(tl.int32) * BLOCK + i)
        noisy = tl.where(kept, scores - tl.log(-tl.log(tl.maximum(uniform, 1e-10))), float("-inf"))
        drawn = tl.sum(tl.where(i == tl.argmax(noisy, 0), token, 0))
        said = tl.where(temperature == 0, likeliest, drawn)
        tl.store(tokens + row, said)
        tl.store(last + slot, said)
        tl.store(position + slot, at + 1)
        tl.store(seen + slot.to(tl.int64) * vocabulary + said, 1)
