"""Each Triton kernel, in Triton's interpreter, gives what its twin in plain torch gives. `make kernel-test` runs these.

On a GPU the twins are not used, so this is what ties the figures proved without one to what runs there.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

import itertools

import torch

from qwen2 import decode_kernels as decoding
from qwen2 import training_kernels as training

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
    row_start, row_end = (torch.zeros(cuts[-1], dtype=torch.int32) for _ in range(2))
    for a, z in itertools.pairwise(cuts):
        row_start[a:z], row_end[a:z] = a, z
    return row_start, row_end


def bits(kept, width):
    """What `lora_a` kept, as booleans: (G, T, width)."""
    groups, tokens, _ = kept.shape
    lanes = kept.view(groups, tokens, -1, training.COLUMNS)[:, :, :, None] >> torch.arange(8)[:, None]
    return (lanes & 1).flatten(2)[:, :, :width].bool()


def triton(monkeypatch, call, *given):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        return call(*given)


# Training


def test_attention_within_rows_and_its_gradients(monkeypatch):
    q, k, v = torch.randn(TOKENS, 8, 32).split([4, 2, 2], 1)
    row_start, row_end = rows_of(0, 20, 21, 90, 140, TOKENS)
    dout = torch.randn(TOKENS, 4 * 32)
    out, state = training.attention(q, k, v, row_start)
    angles = torch.randn(TOKENS, 16)
    rows = (row_start, row_end, torch.stack([angles.cos(), angles.sin()]))
    grads = training.attention_backward(dout, q, k, v, out, state, *rows)
    ours, lse = triton(monkeypatch, training.attention, q, k, v, row_start)
    torch.testing.assert_close(ours, out, rtol=1e-5, atol=1e-5)
    back = triton(monkeypatch, training.attention_backward, dout, q, k, v, ours, lse, *rows)
    torch.testing.assert_close(back, grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("onto", [None, torch.ones(TOKENS, 96)])
def test_the_backward_pass_of_a_norm(both, onto):
    x, dy, weight = torch.randn(TOKENS, 96), torch.randn(TOKENS, 96), torch.randn(96)
    rms = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    both(training.rms_norm_backward, dy, x, rms, weight, onto)


@pytest.mark.parametrize(("outs", "rank"), [([128, 64, 64], 8), ([192], 8), ([128, 128], 16)])
def test_the_backward_pass_of_products_with_b(both, outs, rank):
    out, ranks = sum(outs), len(outs) * rank
    both(
        training.lora_b_backward, torch.randn(TOKENS, out), torch.randn(TOKENS, ranks), torch.randn(out, rank),
        torch.zeros(TOKENS, ranks), torch.zeros(out, rank), outs,
    )  # fmt: skip


def test_cross_entropy_leaves_its_gradient_and_skips_what_is_no_target(both):
    targets = torch.tensor([1, 4999, -100, 7, 4096, 0])
    both(training.cross_entropy_, torch.randn(6, 5000), targets, torch.tensor(5.0))


@pytest.mark.parametrize(("groups", "width"), [(3, 96), (1, 700)])
def test_products_with_a_and_their_dropout_forward_and_backward(monkeypatch, groups, width):
    x, a, seed = torch.randn(TOKENS, width), torch.randn(groups * 8, width), torch.tensor(5)
    h = torch.zeros(TOKENS, groups * 8)
    kept = triton(monkeypatch, training.lora_a, x, a, h, groups, seed, 0, 0.3, 4.0)
    drawn = bits(kept, width)
    assert drawn.float().mean().item() == pytest.approx(0.7, abs=0.01)
    scaled = drawn.float() * (4 / 0.7)
    expected = torch.einsum("gti,ti,gri->tgr", scaled, x, a.view(groups, 8, width)).flatten(1)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-3)
    dh, ours, plain = torch.randn(TOKENS, groups * 8), [], []
    for side, call, stays in ((plain, training.lora_a_backward, drawn), (ours, None, kept)):
        side += [torch.ones(TOKENS, width), torch.zeros(groups * 8, width)]
        given = (x, a, dh, *side, stays, 0.3, 4.0)
        call(*given) if call else triton(monkeypatch, training.lora_a_backward, *given)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_swiglu_and_its_backward_pass(both, monkeypatch):
    width = 700
    gate_up, h, b = torch.randn(TOKENS, 2 * width), torch.randn(TOKENS, 16), torch.randn(2 * width, 8)
    s = both(training.swiglu, gate_up, h, b)
    a, dout, dh = torch.randn(8, width), torch.randn(TOKENS, width), torch.randn(TOKENS, 8)
    middle = torch.zeros(TOKENS, 8)
    kept = triton(monkeypatch, training.lora_a, s, a, middle, 1, torch.tensor(5), 0, 0.3, 4.0)
    plain, ours = torch.zeros(8, width), torch.zeros(8, width)
    expected = training.swiglu_backward(dout, gate_up, h, b, a, dh, plain, bits(kept, width), 0.3, 4.0)
    back = triton(monkeypatch, training.swiglu_backward, dout, gate_up, h, b, a, dh, ours, kept, 0.3, 4.0)
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_rotating_heads_to_their_positions_with_their_lora(both):
    angles, outs = torch.randn(TOKENS, 16), [4 * 32, 2 * 32, 2 * 32]
    qkv, h, b = torch.randn(TOKENS, sum(outs)), torch.randn(TOKENS, 24), torch.randn(sum(outs), 8)
    both(training.apply_rope_, qkv, h, b, outs, torch.stack([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("adds", [True, False])
def test_a_norm_of_what_a_layer_adds(both, adds):
    added = [torch.randn(TOKENS, 96), torch.randn(TOKENS, 8), torch.randn(8, 96)]
    added = training.LoraOutput(*added) if adds else None
    both(training.add_rms_norm, torch.randn(TOKENS, 96), added, torch.randn(96), 1e-6)


# Decoding

HEADS, KV_HEADS, SIZE, ADAPTERS, RANK, NUM_SLOTS, LENGTH = 4, 2, 32, 2, 8, 4, 300
LORA_IDS = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
SLOTS, POSITIONS = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([5, 200, 0, 6, 201])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(decoding, "TILES", ((16, 16, 32, 4, 4), (32, 16, 64, 4, 4), (128, 32, 64, 4, 3)))
    monkeypatch.setattr(decoding, "SPLIT_MULTIPLE", 64)


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
@pytest.mark.parametrize("splits", [1, 2])
def test_products_of_few_and_many_rows(monkeypatch, small_tiles, rows, splits):
    x, weight = torch.randn(rows, 96), torch.randn(200, 96)
    ours = triton(monkeypatch, decoding.linear, x, weight, splits)
    assert len(ours) == splits
    torch.testing.assert_close(ours.sum(0), decoding.linear(x, weight)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
def test_queries_are_rotated_and_keys_and_values_cached(both, biased):
    outs = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    lora = decoding.LoraB(torch.randn(ADAPTERS, sum(outs), RANK), (outs[0], outs[0] + outs[1], sum(outs)))
    y = torch.randn(2, 5, sum(outs) + ADAPTERS * 3 * RANK)
    keys, values = (torch.zeros(NUM_SLOTS, KV_HEADS, LENGTH, SIZE) for _ in range(2))
    bias = torch.randn(sum(outs)) if biased else None
    both(
        decoding.apply_rope_and_cache_kv, y, bias, lora, LORA_IDS, SLOTS, POSITIONS,
        torch.randn(2, LENGTH, SIZE // 2), keys, values, HEADS,
    )  # fmt: skip


def test_attention_to_the_cache(both):
    keys, values = (torch.randn(NUM_SLOTS, KV_HEADS, LENGTH, SIZE) for _ in range(2))
    both(decoding.attention, torch.randn(5, HEADS, SIZE), keys, values, SLOTS, POSITIONS)


def test_adding_and_norming(both):
    x, weight, lora = torch.randn(5, 96), torch.randn(96), decoding.LoraB(torch.randn(ADAPTERS, 96, RANK), (96,))
    both(decoding.add_rms_norm, x, torch.randn(3, 5, 96 + ADAPTERS * RANK), lora, LORA_IDS, SLOTS, weight, 1e-6)
    both(decoding.add_rms_norm, x, None, None, LORA_IDS, SLOTS, weight, 1e-6)


@pytest.mark.parametrize("adapters", [ADAPTERS, 0])
def test_swiglu_of_few_rows(both, adapters):
    rank = RANK if adapters else 0
    lora = decoding.LoraB(torch.randn(adapters, 1400, rank), (700, 1400))
    y = torch.randn(2, 5, 1400 + adapters * 2 * rank)
    both(decoding.swiglu, y, lora, LORA_IDS if adapters else torch.full((4,), -1), SLOTS, torch.float32)


def a_state(vocabulary, temperature):
    seen = torch.randint(0, 2, (NUM_SLOTS, vocabulary), dtype=torch.uint8)
    params = torch.tensor([[temperature, 0.8, 20, 1.05]] * NUM_SLOTS)
    last_token, position = (torch.zeros(NUM_SLOTS, dtype=torch.int64) for _ in range(2))
    return decoding.SlotState(LORA_IDS, last_token, position, seen, params, torch.arange(NUM_SLOTS))


@pytest.mark.parametrize("chunk", [128, 1024])  # in several rounds, and in one
def test_the_likeliest_token_is_drawn_and_noted(monkeypatch, chunk):
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    logits, states = torch.randn(2, 5, 1_000) * 3, [a_state(1_000, 0.0) for _ in range(2)]
    states[1].seen.copy_(states[0].seen)
    logits[:, 0, 77] = logits[:, 0, 5] = 50.0  # of equals the first
    states[0].seen[SLOTS[0], [5, 77]] = states[1].seen[SLOTS[0], [5, 77]] = 1
    given = (SLOTS, POSITIONS, torch.float32, 32)
    plain = decoding.sample(logits, states[0], *given)
    ours = triton(monkeypatch, decoding.sample, logits, states[1], *given)
    assert plain.tolist() == ours.tolist() and plain[0] == 5
    assert torch.equal(states[0].seen, states[1].seen) and torch.equal(states[0].last_token, states[1].last_token)


def test_draws_follow_the_sampling_parameters_and_depend_on_seed_and_position_alone(monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 128)
    rows, logits = 300, torch.randn(1, 1, 100) * 2
    top = (logits[0, 0] / 0.7).topk(20)
    p = top.values.softmax(0)
    p = torch.where(p.cumsum(0) - p < 0.8, p, 0.0)
    state = a_state(100, 0.7)
    slots, positions = torch.ones(rows, dtype=torch.int64), torch.arange(rows)
    state.sampling_params[:, 3] = 1  # what was drawn before must not count
    many = (logits.expand(1, rows, -1).contiguous(), state, slots, positions, torch.float32, 32)
    drawn = triton(monkeypatch, decoding.sample, *many)
    counts = torch.stack([(drawn == token).sum() for token in top.indices]).float()
    expected = p / p.sum() * rows
    assert counts[expected == 0].sum() == 0 and counts.sum() == rows
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 40  # of about 10 degrees of freedom: above it one draw in 50,000
    alone = triton(monkeypatch, decoding.sample, logits, state, slots[:1], positions[7:8], torch.float32, 32)
    assert alone[0] == drawn[7]
