"""Files as rows: every line is told by its number, and nothing is read as other than it is written."""

import csv
import gzip
import io
import json

import pytest

from training import reader
from training.reader import Fault, Row, read

GOOD = {"instruction": "你是谁？", "output": "臣妾。"}
LINE = json.dumps(GOOD, ensure_ascii=False)


@pytest.fixture
def reads(tmp_path):
    """A function that reads a file of such content."""

    def read_content(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read(path))

    return read_content


def told(items):
    return [(each.line, each.args[0]) for each in items if isinstance(each, Fault)]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{LINE}\n\n{LINE}\r\n", [1, 3]),
        (f"\ufeff{LINE}\n{LINE}", [1, 2]),
        (f"[{LINE},\n {LINE}]", [1, 2]),
        (json.dumps([GOOD, GOOD], indent=1), [2, 6]),
        (json.dumps(GOOD, indent=1) + "\n" + json.dumps(GOOD, indent=1), [1, 5]),
        (f"[{LINE}]\n[{LINE}]\n", [1, 2]),
        (gzip.compress(f"{LINE}\n{LINE}".encode(), mtime=0), [1, 2]),
    ],
)
def test_rows_are_found_with_their_lines_however_they_are_laid_out(reads, content, lines):
    for name in ("rows.json", "ROWS.JSONL", "rows"):
        assert reads(content, name) == [Row({**GOOD}, line) for line in lines]


def test_a_list_of_messages_is_one_dialogue_and_a_list_of_rows_is_not(reads):
    talk = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早安。"}]
    text = json.dumps(talk) + "\n" + json.dumps([{"messages": talk, "from": "x"}])
    assert [row.value for row in reads(text)] == [talk, {"messages": talk, "from": "x"}]
    assert [row.value for row in reads(json.dumps([talk, talk]))] == [talk, talk]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (f"{LINE}\n\n甲\u2028乙 {{broken\n{LINE}", 3, "is not JSON"),
        (f'{LINE}\n{{"instruction": "早"\n{LINE}', 2, "is not JSON"),
        (f'{LINE}\n{{"instruction": "早\n安", "output": "x"}}\n{LINE}', 2, "Invalid control character"),
        (f'{LINE}\n{{"output": 1, "output": 2}}\n{LINE}', 2, "stands twice"),
        (LINE + '\n{"x": ' + "[" * 100_000 + "\n" + LINE, 2, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_and_those_after_it_are_read(reads, content, line, said):
    rows = reads(content)
    assert [number for number, _ in told(rows)] == [line] and said in told(rows)[0][1]
    assert len([each for each in rows if isinstance(each, Row)]) == 2


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (f"[{LINE},\n{{broken}}, {LINE}]", 2, "is not JSON"),
        (f"[{LINE}\n{LINE}]", 2, "comma is missing"),
        (f"[{LINE},\n]", 1, "nothing follows the comma"),
        (f"[{LINE}\n", 2, "ends within a list"),
        (f"[{LINE},\n {LINE[:9]}", 2, "is not JSON"),
        ("", 0, "is empty"),
        (" \n", 0, "is empty"),
        ("[]", 0, "holds no row"),
        ("PK\x03\x04", 0, "Excel"),
        (gzip.compress(LINE.encode(), mtime=0)[:-9], 0, "no whole gzip"),
    ],
)
def test_what_ends_the_reading_of_a_file_is_fatal(reads, content, line, said):
    last = reads(content, "rows.json")[-1]
    assert isinstance(last, Fault) and last.fatal and said in last.args[0] and last.line == line


@pytest.mark.parametrize(("encoding", "named"), [("gbk", "GB18030"), ("utf-16", "UTF-16"), ("latin-1", "")])
def test_another_encoding_is_told_with_the_line_and_how_to_convert(reads, encoding, named):
    text = '{"instruction": "a", "output": "b"}\n{"instruction": "é", "output": "é"}'
    content = (text if encoding != "gbk" else text.replace("é", "甄")).encode(encoding)
    [fault] = [each for each in reads(content) if isinstance(each, Fault)]
    assert fault.fatal and fault.line == (1 if named == "UTF-16" else 2)
    assert f"iconv -f {named}" in fault.args[0] if named else "iconv" not in fault.args[0]


def test_numbers_stay_as_they_are_written(reads):
    digits = "9" * 5000
    [row] = reads(f'{{"a": 2.50, "b": {digits}, "c": NaN}}')
    assert row.value == {"a": "2.50", "b": digits, "c": "NaN"}


def test_a_file_is_read_piece_by_piece_and_a_row_may_be_longer_than_a_piece(reads, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 7)
    late = [GOOD] * 50 + [GOOD | {"late": "甲" * 300}]
    expected = [Row(each, n + 1) for n, each in enumerate(late)]
    assert reads("\n".join(json.dumps(each, ensure_ascii=False) for each in late)) == expected
    assert [row.value for row in reads(json.dumps(late, indent=2))] == late
    rows = reads(f"{LINE}\n{{broken {'x' * 100}\n{LINE}")
    assert [(type(each), each.line) for each in rows] == [(Row, 1), (Fault, 2), (Row, 3)]


def test_a_row_without_an_end_is_refused_before_it_fills_the_memory(reads, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 10)
    monkeypatch.setattr(reader, "MAX_ROW", 1000)
    kept = []
    more = reader._Buffer.more
    monkeypatch.setattr(reader._Buffer, "more", lambda self, *n: kept.append(len(self.text)) or more(self, *n))
    [fault] = reads('{"output": "' + "甲" * 100_000)
    assert "more than 1,000 characters" in fault.args[0] and max(kept) < 5000


def test_csv_is_read_as_texts_with_their_lines(reads):
    file = io.StringIO()
    csv.writer(file).writerows([["instruction", "output"], ["NA", "007\n行"], ["2024-01-01", "真"], ["x"]])
    rows = reads("\ufeff" + file.getvalue(), "rows.CSV")
    assert rows[:2] == [
        Row({"instruction": "NA", "output": "007\n行"}, 2), Row({"instruction": "2024-01-01", "output": "真"}, 4),
    ]  # fmt: skip
    assert told(rows) == [(5, "has 1 cells, the first line names 2 columns. Correct or delete it.")]
    assert reads("output,output\n1,2", "rows.csv")[-1].fatal
    assert reads("instruction,output\n", "rows.csv")[-1].args == ("holds no row.",)


def test_parquet_is_read_and_a_broken_one_told(reads, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": "早"}]}, {"messages": None}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row.value["messages"] for row in read(tmp_path / "rows.parquet")] == [
        [{"role": "user", "content": "早"}],
        None,
    ]
    [fault] = reads(b"PAR1 nothing PAR1", "broken.parquet")
    assert fault.fatal and "no whole Parquet" in fault.args[0]


def test_a_data_set_of_the_hub_is_read_and_its_failure_is_a_sentence(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [GOOD])
    assert list(reader.read_hub("me/talk")) == [Row(GOOD)] and asked == [("me/talk", "train")]

    def fail(*_, **__):
        raise RuntimeError("Unknown split\ntraceback")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    [fault] = reader.read_hub("me/talk")
    assert fault.fatal and "(Unknown split)" in fault.args[0]
