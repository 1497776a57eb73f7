"""Operations of the decoder, for a handful of rows at a time: Triton on a GPU, plain torch elsewhere.

A row is one token of one conversation. Shapes: N rows, K inputs, O outputs, S parts of a sum over K that whoever reads
it adds up, A adapters of rank R, C conversations of which the last is for padding. Every row is computed in an order
of its own, whatever stands beside it, so a reply in company is to the bit the reply alone.
"""

# Triton's functions have their own types, and constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda
except ImportError:  # torch brings Triton where it has a GPU for it
    triton = None

Tensor = torch.Tensor
CANDIDATES = (32, 256)  # the most tokens that top_k can leave; few are found sooner
CHUNK = 2048  # of the vocabulary, in which they are searched side by side
# Tiles of a product, found by trying: at most so many rows, outputs, inputs at once, warps, stages. The order in which
# a row's products are summed is the same in all.
TILES = ((16, 64, 256, 4, 4), (32, 32, 128, 4, 3), (128, 32, 128, 4, 3))
STRETCH = 256  # inputs; a part of a sum is a multiple
CONTEXT = 64  # keys at once
FETCHED = 512  # inputs of each output's weights that are asked for while it waits


@cache
def early() -> dict[str, bool]:
    """Whether a kernel may be launched while the one before it ends (programmatic dependent launch, from Hopper on)."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": hopper, "launch_pdl": hopper}


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
        BN=tall, BO=outs, BK=ins, FETCHED=FETCHED, num_warps=warps, num_stages=stages, **early(),
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
        **_ranks(lora), num_warps=2, **early(),
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
        H=heads, GROUP=heads // keys.shape[1], D=size, BLOCK=CONTEXT, num_warps=4, **early(),
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
        BLOCK=triton.next_power_of_2(width), LORA=lora is not None and len(lora.b) > 0, **tile, num_warps=16, **early(),
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
        y, lora.b, who, slots, out, len(y), rows, y.shape[2], width, BLOCK=512, **_ranks(lora), num_warps=4, **early(),
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


def choose(y: Tensor, state: State, slots: Tensor, positions: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Draw the next token of each row from logits y (S, N, vocabulary), note it in the state, and return it, (N,).

    In Qwen2.5's order: repetition penalty, temperature, top_k (at most `count`), top_p; at temperature 0 the likeliest,
    of equals the first. The draw depends on the conversation's seed and position alone. Logits are rounded to `dtype`.
    """
    rows, width = y.shape[1:]
    tokens = torch.empty(rows, dtype=torch.int64, device=y.device)
    if not y.is_cuda:
        penalty, logits = state.law[slots, 3][:, None], y.sum(0).to(dtype).float()
        fined = torch.where(logits > 0, logits / penalty, logits * penalty)
        best = torch.where(state.seen[slots] > 0, fined, logits).topk(min(count, width))
        for row, slot in enumerate(slots.tolist()):
            values, ids = best.values[row], best.indices[row]
            tokens[row] = _draw(values, ids, state.law[slot], int(state.seed[slot]), int(positions[row]))
        state.last[slots], state.position[slots], state.seen[slots, tokens] = tokens, positions + 1, 1
        return tokens
    chunks = triton.cdiv(width, CHUNK)
    keys = torch.empty(rows, chunks * count, dtype=torch.int64, device=y.device)
    _highest[(rows, chunks)](
        y, state.law, state.seen, slots, keys, len(y), rows, width, ROUND=dtype is torch.bfloat16, K=count, BLOCK=CHUNK,
        num_warps=8,
    )  # fmt: skip
    while keys.shape[1] > CHUNK:
        found, chunks = keys, triton.cdiv(keys.shape[1], CHUNK)
        keys = torch.empty(rows, chunks * count, dtype=torch.int64, device=y.device)
        _merge[(rows, chunks)](found, keys, found.shape[1], K=count, BLOCK=CHUNK, num_warps=8)
    _choose[(rows,)](
        keys, state.law, state.seed, slots, positions, tokens, state.last, state.position, state.seen,
        keys.shape[1], width, K=count, BLOCK=triton.next_power_of_2(max(keys.shape[1], count)), num_warps=8,
    )  # fmt: skip
    return tokens


