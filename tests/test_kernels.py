"""Each Triton kernel, in Triton's interpreter, gives what its twin in plain torch gives. `make kernel-test` runs these.

On a GPU the twins are not used, so this is what ties the figures proved without one to what runs there.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

import itertools

import torch

from chat import kernels as serving
from training import kernels as learning

pytestmark = pytest.mark.kernels
TOKENS = 150


@pytest.fixture(autouse=True)
def _drawn():
    torch.manual_seed(0)


@pytest.fixture
def both(monkeypatch):
    """A function that calls another twice, in plain torch and in Triton, and compares what comes back and changes."""

    def compare(call, *given):
        ours = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
        plain = call(*given)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
            triton = call(*ours)
        pairs = [*zip(_tensors(plain), _tensors(triton), strict=True), *zip(given, ours, strict=True)]
        for one, other in pairs:
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-4, check_dtype=False)
        return triton

    return compare


def _tensors(value):
    return value if isinstance(value, tuple | list) else [value]


def rows_of(*cuts):
    """Where the row of each token starts and ends."""
    first, last = (torch.zeros(cuts[-1], dtype=torch.int32) for _ in range(2))
    for a, z in itertools.pairwise(cuts):
        first[a:z], last[a:z] = a, z
    return first, last


def bits(kept, width):
    """What `narrow` kept, as booleans: (G, T, width)."""
    groups, tokens, _ = kept.shape
    lanes = kept.view(groups, tokens, -1, learning.COLUMNS)[:, :, :, None] >> torch.arange(8)[:, None]
    return (lanes & 1).flatten(2)[:, :, :width].bool()


def triton(monkeypatch, call, *given):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        return call(*given)


# Learning


def test_attention_within_rows_and_its_gradients(monkeypatch):
    q, k, v = torch.randn(TOKENS, 8, 32).split([4, 2, 2], 1)
    first, last = rows_of(0, 20, 21, 90, 140, TOKENS)
    dout = torch.randn(TOKENS, 4 * 32)
    out, state = learning.attend(q, k, v, first)
    angles = torch.randn(TOKENS, 16)
    turns = torch.stack([angles.cos(), angles.sin()])
    grads = learning.attend_back(dout, q, k, v, out, state, first, last, turns)
    ours, lse = triton(monkeypatch, learning.attend, q, k, v, first)
    torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-5)
    back = triton(monkeypatch, learning.attend_back, dout, q, k, v, ours, lse, first, last, turns)
    torch.testing.assert_close(back, grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("onto", [None, torch.ones(TOKENS, 96)])
def test_the_way_back_of_a_norm(both, onto):
    x, dy, weight = torch.randn(TOKENS, 96), torch.randn(TOKENS, 96), torch.randn(96)
    rms = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    both(learning.norm_back, dy, x, rms, weight, onto)


@pytest.mark.parametrize(("outs", "rank"), [([128, 64, 64], 8), ([192], 8), ([128, 128], 16)])
def test_the_way_back_of_the_wide_products(both, outs, rank):
    wide, narrow = sum(outs), len(outs) * rank
    both(
        learning.cross, torch.randn(TOKENS, wide), torch.randn(TOKENS, narrow), torch.randn(wide, rank),
        torch.zeros(TOKENS, narrow), torch.zeros(wide, rank), outs,
    )  # fmt: skip


def test_cross_entropy_leaves_its_gradient_and_skips_what_is_not_learned(both):
    targets = torch.tensor([1, 4999, -100, 7, 4096, 0])
    both(learning.cross_entropy_, torch.randn(6, 5000), targets, torch.tensor(5.0))


@pytest.mark.parametrize(("groups", "width"), [(3, 96), (1, 700)])
def test_narrow_products_with_dropout_and_their_way_back(monkeypatch, groups, width):
    x, a, seed = torch.randn(TOKENS, width), torch.randn(groups * 8, width), torch.tensor(5)
    h = torch.zeros(TOKENS, groups * 8)
    kept = triton(monkeypatch, learning.narrow, x, a, h, groups, seed, 0, 0.3, 4.0)
    drawn = bits(kept, width)
    assert drawn.float().mean().item() == pytest.approx(0.7, abs=0.01)
    scaled = drawn.float() * (4 / 0.7)
    expected = torch.einsum("gti,ti,gri->tgr", scaled, x, a.view(groups, 8, width)).flatten(1)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-3)
    dh, ours, plain = torch.randn(TOKENS, groups * 8), [], []
    for side, call, stays in ((plain, learning.widen, drawn), (ours, None, kept)):
        side += [torch.ones(TOKENS, width), torch.zeros(groups * 8, width)]
        given = (x, a, dh, *side, stays, 0.3, 4.0)
        call(*given) if call else triton(monkeypatch, learning.widen, *given)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_swiglu_and_its_way_back(both, monkeypatch):
    width = 700
    gate_up, h, b = torch.randn(TOKENS, 2 * width), torch.randn(TOKENS, 16), torch.randn(2 * width, 8)
    s = both(learning.swiglu, gate_up, h, b)
    a, dout, dh = torch.randn(8, width), torch.randn(TOKENS, width), torch.randn(TOKENS, 8)
    middle = torch.zeros(TOKENS, 8)
    kept = triton(monkeypatch, learning.narrow, s, a, middle, 1, torch.tensor(5), 0, 0.3, 4.0)
    plain, ours = torch.zeros(8, width), torch.zeros(8, width)
    expected = learning.swiglu_back(dout, gate_up, h, b, a, dh, plain, bits(kept, width), 0.3, 4.0)
    back = triton(monkeypatch, learning.swiglu_back, dout, gate_up, h, b, a, dh, ours, kept, 0.3, 4.0)
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_turning_heads_to_their_positions_with_their_lora(both):
    angles, outs = torch.randn(TOKENS, 16), [4 * 32, 2 * 32, 2 * 32]
    qkv, h, b = torch.randn(TOKENS, sum(outs)), torch.randn(TOKENS, 24), torch.randn(sum(outs), 8)
    both(learning.turn_, qkv, h, b, outs, torch.stack([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("adds", [True, False])
def test_a_norm_of_what_a_layer_adds(both, adds):
    added = (torch.randn(TOKENS, 96), torch.randn(TOKENS, 8), torch.randn(8, 96)) if adds else None
    both(learning.add_norm, torch.randn(TOKENS, 96), added, torch.randn(96), 1e-6)


# Serving

HEADS, KV_HEADS, SIZE, ADAPTERS, RANK, CONVERSATIONS, LENGTH = 4, 2, 32, 2, 8, 4, 300
WHO = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
SLOTS, POSITIONS = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([5, 200, 0, 6, 201])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(serving, "TILES", ((16, 16, 32, 4, 4), (32, 16, 64, 4, 4), (128, 32, 64, 4, 3)))
    monkeypatch.setattr(serving, "STRETCH", 64)


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
@pytest.mark.parametrize("parts", [1, 2])
def test_products_of_few_and_many_rows(monkeypatch, small_tiles, rows, parts):
    x, weight = torch.randn(rows, 96), torch.randn(200, 96)
    ours = triton(monkeypatch, serving.product, x, weight, parts)
    assert len(ours) == parts
    torch.testing.assert_close(ours.sum(0), serving.product(x, weight)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
def test_queries_are_turned_and_keys_and_values_kept(both, biased):
    outs = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    lora = serving.Lora(torch.randn(ADAPTERS, sum(outs), RANK), (outs[0], outs[0] + outs[1], sum(outs)))
    y = torch.randn(2, 5, sum(outs) + ADAPTERS * 3 * RANK)
    keys, values = (torch.zeros(CONVERSATIONS, KV_HEADS, LENGTH, SIZE) for _ in range(2))
    bias = torch.randn(sum(outs)) if biased else None
    both(
        serving.turn_and_keep, y, bias, lora, WHO, SLOTS, POSITIONS, torch.randn(2, LENGTH, SIZE // 2), keys, values,
        HEADS,
    )  # fmt: skip


def test_attention_to_the_cache(both):
    keys, values = (torch.randn(CONVERSATIONS, KV_HEADS, LENGTH, SIZE) for _ in range(2))
    both(serving.attend, torch.randn(5, HEADS, SIZE), keys, values, SLOTS, POSITIONS)


def test_adding_and_norming(both):
    x, weight, lora = torch.randn(5, 96), torch.randn(96), serving.Lora(torch.randn(ADAPTERS, 96, RANK), (96,))
    both(serving.add_norm, x, torch.randn(3, 5, 96 + ADAPTERS * RANK), lora, WHO, SLOTS, weight, 1e-6)
    both(serving.add_norm, x, None, None, WHO, SLOTS, weight, 1e-6)


@pytest.mark.parametrize("adapters", [ADAPTERS, 0])
def test_swiglu_of_few_rows(both, adapters):
    rank = RANK if adapters else 0
    lora = serving.Lora(torch.randn(adapters, 1400, rank), (700, 1400))
    y = torch.randn(2, 5, 1400 + adapters * 2 * rank)
    both(serving.swiglu, y, lora, WHO if adapters else torch.full((4,), -1), SLOTS, torch.float32)


def a_state(vocabulary, temperature):
    seen = torch.randint(0, 2, (CONVERSATIONS, vocabulary), dtype=torch.uint8)
    law = torch.tensor([[temperature, 0.8, 20, 1.05]] * CONVERSATIONS)
    last, position = (torch.zeros(CONVERSATIONS, dtype=torch.int64) for _ in range(2))
    return serving.State(WHO, last, position, seen, law, torch.arange(CONVERSATIONS))


@pytest.mark.parametrize("chunk", [128, 1024])  # in several rounds, and in one
def test_the_likeliest_token_is_chosen_and_noted(monkeypatch, chunk):
    monkeypatch.setattr(serving, "CHUNK", chunk)
    logits, states = torch.randn(2, 5, 1_000) * 3, [a_state(1_000, 0.0) for _ in range(2)]
    states[1].seen.copy_(states[0].seen)
    logits[:, 0, 77] = logits[:, 0, 5] = 50.0  # of equals the first
    states[0].seen[SLOTS[0], [5, 77]] = states[1].seen[SLOTS[0], [5, 77]] = 1
    given = (SLOTS, POSITIONS, torch.float32, 32)
    plain = serving.choose(logits, states[0], *given)
    ours = triton(monkeypatch, serving.choose, logits, states[1], *given)
    assert plain.tolist() == ours.tolist() and plain[0] == 5
    assert torch.equal(states[0].seen, states[1].seen) and torch.equal(states[0].last, states[1].last)


def test_draws_follow_the_law_and_depend_on_seed_and_position_alone(monkeypatch):
    monkeypatch.setattr(serving, "CHUNK", 128)
    rows, logits = 300, torch.randn(1, 1, 100) * 2
    top = (logits[0, 0] / 0.7).topk(20)
    p = top.values.softmax(0)
    p = torch.where(p.cumsum(0) - p < 0.8, p, 0.0)
    state = a_state(100, 0.7)
    slots, positions = torch.ones(rows, dtype=torch.int64), torch.arange(rows)
    state.law[:, 3] = 1  # what was drawn before must not count
    many = (logits.expand(1, rows, -1).contiguous(), state, slots, positions, torch.float32, 32)
    drawn = triton(monkeypatch, serving.choose, *many)
    counts = torch.stack([(drawn == token).sum() for token in top.indices]).float()
    expected = p / p.sum() * rows
    assert counts[expected == 0].sum() == 0 and counts.sum() == rows
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 40  # of about 10 degrees of freedom: above it one draw in 50,000
    alone = triton(monkeypatch, serving.choose, logits, state, slots[:1], positions[7:8], torch.float32, 32)
    assert alone[0] == drawn[7]
