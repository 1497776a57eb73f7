"""The preflight checks can fail: a shifted mask, rows that see one another."""

import pytest

from chat.base_model import load_base
from tests.conftest import TAUGHT
from training import preflight
from training.data import load
from training.recipe import TINY
from training.tokens import Encoded, encode


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")


def test_a_shown_row_tells_what_is_read_learned_and_ended(tokenizer, rows):
    shown = preflight.show_row(tokenizer, rows[0])
    assert "你是谁？" in shown.split("learned")[0] and "'臣妾明白。'" in shown and shown.endswith("<|im_end|> (259)")


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shifted_mask_is_caught(tokenizer, rows, shift):
    shifted = [Encoded(row.input_ids, [*row.labels[-shift:], *row.labels[:-shift]]) for row in rows]
    with pytest.raises(ValueError, match="mask does not start"):
        preflight.check_parity(tokenizer, load([str(TAUGHT)]), shifted)


def test_another_template_is_caught(tokenizer, rows):
    cut = [Encoded(row.input_ids[3:], row.labels[3:]) for row in rows]
    with pytest.raises(ValueError, match="Only 0 of 8"):
        preflight.check_parity(tokenizer, load([str(TAUGHT)]), cut)


def test_packed_rows_that_leak_are_caught(checkpoint, rows, monkeypatch):
    model = load_base(checkpoint)
    assert "packed logits equal" in preflight.check_isolation(model, rows[:4])
    flatten = preflight.flatten

    def one_long_row(some):
        flat = flatten(some)
        flat["position_ids"] = flat["position_ids"] * 0 + list(range(flat["position_ids"].shape[1]))[-1]
        return {name: value for name, value in flat.items() if name != "position_ids"}

    monkeypatch.setattr(preflight, "flatten", one_long_row)
    with pytest.raises(ValueError, match="see one another"):
        preflight.check_isolation(model, rows[:4])


def test_the_histogram_counts_every_row_and_token(rows):
    text = preflight.histogram(rows)
    assert f"{sum(len(row.input_ids) for row in rows):,} tokens an epoch" in text
    assert sum(int(line.split()[-1]) for line in text.splitlines()[:-1]) == 8


@pytest.mark.parametrize(("seconds", "said"), [(43.4, "43 s"), (119.9, "120 s"), (222, "3.7 min")])
def test_a_forecast_tells_seconds_where_minutes_would_hide_them(seconds, said):
    assert str(preflight.Forecast(3, 1000, seconds, 2 * 10**9)) == f"3 steps, 1,000 tokens, {said}, 2.0 GB"


def test_the_forecast_counts_steps_as_trainer_does_and_leaves_no_gradient(checkpoint, rows):
    from training.trainer import attach

    model = attach(load_base(checkpoint), TINY)
    expected = preflight.forecast(model, rows, TINY)
    assert expected.steps == 2 * TINY.epochs and expected.seconds > 0 and expected.memory > 10**8
    assert all(p.grad is None for p in model.parameters())
