"""The arithmetic of an evaluation, against numbers worked out by hand."""

import pytest

from training.evaluate import scores
from training.evaluate.scores import bootstrap, counted, distinct, likeness, paired, sign_test, style


def test_style_counts_endings_runs_and_slips():
    numbers = style([("好好好", True), ("作为一个AI，好", False)])
    assert numbers["stop_rate"] == {"value": 0.5, "count": 2}
    assert numbers["assistant_phrase_rate"] == {"value": 0.5, "count": 2}
    assert distinct(["好好好"], 2) == {"value": 0.5, "count": 2}
    assert distinct(["好好好", "坏"], 1) == {"value": 0.5, "count": 4}
    assert distinct([""], 2) == {"value": 0, "count": 0}


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(5, 0, 0.0625), (0, 5, 0.0625), (3, 3, 1), (0, 0, 1), (8, 2, 112 / 1024), (900, 0, 0)]
)
def test_the_sign_test_is_the_exact_binomial(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)


def test_only_pairs_that_differ_enter_the_sign_test():
    base, adapter = [True, False, False, False, True], [True, True, True, False, False]
    assert paired(base, adapter) == {"value": 1.0, "count": 3}
    assert paired([False] * 6, [True] * 6) == {"value": round(2 / 2**6, 4), "count": 6}


def test_an_interval_holds_the_ratio_and_narrows_with_more_rows():
    low, high = bootstrap([10.0, 20.0, 30.0, 40.0] * 5, [10] * 20, seed=1)
    assert 1 < low < 2.5 < high < 4
    narrower = bootstrap([10.0, 20.0, 30.0, 40.0] * 50, [10] * 200, seed=1)
    assert narrower[1] - narrower[0] < (high - low) / 2
    assert bootstrap([2.0, 4.0], [1, 2], seed=1) == (2, 2), "sums over weights, not a mean of sums"
    assert bootstrap([1.0, 0.0] * 20, [1, 99] * 20, seed=1)[1] < 0.05, "nor a mean of ratios"


def test_a_number_is_rounded_with_its_bounds():
    assert counted(1 / 3, 9, (0.1, 2 / 3)) == {"value": 0.3333, "count": 9, "low": 0.1, "high": 0.6667}
    assert counted(float("inf"), 1) == {"value": float("inf"), "count": 1}


def test_likeness_is_chrf_length_and_copies_word_for_word():
    references, learned = ["臣妾谢过皇上的恩典。", "去罢。"], ["臣妾今日身子不适，先告退了。", "好。"]
    same = likeness(references, references, learned)
    assert same["chrf"] == {"value": 100.0, "count": 2} and same["length_ratio"]["value"] == 1
    other = likeness(
        ["臣妾今日身子不适，先告退了。", "臣妾今日身子不爽，先告退了。", "好。"], ["一二三四五六"] * 3, learned
    )
    assert other["copy_rate"] == {"value": 0.5, "count": 2}, "好。 is too short to be a copy"
    assert other["chrf"]["value"] == 0 and other["length_ratio"] == {"value": round(30 / 18, 4), "count": 3}


def test_markers_are_shares_of_replies():
    rates = scores.markers(["本宫乏了，本宫要歇。", "我不知。"])
    assert rates["本宫"] == 0.5 and rates["我"] == 0.5 and rates["臣妾"] == 0
