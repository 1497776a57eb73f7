"""Formats, refusals by file and row, and a split that does not leak."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from chat.persona import SYSTEM_PROMPT
from training import data
from training.data import load, split
from training.formats import Example
from training.reader import Row


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    text = json.dumps(rows, ensure_ascii=False)
    if name.endswith("l"):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


ALPACA = {
    "instruction": "你是谁？",
    "input": "",
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
        ({"instruction": "早", "output": ""}, "line 2, output: is empty"),
        ({"messages": [{"role": "user", "content": "早"}]}, "line 2: holds no question with a reply"),
        ({"messages": [{"role": "robot", "content": "早"}]}, r"line 2, messages\[0\]\.role: is 'robot'"),
        ({"question": "早"}, "line 2: has question"),
        ({"instruction": "早", "output": "早。", "system": "你是狗"}, "line 2, system: is a system prompt of its own"),
        ("[1, 2]", "line 2: is no JSON object"),
        ("{broken", "line 2: is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, said):
    with pytest.raises(ValueError, match=said) as failure:
        load([write(tmp_path, [GOOD, bad])])
    assert "rows.jsonl" in str(failure.value)


def test_all_faults_of_all_files_are_told_at_once_and_the_first_twenty_in_full(tmp_path):
    first = write(tmp_path, [{"output": "x"}, GOOD, {"instruction": "x"}], "first.jsonl")
    second = write(tmp_path, [{"a": n} for n in range(30)], "second.jsonl")
    with pytest.raises(ValueError, match="first") as failure:
        load([first, second])
    lines = str(failure.value).split("\n")
    assert [line.partition(":")[0] for line in lines[:3]] == [
        f"{first}, line 1",
        f"{first}, line 3",
        f"{second}, line 1",
    ]
    assert lines[20:] == ["and 12 more", "--skip-bad-rows leaves these rows out."]


def test_bad_rows_are_skipped_and_counted_if_asked_but_a_broken_file_is_not(tmp_path, caplog):
    rows = write(tmp_path, [{"output": "x"}, GOOD, "{broken", GOOD])
    assert [e.line for e in load([rows], skip_bad_rows=True)] == [2, 4]
    assert "2 rows are left out" in caplog.text and "line 1" in caplog.text
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD])[:-1], encoding="utf-8")
    with pytest.raises(ValueError, match="ends within a list") as failure:
        load([str(tmp_path / "rows.json")], skip_bad_rows=True)
    assert "--skip" not in str(failure.value), "it would not help"


def test_what_is_not_learned_is_said_once_a_file(tmp_path, caplog):
    load([write(tmp_path, [GOOD | {"id": 1}, GOOD | {"id": 2}])])
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["these fields are not learned: id (2)."]


def test_files_of_one_name_keep_all_their_rows_and_one_file_is_one_under_any_name(tmp_path, monkeypatch):
    rows = [{"instruction": f"问{n}", "output": f"答{n}"} for n in range(60)]
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        own = [{"instruction": folder + row["instruction"], "output": folder + row["output"]} for row in rows]
        paths.append(write(tmp_path / folder, own, "train.jsonl"))
    training, held_out = split(load(paths), 20, seed=1)
    assert len(training) + len(held_out) == 120 and len(held_out) == 20
    monkeypatch.chdir(tmp_path)
    training, held_out = split(load([paths[0], "a/train.jsonl"]), 10, seed=1)
    assert len({e.key for e in held_out}) == 10 and len(training) == 100


def test_of_a_folder_the_data_files_are_read_and_what_is_left_is_said(tmp_path, caplog):
    write(tmp_path, [GOOD], "MINE.JSONL")
    write(tmp_path, [GOOD], "huanhuan.json")
    write(tmp_path, [GOOD], "mine.jsonl.bak")
    write(tmp_path, [GOOD], "dataset_info.json")
    (tmp_path / "more.csv").write_text("instruction,output\n早,早安。\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    assert sorted(e.source for e in load([str(tmp_path)])) == ["MINE.JSONL", "huanhuan.json", "more.csv"]
    assert "not read: dataset_info.json, mine.jsonl.bak, sub/." in caplog.text
    with pytest.raises(ValueError, match="sub holds no data file"):
        load([str(tmp_path / "sub")])


def test_a_name_on_the_hub_is_read_and_recorded_by_its_rows(monkeypatch):
    rows = [Row(GOOD)]
    monkeypatch.setattr(data, "read_hub", lambda name: iter(rows if name == "me/talk" else []))
    [example] = load(["me/talk"])
    assert (example.answer, example.where) == ("臣妾。", "me/talk, row 1")
    before = data.record(["me/talk"])
    rows.append(Row(GOOD))
    assert before[0]["file"] == "me/talk" and data.record(["me/talk"]) != before


def test_a_path_may_hold_any_letter_and_no_older_reading_is_kept(tmp_path):
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    path = write(folder, [GOOD], "b[2].jsonl")
    stat = os.stat(path)
    assert load([path])[0].answer == "臣妾。"
    write(folder, [GOOD | {"output": "新答。"}], "b[2].jsonl")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load([path])[0].answer == "新答。"


def test_a_missing_file_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no data file.*or huanhuan") as failure:
        load(["nowhere.jsonl", "nowhere.csv"])
    assert "nowhere.csv" in str(failure.value)


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


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (1, 0), (9, 0), (150, 15), (1999, 199), (3000, 200)])
def test_by_default_a_tenth_is_held_out_and_at_most_200(count, held_out):
    rows = pairs(*((f"问{n}", f"答{n}") for n in range(count)))
    training, validation = split(rows, data.VALIDATION_ROWS, seed=1)
    assert (len(training), len(validation)) == (count - held_out, held_out)


def test_a_number_that_leaves_nothing_to_learn_holds_out_a_tenth():
    training, validation = split(pairs(*((f"问{n}", f"答{n}") for n in range(50))), 60, seed=1)
    assert (len(training), len(validation)) == (45, 5)


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
    with pytest.raises(ValueError, match=r"rows\.json, line 1: is not JSON"):
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


# python -m training.data


@pytest.fixture
def shown(tiny_base, monkeypatch, capsys):
    """A function that runs the command and gives its status, its output and its sentences."""

    def show(*arguments, base=tiny_base):
        monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments), "--base", str(base)])
        status = 0
        try:
            data.main()
        except SystemExit as end:
            status, said = (0, "") if end.code is None else (1, str(end.code))
        else:
            said = ""
        return status, capsys.readouterr().out, said

    return show


def test_the_command_shows_what_would_be_learned(shown, tmp_path):
    path = write(tmp_path, [MESSAGES, GOOD | {"id": 3}])
    status, out, _ = shown(path)
    assert status == 0 and f"{path}: 3 replies to learn" in out and "id (1)" in out
    assert "早<|im_end|>" in out and "learned (10 tokens)  '早安。'\nends on <|im_end|>" in out
    assert json.loads(shown(path, "--json")[1]) == {
        "examples": 3, "learned_replies": 3, "skipped": 0, "cut": 0, "dropped_fields": {"id": 1},
    }  # fmt: skip


def test_the_command_ends_with_status_1_and_every_sentence(shown, tmp_path):
    path = write(tmp_path, [GOOD, {"output": "x"}, {"instruction": "问" * 99, "output": "x"}])
    status, out, said = shown(path, "--json", "--max-length", "200")
    assert status == 1 and "line 2: has output" in said and "line 3: the question takes" in said
    counts = {"examples": 2, "learned_replies": 1, "skipped": 2, "cut": 0, "dropped_fields": {}}
    assert json.loads(out) == counts
    status, out, _ = shown(path, "--json", "--max-length", "200", "--skip-bad-rows")
    assert status == 0 and json.loads(out) == counts


def test_the_command_counts_what_is_cut_and_names_the_flag(shown, tmp_path):
    path = write(tmp_path, [{"instruction": "早", "output": "答" * 300}])
    assert json.loads(shown(path, "--json", "--max-length", "200")[1])["cut"] == 1
    status, out, _ = shown(path, "--max-length", "200")
    assert status == 0 and "1 lose the end of the reply and are not taught to end there" in out
    assert "is cut: no end is learned" in out


def test_the_command_trains_under_own_prompts_only_if_asked(shown, tmp_path):
    path = write(tmp_path, [MESSAGES | {"messages": MESSAGES["messages"][1:], "system": "你是猫"}])
    assert shown(path)[0] == 1 and "--system own" in shown(path)[2]
    status, out, _ = shown(path, "--system", "own")
    assert status == 0 and "<|im_start|>system\\n你是猫<|im_end|>" in out


def test_nothing_to_learn_is_no_success(shown, tmp_path):
    status, _, said = shown(write(tmp_path, [MESSAGES | {"label": False}]))
    assert status == 1 and "no reply is left" in said


def test_without_a_base_the_rows_are_checked_and_the_tokens_are_not_counted(shown, tmp_path):
    path = write(tmp_path, [GOOD])
    assert json.loads(shown(path, "--json", base="small")[1])["cut"] is None
    status, out, _ = shown(path, base="small")
    assert status == 0 and "Tokens were not counted" in out


def test_the_command_needs_neither_torch_nor_datasets(tiny_base, tmp_path):
    code = "import sys; from training.data import main; main(); assert not {'torch', 'datasets'} & sys.modules.keys()"
    command = [sys.executable, "-c", code, write(tmp_path, [GOOD]), "--base", str(tiny_base)]
    assert subprocess.run(command, cwd=data.FULL_FILE.parent.parent, check=True, capture_output=True).stdout