def _draw(values: Tensor, ids: Tensor, law: Tensor, seed: int, position: int) -> Tensor:
    temperature, top_p, top_k, _ = law.tolist()
    if temperature == 0:
        return ids[values == values[0]].min()
    scores = values / temperature
    kept: Tensor = values >= values[min(int(top_k), len(values)) - 1]
    p = torch.where(kept, scores, -torch.inf).softmax(0)
    kept &= p.cumsum(0) - p < top_p
    uniform = torch.rand(len(p), generator=torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63))
    drawn: Tensor = ids[torch.where(kept, scores - (-uniform.log()).log(), -torch.inf).argmax()]
    return drawn


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
    with_own: Tensor = plain + torch.cat(added, 1)[:, :, 0] * (who >= 0)[:, None]
    return with_own


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
    def _second(b, column, inside, adapter, OUT: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr):
        """An adapter's second half for some outputs, which waits for no kernel."""
        r = tl.arange(0, RANKS)
        own = r < tl.where(adapter >= 0, R, 0)
        at = (adapter * OUT + column[:, None]) * R + r[None, :]
        return tl.load(b + at, mask=inside[:, None] & own[None, :], other=0)

    @triton.jit
    def _column(
        y, wide, parts, rows, stride, row, column, inside, layer, adapter,
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
            total += tl.sum(wide.to(tl.float32) * h[None, :], 1)
        return total

    @triton.jit
    def _turn_and_keep(
        y, bias, b, who, slots, positions, turns, keys, values, q, parts, rows, stride, longest, length,
        H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
        slot = tl.load(slots + row)
        adapter = tl.load(who + slot)
        layer = (head >= H).to(tl.int32) + (head >= H + KV).to(tl.int32)
        column = head * 2 * HALF + i
        wide1 = _second(b, column, i < HALF, adapter, OUT, R, RANKS)
        wide2 = _second(b, column + HALF, i < HALF, adapter, OUT, R, RANKS)
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        position = tl.load(positions + row)
        one = _column(y, wide1, parts, rows, stride, row, column, i < HALF, layer, adapter, OUT, G, R, RANKS)
        two = _column(y, wide2, parts, rows, stride, row, column + HALF, i < HALF, layer, adapter, OUT, G, R, RANKS)
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
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        inside, adapter = c < width, -1
        if LORA:
            adapter = tl.load(who + tl.load(slots + row))
        wide = _second(b, c, inside, adapter, OUT, R, RANKS)
        gain = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        total = tl.load(x + row * width + c, mask=inside, other=0).to(tl.float32)
        total += _column(y, wide, parts, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        total = total.to(x.dtype.element_ty).to(tl.float32)
        tl.store(added + row * width + c, total, mask=inside)
        scale = tl.rsqrt(tl.sum(total * total) / width + eps)
        out = total * scale * gain
        tl.store(normed + row * width + c, out, mask=inside)

    @triton.jit
    def _swiglu(
        y, b, who, slots, out, parts, rows, stride, width, BLOCK: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, adapter = c < width, tl.load(who + tl.load(slots + row))
        wide1 = _second(b, c, inside, adapter, OUT, R, RANKS)
        wide2 = _second(b, c + width, inside, adapter, OUT, R, RANKS)
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()
        gate = _column(y, wide1, parts, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        up = _column(y, wide2, parts, rows, stride, row, c + width, inside, 1, adapter, OUT, G, R, RANKS)
        tl.store(out + row * width + c, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _highest(
        y, law, seen, slots, keys, parts, rows, width, ROUND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """The highest scores of a chunk of the vocabulary, as numbers that order by score, then by token."""
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots + row)
        logit = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            logit += tl.load(y + (part * rows + row).to(tl.int64) * width + c, mask=c < width, other=0)
        if ROUND:
            logit = logit.to(tl.bfloat16).to(tl.float32)
        penalty, known = tl.load(law + slot * 4 + 3), tl.load(seen + slot.to(tl.int64) * width + c, mask=c < width)
        fined = tl.where(logit > 0, logit / penalty, logit * penalty)
        bits = tl.where(known > 0, fined, logit).to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
        key = tl.where(c < width, order | (0x7FFFFFFF - c).to(tl.int64), -0x7FFFFFFFFFFFFFFF)
        tl.store(keys + (row * tl.num_programs(1) + tl.program_id(1)) * K + tl.arange(0, K), tl.topk(key, K))

    @triton.jit
    def _merge(found, keys, count, K: tl.constexpr, BLOCK: tl.constexpr):
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(found + row * count + c, mask=c < count, other=-0x7FFFFFFFFFFFFFFF)
        tl.store(keys + (row * tl.num_programs(1) + tl.program_id(1)) * K + tl.arange(0, K), tl.topk(key, K))

    @triton.jit
    def _choose(
        keys, law, seed, slots, positions, tokens, last, position, seen, count, vocabulary,
        K: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, c, i = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, K)
        slot, at = tl.load(slots + row), tl.load(positions + row)
        key = tl.topk(tl.load(keys + row * count + c, mask=c < count, other=-0x7FFFFFFFFFFFFFFF), K)
        order = (key >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        token = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        temperature, top_p = tl.load(law + slot * 4), tl.load(law + slot * 4 + 1)
        top_k = tl.load(law + slot * 4 + 2).to(tl.int32)
        real = key != -0x7FFFFFFFFFFFFFFF
        highest = tl.max(tl.where(real, value, float("-inf")))
        scores = (value - highest) / tl.where(temperature == 0, 1.0, temperature)
        kept = real & (value >= tl.min(tl.where(real & (i < top_k), value, float("inf"))))
        p = tl.where(kept, tl.exp(scores), 0.0)
        p /= tl.sum(p)
        kept = kept & (tl.cumsum(p) - p < top_p)
        uniform = tl.rand(tl.load(seed + slot), at.to(tl.int32) * 256 + i)
        noisy = tl.where(kept, scores - tl.log(-tl.log(tl.maximum(uniform, 1e-10))), float("-inf"))
        picked = tl.where(temperature == 0, 0, tl.argmax(noisy, 0))
        said = tl.sum(tl.where(i == picked, token, 0))
        tl.store(tokens + row, said)
        tl.store(last + slot, said)
        tl.store(position + slot, at + 1)
        tl.store(seen + slot.to(tl.int64) * vocabulary + said, 1)
