"""Files to rows: JSON and JSON Lines read strictly and as a stream, CSV, Parquet, and data sets of the Hub.

Nothing is guessed and nothing is cached: a number stays as it is written, and a key that stands twice is a fault.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # characters read at a time
MAX_ROW = 1 << 26  # characters of one row; longer ones are refused, so that memory is bounded
JSON = (".json", ".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}  # with their delimiters
PARQUET = ".parquet"
SUFFIXES = (*JSON, *TABLES, PARQUET)
CONVERT = (
    'Write one exchange a line, {"instruction": "…", "output": "…"}, in UTF-8, as a .jsonl file, or save a table with '
    "those two columns as CSV in UTF-8."
)
SPACE = re.compile(r"[ \t\r\n]*")
NEXT_ROW = re.compile(r"\n[{\[]")
TRUNCATED = 16  # characters before the end of the text read so far, in which a value may have been cut


class Number(str):
    """A JSON number as it is written: 007, 1e400 and 2.50 stay themselves as text."""

    __slots__ = ()


@dataclass(frozen=True)
class Row:
    """One row of a file, and the line on which it begins: from 1, or 0 where the file has no lines."""

    value: Any
    line: int = 0


class Fault(ValueError):
    """What is wrong with a row, or with the whole file where `fatal`: then no row behind it was read."""

    def __init__(self, what: str, field: str = "", line: int = 0, fatal: bool = False) -> None:
        super().__init__(what)
        self.field, self.line, self.fatal = field, line, fatal


def suffix(path: Path) -> str:
    """The ending that tells a file's form, in small letters, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read(path: Path) -> Iterator[Row | Fault]:
    """The rows of a file, and what is wrong with it, in order. Raises nothing but OSError."""
    kind = suffix(path)
    try:
        if kind == PARQUET:
            yield from _parquet(path)
            return
        with path.open("rb") as raw:
            head = raw.read(4)
        if head[:2] == b"PK":
            yield Fault(f"is an archive or an Excel file. {CONVERT}", fatal=True)
            return
        with _open(path, head) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            yield from _table(file, TABLES[kind]) if kind in TABLES else _json(file, kind in JSON)
    except UnicodeDecodeError:
        yield _not_utf8(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Fault(f"is no whole gzip file ({error}). Copy it again.", fatal=True)


def _open(path: Path, head: bytes) -> Any:
    """The bytes of a file, unpacked where it is gzip."""
    return gzip.open(path) if head[:2] == b"\x1f\x8b" else path.open("rb")


def _not_utf8(path: Path) -> Fault:
    """The first line that is no UTF-8, and the encoding that it is likely to have."""
    with path.open("rb") as raw:
        head = raw.read(2)
    with _open(path, head) as file:
        line, content = next((n, text) for n, text in enumerate(file, start=1) if not _decodes(text, "utf-8"))
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not utf16 and not _decodes(content, "gb18030"):
        return Fault("is not UTF-8. Save the file as UTF-8 in an editor.", line=line, fatal=True)
    name, encoding = ("UTF-16", "UTF-16") if utf16 else ("GBK", "GB18030")  # the second holds all of the first
    command = f"`iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}`"
    what = f"is not UTF-8 but, it seems, {name}. Convert it with {command}, or save it as UTF-8 in an editor."
    return Fault(what, line=line, fatal=True)


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


class _Buffer:
    """A window on the text: it grows until a value is whole, and forgets what was read."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.twice: list[str] = []  # keys that stand twice in the value decoded last
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=Number, parse_float=Number, parse_constant=Number
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self.twice += sorted({key for key in keys if keys.count(key) > 1})
        return value

    def more(self, characters: int = CHUNK) -> bool:
        added = self.file.read(characters)
        self.text += added
        return bool(added)

    def skip_space(self, at: int) -> int:
        """The offset of the next character that is no space; that of the end when there is none."""
        while (at := SPACE.match(self.text, at).end()) == len(self.text) and self.more():  # type: ignore[union-attr]
            pass
        return at

    def line_at(self, at: int) -> int:
        return self.line + self.text.count("\n", self.at, at)

    def advance(self, at: int) -> None:
        self.line = self.line_at(at)
        self.at = at
        if at > CHUNK:
            self.text, self.at = self.text[at:], 0

    def decode(self, at: int) -> tuple[Any, int]:
        """The value that begins at an offset, and the offset behind it. Raises JSONDecodeError at the fault."""
        self.twice.clear()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - TRUNCATED or error.msg.startswith("Unterminated string")
                if len(self.text) - at > MAX_ROW:
                    too_long = f"a row has more than {MAX_ROW:,} characters: write a row a line"
                    raise json.JSONDecodeError(too_long, self.text, at) from error
                if not cut or not self.more(max(CHUNK, len(self.text) - at)):
                    raise
            except RecursionError as error:
                raise json.JSONDecodeError("it is nested too deeply", self.text, at) from error
            else:
                # A number may go on behind the text read so far; a list, an object and a text say where they end.
                if end < len(self.text) or self.text[end - 1] in '}]"' or not self.more():
                    return value, end

    def next_row(self, at: int) -> None:
        """Go to the next line that begins as a row does, or to the end."""
        while not (found := NEXT_ROW.search(self.text, at)):
            self.advance(len(self.text) - 1)
            at = self.at
            if not self.more():
                self.advance(len(self.text))
                return
        self.advance(found.start() + 1)


def _json(file: io.TextIOWrapper, named_json: bool) -> Iterator[Row | Fault]:
    """Rows one after the other, whole lists of rows, or both; a row may take one line or many."""
    buffer, any_row, inside = _Buffer(file), False, False  # inside: whether a list of rows is open
    while (at := buffer.skip_space(buffer.at)) < len(buffer.text):
        buffer.advance(at)
        at, letter = buffer.at, buffer.text[buffer.at]
        if letter == "]" and inside:
            inside = False
            buffer.advance(at + 1)
            continue
        try:
            if letter == "[" and not inside and not _opens_dialogue(buffer, at + 1):
                inside = True
                buffer.advance(at + 1)
                continue
            value, end = buffer.decode(at)
        except json.JSONDecodeError as error:
            if not any_row and not named_json and letter not in "{[":
                yield Fault(f"is no data file that training reads. {CONVERT}", fatal=True)
                return
            any_row = True
            yield _not_json(buffer, error, inside)
            if inside:
                return
            buffer.next_row(at)
            continue
        any_row = True
        if buffer.twice:
            yield Fault("stands twice in one object. Keep one.", buffer.twice[0], buffer.line)
        else:
            yield Row(value, buffer.line)
        after = buffer.skip_space(end) if inside else end
        buffer.advance(after)
        if inside and buffer.text[buffer.at : buffer.at + 1] != "]":
            if buffer.text[buffer.at : buffer.at + 1] != ",":
                ends = buffer.at == len(buffer.text)
                what = "the file ends within a list. Copy it whole." if ends else "a comma is missing before this."
                yield Fault(what, line=buffer.line, fatal=True)
                return
            comma = buffer.line
            buffer.advance(buffer.skip_space(buffer.at + 1))
            if buffer.text[buffer.at : buffer.at + 1] in ("]", ""):
                yield Fault("is not JSON: nothing follows the comma. Delete it.", line=comma, fatal=True)
                return
    if inside:
        yield Fault("the file ends within a list. Copy it whole.", line=buffer.line, fatal=True)
    elif not any_row:
        yield Fault("holds no row." if buffer.text.strip() else "is empty.", fatal=True)


def _opens_dialogue(buffer: _Buffer, at: int) -> bool:
    """Whether a list holds the turns of one dialogue, not rows: told by its first value."""
    at = buffer.skip_space(at)
    if buffer.text[at : at + 1] != "{":
        return False
    try:
        first, _ = buffer.decode(at)
    except json.JSONDecodeError:
        return False
    return ("role" in first or "from" in first) and not {"messages", "conversations", "conversation"} & first.keys()


def _not_json(buffer: _Buffer, error: json.JSONDecodeError, inside: bool) -> Fault:
    line, end_of_line = buffer.line_at(error.pos), buffer.text.find("\n", buffer.at)
    if not inside and 0 <= end_of_line < error.pos and buffer.text[end_of_line + 1 : end_of_line + 2] in ("{", "["):
        line = buffer.line  # the next row begins where this one should have ended
    remedy = "Correct it; what follows was not read." if inside else "Correct or delete it."
    return Fault(f"is not JSON: {error.msg}. {remedy}", line=line, fatal=inside)


def _table(file: io.TextIOWrapper, delimiter: str) -> Iterator[Row | Fault]:
    """Each row as a dict of texts, empty cells left out. A cell may hold line breaks."""
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    any_row, line = False, 1
    try:
        head = next(reader, [])
        if not head or len(set(head)) < len(head):
            yield Fault("names a column twice." if head else "is empty.", line=int(bool(head)), fatal=True)
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                any_row = True
                if len(cells) == len(head):
                    yield Row({key: cell for key, cell in zip(head, cells, strict=True) if cell}, line)
                else:
                    what = f"has {len(cells)} cells, the first line names {len(head)} columns. Correct or delete it."
                    yield Fault(what, line=line)
            line = reader.line_num + 1
    except csv.Error as error:
        yield Fault(f"is no CSV: {error}. Save the table again; what follows was not read.", line=line, fatal=True)
        return
    if not any_row:
        yield Fault("holds no row.", fatal=True)


def _parquet(path: Path) -> Iterator[Row | Fault]:
    import pyarrow.parquet  # here: it takes a third of a second

    any_row = False
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            any_row = True
            yield from map(Row, batch.to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        yield Fault(f"is no whole Parquet file ({str(error).splitlines()[0]}). Copy it again.", fatal=True)
        return
    if not any_row:
        yield Fault("holds no row.", fatal=True)


def read_hub(name: str) -> Iterator[Row | Fault]:
    """The rows of the train split of USER/NAME on the Hub, by the library `datasets`, which keeps them in its cache."""
    import datasets  # here: it takes seconds

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # noqa: BLE001 - the library raises what its many readers raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        yield Fault(
            f"cannot be had from the Hub ({reason}). Check its name, your access and the network, or download its "
            "files and name them.", fatal=True,
        )  # fmt: skip
        return
    yield from map(Row, rows)
    if not len(rows):
        yield Fault("holds no row.", fatal=True)
