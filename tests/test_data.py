"""Formats, refusals by file and row, and a split that does not leak."""

import json
from collections import Counter

import pytest

from chat.persona import SYSTEM_PROMPT
from training import data
from training.data import Example, load, split


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    text = json.dumps(rows, ensure_ascii=False)
    if name.endswith("l"):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


ALPACA = {
    "instruction": "你是谁",
    "input": "？",
    "output": "臣妾。",
    "history": [["早", "早安。"]],
    "system": SYSTEM_PROMPT,
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "早"}, {"from": "gpt", "value": "早安。"},
        {"from": "human", "value": "你是谁？"}, {"from": "gpt", "value": "臣妾。"},
    ],
    "system": SYSTEM_PROMPT,
}  # fmt: skip
MESSAGES = {
    "messages": [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "早"}, {"role": "assistant", "content": "早安。"},
        {"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "臣妾。"},
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, MESSAGES], ids=["alpaca", "sharegpt", "messages"])
def test_three_formats_give_the_same_examples(tmp_path, row, name):
    first, last = load([write(tmp_path, [row], name)])
    assert (first.question, first.answer) == ("早", "早安。")
    assert [m["content"] for m in last.messages] == ["早", "早安。", "你是谁？"] and last.answer == "臣妾。"


GOOD = {"instruction": "你是谁？", "output": "臣妾。"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"instruction": "早", "output": ""}, "row 2: a message of the assistant is empty"),
        ({"messages": [{"role": "user", "content": "早"}]}, "row 2: messages must alternate"),
        ({"messages": [{"role": "robot", "content": "早"}]}, "row 2: a message needs 'role'"),
        ({"question": "早"}, "row 2 has"),
        ({"instruction": "早", "output": "早。", "system": "你是狗"}, "row 2 brings a system prompt"),
        ("[1, 2]", "row 2 is no JSON object"),
        ("{broken", "row 2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path, bad, said):
    good = {"messages": MESSAGES["messages"]} if isinstance(bad, dict) and "messages" in bad else GOOD
    with pytest.raises(ValueError, match=said) as failure:
        load([write(tmp_path, [good, bad])])
    assert "rows.jsonl" in str(failure.value)


def test_a_missing_file_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no data file.*or huanhuan"):
        load(["nowhere.jsonl"])


def pairs(*texts):
    return [Example(({"role": "user", "content": q},), a, "own.jsonl", n) for n, (q, a) in enumerate(texts, start=1)]


def test_a_line_never_lands_on_both_sides():
    rows = pairs(*((f"问{n % 60}", f"答{n // 2}") for n in range(200)))
    training, held_out = split(rows, 40, seed=1)
    assert len(training) + len(held_out) == 200 and 20 <= len(held_out) <= 40
    for key in (lambda e: e.question, lambda e: e.answer):
        assert not {key(e) for e in training} & {key(e) for e in held_out}


def test_a_dialogue_stays_together():
    said = [{"role": ("user", "assistant")[n % 2], "content": f"话{n}"} for n in range(7)]
    rows = [
        Example((*said[: 2 * (n % 4)], {"role": "user", "content": f"问{n}"}), f"答{n}", "own.jsonl", n // 4)
        for n in range(80)
    ]
    training, held_out = split(rows, 20, seed=1)
    assert held_out and not {e.row for e in training} & {e.row for e in held_out}


def test_what_stands_often_is_taught_not_tested():
    rows = pairs(*[("你是谁？", "臣妾。")] * 20, *((f"问{n}", f"答{n}") for n in range(10)))
    _, held_out = split(rows, 30, seed=1)
    assert len(held_out) == 10


def test_a_split_is_the_same_for_the_same_seed():
    rows = pairs(*((f"问{n}", f"答{n}") for n in range(50)))
    assert split(rows, 10, seed=7) == split(rows, 10, seed=7) != split(rows, 10, seed=8)


def test_our_own_dialogues_are_whole_and_many():
    examples = load(["dataset"])
    exchanges = Counter((e.source, e.row) for e in examples)
    assert len(exchanges) >= 1500 and sum(count >= 3 for count in exchanges.values()) >= 400


def test_the_full_set_is_fetched_once_and_checked(tmp_path, monkeypatch, file_server):
    monkeypatch.setattr(data, "FULL_FILE", tmp_path / "huanhuan.json")
    body = json.dumps([GOOD]).encode()
    monkeypatch.setattr(data, "FULL_SET", file_server.serve("huanhuan.json", body))
    monkeypatch.setattr(data, "FULL_SHA256", file_server.sha256(body))
    assert load(["huanhuan"])[0].answer == load(["huanhuan"])[0].answer == "臣妾。"
    assert len(file_server.asked) == 1


def test_a_row_may_hold_any_character_and_blank_lines_are_none(tmp_path):
    texts = ["甲\u2028乙", "丙\x85丁"]
    lines = [json.dumps({"instruction": text, "output": "臣妾。"}, ensure_ascii=False) for text in texts]
    (tmp_path / "rows.json").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert [(e.question, e.row) for e in load([str(tmp_path / "rows.json")])] == [(texts[0], 1), (texts[1], 2)]


def test_an_array_that_is_broken_is_named_by_its_file(tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "早"', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json is not JSON"):
        load([str(tmp_path / "rows.json")])


def test_rows_of_the_full_set_are_chosen_by_number_and_a_wrong_number_is_told(tmp_path, monkeypatch):
    pairs = [{"instruction": f"第{n}问", "output": f"第{n}答"} for n in (1, 2, 3)]
    full, rows = tmp_path / "huanhuan.json", tmp_path / "some.rows"
    full.write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(data, "fetch", lambda *_, **__: full)
    rows.write_text("# chosen by reading\n1\n3\n", encoding="utf-8")
    assert [(e.answer, e.row) for e in data.load([str(rows)])] == [("第1答", 1), ("第3答", 3)]
    assert [each["file"] for each in data.record([str(rows)])] == ["some.rows", "huanhuan.json"]
    for wrong in ("4", "1.5", "3a"):
        rows.write_text(f"1\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"names row {wrong}; the full set has rows 1 to 3"):
            data.load([str(rows)])
