"""Everyday talk: the rules, the sheets for readers, and their marks back."""

import json
import re

import pytest

from chat.adapter import METRICS
from training.evaluate import blind, talk


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("最疼你，最疼你，最疼你，别哭", True),
        ("坐近些坐近些坐近些", True),
        ("慢慢来，慢慢来。", False),
        ("好好好，依你", False),  # one letter is no phrase
        ("我想想…………", False),
        ("", False),
    ],
)
def test_a_phrase_three_times_running_is_a_loop(text, looping):
    assert talk.loops(text) is looping


def test_rules_see_a_cut_reply_one_given_twice_and_a_stock_line():
    lines = [("臣妾给皇上请安。", True), ("且坐。", True), ("且坐。", True), ("说来话长", False)]
    metrics = {name: value["value"] for name, value in talk.talk_metrics(talk.Talk(lines, [])).items()}
    assert metrics == {"talk_cut_rate": 0.25, "talk_repeat_rate": 0.5, "talk_stock_rate": 0.25}


def test_the_own_line_explains_a_reply_that_repeats_it_better_than_other_lines_do(monkeypatch):
    """The base is one that finds a reply likely as far as the line holds its letters."""

    class Row:
        def __init__(self, example):
            own = sum(letter in example.question for letter in example.answer)
            self.text, self.tokens = 3.0 * len(example.answer) - 2.0 * own, len(example.answer)

    monkeypatch.setattr(talk, "encode", lambda _, examples, *__: examples)
    monkeypatch.setattr(talk, "row_losses", lambda _, rows, batch_size: [Row(row) for row in rows])
    echo = talk.Talk([(line, True) for line in talk.LINES[:6]], [])
    shuffled = talk.Talk([(line, True) for line in talk.LINES[60:66]], [])
    assert talk.talk_pmi(None, None, echo)["value"] > 1 > 0.2 > talk.talk_pmi(None, None, shuffled)["value"]


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "her"
    folder.mkdir()
    lines = [{"line": f"第{n}问", "reply": f"好{n}", "base_reply": f"坏{n}"} for n in range(4)]
    metrics = {"talk_lines": lines, "talks": [lines[:2]]}
    (folder / METRICS).write_text(json.dumps(metrics, ensure_ascii=False), encoding="utf-8")
    return folder


def marks_by_text(sheet, marks):
    """A reader's file that marks the items of a sheet by what stands in them."""
    found = re.findall(r"^## (\d+)\n\n(.*?)(?=\n\n## |\Z)", sheet, re.MULTILINE | re.DOTALL)
    return "\n".join(f"{number} {marks(text)}" for number, text in found)


def test_marks_come_back_to_the_side_that_earned_them(measured, tmp_path):
    assert blind.write(tmp_path / "blind", [measured]) == 2 * (4 + 1)
    sheet = (tmp_path / "blind" / blind.SHEET).read_text(encoding="utf-8")
    assert "her" not in sheet.split("## 1")[1] and "base" not in sheet.split("## 1")[1]
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text(marks_by_text(sheet, lambda text: 2 if "好" in text else 0), encoding="utf-8")
    second.write_text(marks_by_text(sheet, lambda text: 1 if "好" in text else 0), encoding="utf-8")
    numbers = blind.read(tmp_path / "blind", [first, second])[str(measured)]
    assert numbers["talk_mark"]["value"] == 1.5 and numbers["talk_mark"]["count"] == 4
    assert numbers["talk_mark_base"]["value"] == 0 and numbers["talk_zero_rate_base"]["value"] == 1
    assert numbers["six_turn_mark"]["value"] == 1.5 and numbers["six_turn_mark"]["count"] == 1
    assert numbers["talk_zero_rate"] == {"value": 0, "count": 8}
    assert numbers["talk_agreement"] == {"value": 0.5, "count": 10}


@pytest.mark.parametrize("text", ["1 2\n2 1\n", "\n".join(f"{n} 3" for n in range(1, 11))])
def test_a_mark_that_is_missing_or_none_is_told(measured, tmp_path, text):
    blind.write(tmp_path / "blind", [measured])
    marks = tmp_path / "marks.txt"
    marks.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="has no mark"):
        blind.read(tmp_path / "blind", [marks])


def test_an_item_marked_twice_is_told(measured, tmp_path):
    count = blind.write(tmp_path / "blind", [measured])
    marks = tmp_path / "marks.txt"
    marks.write_text("\n".join(f"{n} 1" for n in range(1, count + 1)) + "\n3 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="marks an item twice"):
        blind.read(tmp_path / "blind", [marks])


def test_an_adapter_measured_before_is_told_what_to_run(tmp_path):
    (tmp_path / METRICS).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="without everyday talk"):
        blind.items(tmp_path)
