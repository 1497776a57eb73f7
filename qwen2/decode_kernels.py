"""Kernels of the decoder, for a handful of rows at a time: Triton on a GPU, a twin in plain torch elsewhere.

A row is one token of one conversation. Shapes: N rows; K inputs and O outputs of linear layers; S splits of a sum over
K, which the kernel that reads them adds up; G layers side by side; A adapters of rank R; C slots, of which the last is
for padding; D the width of a head. A kernel has the name of its wrapper, in which its twin stands. Each row is summed
in an order of its own, whatever stands beside it: a reply generated among others is to the bit the reply alone.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from qwen2.kernels import Tensor, cuda, pdl, rotate, silu_and_mul, tl, triton, wait_for_previous
from qwen2.rope import rotate as rotate_heads

CANDIDATES = (32, 256)  # the most tokens that top_k can leave; few are found sooner
CHUNK = 2048  # of the vocabulary, in which they are searched side by side
# Tiles of a product, found by trying: at most so many rows, outputs, inputs at once, warps, stages. The order in which
# a row's products are summed is the same in all.
TILES = ((16, 64, 256, 4, 4), (32, 32, 128, 4, 3), (128, 32, 128, 4, 3))
SPLIT_MULTIPLE = 256  # inputs
KEYS = 64  # of the cache at once
PREFETCH = 512  # inputs of each output's weights that are asked for while the kernel waits


class LoraB(NamedTuple):
    """All adapters' B on layers that read the same input; their A are rows of the layers' fused weight."""

    b: Tensor  # (A, O, R), scaling included
    ends: tuple[int, ...]  # where the outputs of each of the G layers end, in O


class SlotState(NamedTuple):
    """What the GPU knows of each conversation."""

    lora_ids: Tensor  # (C,) int32: its adapter, -1 for none
    last_token: Tensor  # (C,) int64: drawn last, read next
    position: Tensor  # (C,) int64: where that one stands
    seen: Tensor  # (C, vocabulary) uint8: what was read or drawn, for the repetition penalty
    sampling_params: Tensor  # (C, 4) fp32: temperature, top_p, top_k, repetition penalty
    seed: Tensor  # (C,) int64


def linear(x: Tensor, weight: Tensor, splits: int = 1) -> Tensor:
    """x (N, K) by weight (O, K): (S, N, O) in fp32, still to be summed over S."""
    rows, width = x.shape
    if not x.is_cuda:
        return functional.linear(x, weight)[None].float()
    y = torch.empty(splits, rows, len(weight), dtype=torch.float32, device=x.device)
    tall, outs, ins, warps, stages = next((tile for tile in TILES if rows <= tile[0]), TILES[-1])
    each = triton.cdiv(triton.cdiv(width, SPLIT_MULTIPLE), splits) * SPLIT_MULTIPLE
    _linear[(triton.cdiv(rows, tall), triton.cdiv(len(weight), outs), splits)](
        x, weight, y, rows, len(weight), width, each,
        BN=tall, BO=outs, BK=ins, PREFETCH=PREFETCH, num_warps=warps, num_stages=stages, **pdl(),
    )  # fmt: skip
    return y


def apply_rope_and_cache_kv(
    y: Tensor, bias: Tensor | None, lora: LoraB, lora_ids: Tensor, slots: Tensor, positions: Tensor, rope_cache: Tensor,
    keys: Tensor, values: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    """Queries, rotated to their positions, (N, heads, D); keys and values go into the cache, (C, kv heads, length, D).

    y (S, N, O + A·G·R) is what `linear` made of queries', keys' and values' weights and all adapters' A. Fuses the sum
    over S, the bias, each row's own adapter (lora_ids (C,), -1 for none), and RoPE (rope_cache (2, length, D/2)).
    """
    rows, (kv_heads, size) = len(slots), keys.shape[1::2]
    if not y.is_cuda:
        qkv = _add_lora(y, lora, lora_ids[slots])
        every = (qkv if bias is None else qkv + bias).unflatten(1, (-1, size))
        rotated = rotate_heads(every[:, : heads + kv_heads], *rope_cache[:, positions]).to(keys.dtype)
        keys[slots, :, positions] = rotated[:, heads:]
        values[slots, :, positions] = every[:, heads + kv_heads :].to(keys.dtype)
        return rotated[:, :heads]
    q = torch.empty(rows, heads, size, dtype=keys.dtype, device=y.device)
    _apply_rope_and_cache_kv[(rows, heads + 2 * kv_heads)](
        y, y if bias is None else bias, lora.b, lora_ids, slots, positions, rope_cache, keys, values, q, len(y), rows,
        y.shape[2], rope_cache.shape[1], keys.shape[2], H=heads, KV=kv_heads, HALF=size // 2, BIAS=bias is not None,
        **_sizes(lora), num_warps=2, **pdl(),
    )  # fmt: skip
    return q


def attention(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Each row's q (N, heads, D) to its slot of the cache up to its own position: (N, heads · D)."""
    rows, heads, size = q.shape
    if not q.is_cuda:
        longest = int(positions.max()) + 1
        k, v = (cache[slots, :, :longest] for cache in (keys, values))
        mask = (torch.arange(longest) <= positions[:, None])[:, None, None]
        each: Tensor = functional.scaled_dot_product_attention(q[:, :, None], k, v, mask, enable_gqa=True)
        return each[:, :, 0].flatten(1)
    out = torch.empty(rows, heads * size, dtype=q.dtype, device=q.device)
    _attention[(rows, keys.shape[1])](
        q, keys, values, out, slots, positions, keys.shape[2], size**-0.5,
        H=heads, GROUP=heads // keys.shape[1], D=size, BLOCK=KEYS, num_warps=4, **pdl(),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, y: Tensor | None, lora: LoraB | None, lora_ids: Tensor, slots: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x (N, hidden) plus what `linear` made in y (S, N, hidden + A·R) with each row's own adapter; and its RMSNorm."""
    if not x.is_cuda:
        x = x if y is None or lora is None else (x + _add_lora(y, lora, lora_ids[slots])).to(x.dtype)
        return x, functional.rms_norm(x.float(), x.shape[1:], weight.float(), eps).to(x.dtype)
    added, normed, (rows, width) = torch.empty_like(x), torch.empty_like(x), x.shape
    sizes = _sizes(lora) if lora else {"OUT": width, "G": 1, "R": 1, "RANKS": 1}
    _add_rms_norm[(rows,)](
        x, y if y is not None else x, lora.b if lora else x, lora_ids, slots, weight, added, normed, eps,
        0 if y is None else len(y), rows, 0 if y is None else y.shape[2], width,
        BLOCK=triton.next_power_of_2(width), LORA=lora is not None and len(lora.b) > 0, **sizes, num_warps=16, **pdl(),
    )  # fmt: skip
    return added, normed


def swiglu(y: Tensor, lora: LoraB, lora_ids: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """SwiGLU, (N, F), of what `linear` made of gate and up in y (S, N, 2F + A·2·R), with each row's own adapter."""
    rows, width = len(slots), lora.ends[0]
    if not y.is_cuda:
        gate, up = _add_lora(y, lora, lora_ids[slots]).chunk(2, 1)
        return (functional.silu(gate) * up).to(dtype)
    out = torch.empty(rows, width, dtype=dtype, device=y.device)
    _swiglu[(rows, triton.cdiv(width, 512))](
        y, lora.b, lora_ids, slots, out, len(y), rows, y.shape[2], width, BLOCK=512, **_sizes(lora), num_warps=4,
        **pdl(),
    )  # fmt: skip
    return out


def sample(y: Tensor, state: SlotState, slots: Tensor, positions: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """Draw the next token of each row from logits y (S, N, vocabulary), note it in the state, and return it, (N,).

    In Qwen2.5's order: repetition penalty, temperature, top_k (at most `count`), top_p; at temperature 0 the likeliest,
    of equals the first. The draw depends on the slot's seed and the position alone. Logits are rounded to `dtype`.
    """
    rows, width = y.shape[1:]
    tokens = torch.empty(rows, dtype=torch.int64, device=y.device)
    if not y.is_cuda:
        penalty, logits = state.sampling_params[slots, 3][:, None], y.sum(0).to(dtype).float()
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        best = torch.where(state.seen[slots] > 0, penalised, logits).topk(min(count, width))
        for row, slot in enumerate(slots.tolist()):
            seed = (int(state.seed[slot]) * 1_000_003 + int(positions[row])) % 2**63
            tokens[row] = _draw(best.values[row], best.indices[row], state.sampling_params[slot], seed)
        state.last_token[slots], state.position[slots], state.seen[slots, tokens] = tokens, positions + 1, 1
        return tokens
    chunks = triton.cdiv(width, CHUNK)
    keys = torch.empty(rows, chunks * count, dtype=torch.int64, device=y.device)
    _highest[(rows, chunks)](
        y, state.sampling_params, state.seen, slots, keys, len(y), rows, width, ROUND=dtype is torch.bfloat16, K=count,
        BLOCK=CHUNK, num_warps=8,
    )  # fmt: skip
    while keys.shape[1] > CHUNK:
        found, chunks = keys, triton.cdiv(keys.shape[1], CHUNK)
        keys = torch.empty(rows, chunks * count, dtype=torch.int64, device=y.device)
        _merge[(rows, chunks)](found, keys, found.shape[1], K=count, BLOCK=CHUNK, num_warps=8)
    _sample[(rows,)](
        keys, state.sampling_params, state.seed, slots, positions, tokens, state.last_token, state.position, state.seen,
        keys.shape[1], width, K=count, BLOCK=triton.next_power_of_2(max(keys.shape[1], count)), num_warps=8,
    )  # fmt: skip
    return tokens


def _draw(values: Tensor, ids: Tensor, params: Tensor, seed: int) -> Tensor:
    """One of the candidates' ids (count,), whose penalised logits are `values`, the highest first."""
    temperature, top_p, top_k, _ = params.tolist()
    if temperature == 0:
        return ids[values == values[0]].min()
    scores = values / temperature
    kept: Tensor = values >= values[min(int(top_k), len(values)) - 1]
    p = torch.where(kept, scores, -torch.inf).softmax(0)
    kept &= p.cumsum(0) - p < top_p
    uniform = torch.rand(len(p), generator=torch.Generator().manual_seed(seed))
    drawn: Tensor = ids[torch.where(kept, scores - (-uniform.log()).log(), -torch.inf).argmax()]
    return drawn


def _add_lora(y: Tensor, lora: LoraB, lora_ids: Tensor) -> Tensor:
    """The sum of y's splits with each row's own adapter (lora_ids (N,)): (N, O) in fp32. Twin of `_column`."""
    whole = y.sum(0)
    if not len(lora.b):
        return whole
    count, outs, rank = lora.b.shape
    plain, h = whole.split([outs, whole.shape[1] - outs], 1)
    own, rows = lora_ids.clamp(min=0), torch.arange(len(lora_ids), device=y.device)
    h = h.view(len(rows), count, len(lora.ends), rank)[rows, own]  # (N, G, R)
    b, starts = lora.b[own].float(), (0, *lora.ends)  # (N, O, R)
    added = [b[:, a:z] @ h[:, g, :, None] for g, (a, z) in enumerate(zip(starts, lora.ends, strict=False))]
    with_own: Tensor = plain + torch.cat(added, 1)[:, :, 0] * (lora_ids >= 0)[:, None]
    return with_own


def _sizes(lora: LoraB) -> dict[str, int]:
    _, outs, rank = lora.b.shape
    return {"OUT": outs, "G": len(lora.ends), "R": rank, "RANKS": triton.next_power_of_2(max(rank, 1))}


if triton:

    @triton.jit
    def _linear(
        x, w, y, rows, outs, width, each,
        BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """A tile (BN rows, BO outputs) of one split of the sum; where it waits, its weights come into L2."""
        o, n = tl.program_id(1) * BO + tl.arange(0, BO), tl.program_id(0) * BN + tl.arange(0, BN)
        if PDL:
            cuda.gdc_launch_dependents()
            if PREFETCH:  # the weights depend on no kernel before
                ahead = tl.minimum(o, outs - 1)[:, None] * width + tl.program_id(2) * each
                ahead += tl.arange(0, PREFETCH // 64)[None, :] * 64  # in lines of 128 bytes
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [w + ahead],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
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
    def _load_lora_b(b, column, inside, adapter, OUT: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr):
        """An adapter's B for some outputs, (columns, RANKS): a weight, which waits for no kernel before."""
        r = tl.arange(0, RANKS)
        own = r < tl.where(adapter >= 0, R, 0)
        at = (adapter * OUT + column[:, None]) * R + r[None, :]
        return tl.load(b + at, mask=inside[:, None] & own[None, :], other=0)

    @triton.jit
    def _column(
        y, lora_b, splits, rows, stride, row, column, inside, layer, adapter,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
    ):  # fmt: skip
        """Some outputs of a row: the splits summed, and its adapter's B (columns, RANKS) times h added."""
        total = tl.zeros(column.shape, tl.float32)
        for split in range(splits):
            total += tl.load(y + (split * rows + row) * stride + column, mask=inside, other=0)
        if adapter >= 0:
            r = tl.arange(0, RANKS)
            h = tl.zeros((RANKS,), tl.float32)
            for split in range(splits):
                at = (split * rows + row) * stride + OUT + (adapter * G + layer) * R + r
                h += tl.load(y + at, mask=r < R, other=0)
            total += tl.sum(lora_b.to(tl.float32) * h[None, :], 1)
        return total

    @triton.jit
    def _apply_rope_and_cache_kv(
        y, bias, b, lora_ids, slots, positions, rope_cache, keys, values, q, splits, rows, stride, longest, length,
        H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One head of one row: a query's, a key's or a value's, as its number says."""
        row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
        slot = tl.load(slots + row)
        adapter = tl.load(lora_ids + slot)
        layer = (head >= H).to(tl.int32) + (head >= H + KV).to(tl.int32)
        column = head * 2 * HALF + i
        b1 = _load_lora_b(b, column, i < HALF, adapter, OUT, R, RANKS)
        b2 = _load_lora_b(b, column + HALF, i < HALF, adapter, OUT, R, RANKS)
        wait_for_previous(PDL)
        position = tl.load(positions + row)
        one = _column(y, b1, splits, rows, stride, row, column, i < HALF, layer, adapter, OUT, G, R, RANKS)
        two = _column(y, b2, splits, rows, stride, row, column + HALF, i < HALF, layer, adapter, OUT, G, R, RANKS)
        if BIAS:
            one += tl.load(bias + column)
            two += tl.load(bias + column + HALF)
        cos = tl.load(rope_cache + position * HALF + i)
        sin = tl.load(rope_cache + (longest + position) * HALF + i)
        if head < H:
            at = q + (row * H + head) * 2 * HALF + i
            one, two = rotate(one, two, cos, sin)
        elif head < H + KV:
            at = keys + ((slot * KV + head - H) * length + position) * 2 * HALF + i
            one, two = rotate(one, two, cos, sin)
        else:
            at = values + ((slot * KV + head - H - KV) * length + position) * 2 * HALF + i
        tl.store(at, one)
        tl.store(at + HALF, two)

    @triton.jit
    def _attention(
        q, keys, values, out, slots, positions, length, scale,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One row's heads that share a key, over BLOCK cached keys at a time (the softmax of FlashAttention)."""
        wait_for_previous(PDL)
        row, kv, i, d = tl.program_id(0), tl.program_id(1), tl.arange(0, 16), tl.arange(0, D)
        slot, position = tl.load(slots + row), tl.load(positions + row)
        at, own = (row * H + kv * GROUP + i[:, None]) * D + d[None, :], (i < GROUP)[:, None]
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
    def _add_rms_norm(
        x, y, b, lora_ids, slots, weight, added, normed, eps, splits, rows, stride, width,
        BLOCK: tl.constexpr, LORA: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One whole row; without y, which has no splits then, its norm alone."""
        row, c = tl.program_id(0), tl.arange(0, BLOCK)
        inside, adapter = c < width, -1
        if LORA:
            adapter = tl.load(lora_ids + tl.load(slots + row))
        lora_b = _load_lora_b(b, c, inside, adapter, OUT, R, RANKS)
        gain = tl.load(weight + c, mask=inside, other=0).to(tl.float32)
        wait_for_previous(PDL)
        total = tl.load(x + row * width + c, mask=inside, other=0).to(tl.float32)
        total += _column(y, lora_b, splits, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        total = total.to(x.dtype.element_ty).to(tl.float32)
        tl.store(added + row * width + c, total, mask=inside)
        scale = tl.rsqrt(tl.sum(total * total) / width + eps)
        tl.store(normed + row * width + c, total * scale * gain, mask=inside)

    @triton.jit
    def _swiglu(
        y, b, lora_ids, slots, out, splits, rows, stride, width, BLOCK: tl.constexpr,
        OUT: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK outputs of a row: gate and up stand `width` apart in y."""
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, adapter = c < width, tl.load(lora_ids + tl.load(slots + row))
        b1 = _load_lora_b(b, c, inside, adapter, OUT, R, RANKS)
        b2 = _load_lora_b(b, c + width, inside, adapter, OUT, R, RANKS)
        wait_for_previous(PDL)
        gate = _column(y, b1, splits, rows, stride, row, c, inside, 0, adapter, OUT, G, R, RANKS)
        up = _column(y, b2, splits, rows, stride, row, c + width, inside, 1, adapter, OUT, G, R, RANKS)
        tl.store(out + row * width + c, silu_and_mul(gate, up), mask=inside)

    @triton.jit
    def _highest(
        y, sampling, seen, slots, keys, splits, rows, width, ROUND: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """The K highest penalised logits of a chunk of the vocabulary, as int64 that order by score, then by token."""
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots + row)
        logit = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            logit += tl.load(y + (split * rows + row).to(tl.int64) * width + c, mask=c < width, other=0)
        if ROUND:
            logit = logit.to(tl.bfloat16).to(tl.float32)
        penalty, known = tl.load(sampling + slot * 4 + 3), tl.load(seen + slot.to(tl.int64) * width + c, mask=c < width)
        penalised = tl.where(logit > 0, logit / penalty, logit * penalty)
        bits = tl.where(known > 0, penalised, logit).to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
        key = tl.where(c < width, order | (0x7FFFFFFF - c).to(tl.int64), -0x7FFFFFFFFFFFFFFF)
        tl.store(keys + (row * tl.num_programs(1) + tl.program_id(1)) * K + tl.arange(0, K), tl.topk(key, K))

    @triton.jit
    def _merge(found, keys, count, K: tl.constexpr, BLOCK: tl.constexpr):
        """The K highest of each BLOCK of what was found, until one block holds all."""
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(found + row * count + c, mask=c < count, other=-0x7FFFFFFFFFFFFFFF)
        tl.store(keys + (row * tl.num_programs(1) + tl.program_id(1)) * K + tl.arange(0, K), tl.topk(key, K))

    @triton.jit
    def _sample(
        keys, sampling, seed, slots, positions, tokens, last_token, position, seen, count, vocabulary,
        K: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row's draw among its K highest, by Gumbel noise (twin: `_draw`), noted in the state."""
        row, c, i = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, K)
        slot, at = tl.load(slots + row), tl.load(positions + row)
        key = tl.topk(tl.load(keys + row * count + c, mask=c < count, other=-0x7FFFFFFFFFFFFFFF), K)
        order = (key >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        token = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        temperature, top_p = tl.load(sampling + slot * 4), tl.load(sampling + slot * 4 + 1)
        top_k = tl.load(sampling + slot * 4 + 2).to(tl.int32)
        real = key != -0x7FFFFFFFFFFFFFFF
        highest = tl.max(tl.where(real, value, float("-inf")))
        scores = (value - highest) / tl.where(temperature == 0, 1.0, temperature)
        kept = real & (value >= tl.min(tl.where(real & (i < top_k), value, float("inf"))))
        p = tl.where(kept, tl.exp(scores), 0.0)
        p /= tl.sum(p)
        kept = kept & (tl.cumsum(p) - p < top_p)
        uniform = tl.rand(tl.load(seed + slot), at.to(tl.int32) * 256 + i)
        noisy = tl.where(kept, scores - tl.log(-tl.log(tl.maximum(uniform, 1e-10))), float("-inf"))
        chosen = tl.where(temperature == 0, 0, tl.argmax(noisy, 0))
        drawn = tl.sum(tl.where(i == chosen, token, 0))
        tl.store(tokens + row, drawn)
        tl.store(last_token + slot, drawn)
        tl.store(position + slot, at + 1)
        tl.store(seen + slot.to(tl.int64) * vocabulary + drawn, 1)
