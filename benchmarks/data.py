"""From files to token ids: 300,000 rows, and one dialogue of 400 exchanges; ours beside datasets.map.

python -m benchmarks.data [--rows 300000] [--exchanges 400]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chat.persona import SYSTEM_PROMPT
from training.data import load
from training.tokens import FolderTokenizer, base_tokenizer, encode

MAX_LENGTH, END = 384, "<|im_end|>"


def main() -> None:
    """Write the rows, measure each way in a process of its own, save and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--exchanges", type=int, default=400)
    parser.add_argument("--base", default="small", help="a base on this disk, for its tokenizer")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(measure(WAYS[chosen.way], chosen.file, chosen.base)))
        return
    from benchmarks import results

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {
            f"{chosen.rows:,} rows": write_rows(Path(folder) / "rows.jsonl", chosen.rows),
            f"{chosen.exchanges} exchanges": write_dialogue(Path(folder) / "dialogue.jsonl", chosen.exchanges),
        }
        for data, file in files.items():
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.data", "--way", way, "--file", str(file)]
                command += ["--base", chosen.base]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"data": data, "way": way, **json.loads(out.splitlines()[-1])})
                print(rows[-1], flush=True)
    units = {"read": "s", "encode": "s", "cpu": "s", "peak": "GB"}
    results.save("data", rows, units)
    print(results.table("data"))


def texts() -> list[tuple[str, str]]:
    """Questions and replies of our own dialogues."""
    return [(example.question, example.answer) for example in load(["dataset"])]


def write_rows(path: Path, count: int) -> Path:
    """Rows of one exchange; a number in each makes it unlike all others."""
    said = texts()
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            question, answer = said[n % len(said)]
            messages = [{"role": "user", "content": f"{n}：{question}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def write_dialogue(path: Path, exchanges: int) -> Path:
    """One row with so many exchanges."""
    said = texts()[:exchanges]
    messages = [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def measure(way: Callable[[Path, str], tuple[float, int]], file: Path, base: str) -> dict[str, Any]:
    """Seconds to read, to encode, and of all cores together; most memory; and how many tokens came out."""
    began = time.perf_counter()
    read, tokens = way(file, base)
    encode_seconds = time.perf_counter() - began - read
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    return {"read": read, "encode": encode_seconds, "cpu": cpu, "peak": used.ru_maxrss * 1024 / 1e9, "tokens": tokens}


def ours(file: Path, base: str) -> tuple[float, int]:
    """training.data and training.tokens."""
    tokenizer = _tokenizer(base)
    began = time.perf_counter()
    examples = load([str(file)])
    read = time.perf_counter() - began
    return read, sum(map(len, encode(tokenizer, examples, MAX_LENGTH, END)))


def datasets_map(file: Path, base: str) -> tuple[float, int]:
    """The library's own way: rows in Arrow, `map` in batches, a prompt rendered for each reply."""
    import datasets

    tokenizer = _tokenizer(base)
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        read = time.perf_counter() - began
        encoded = rows.map(
            lambda batch: _encode_batch(tokenizer, batch["messages"]), batched=True, remove_columns=rows.column_names
        )
        return read, sum(map(len, encoded["input_ids"]))


def _encode_batch(tokenizer: FolderTokenizer, dialogues: list[list[dict[str, str]]]) -> dict[str, list[list[int]]]:
    """One row for each reply; a row that is too long loses its beginning."""
    prompts, replies = [], []
    for messages in dialogues:
        for end in range(1, len(messages), 2):
            asked = [{"role": "system", "content": SYSTEM_PROMPT}, *messages[:end]]
            prompts.append(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
            replies.append(messages[end]["content"])
    backend = tokenizer.backend_tokenizer
    rows = zip(backend.encode_batch_fast(prompts), backend.encode_batch_fast(replies), strict=True)
    pairs = [(prompt.ids[-MAX_LENGTH + len(reply.ids) + 1 :], [*reply.ids, 0]) for prompt, reply in rows]
    return {"input_ids": [p + r for p, r in pairs], "labels": [[-100] * len(p) + r for p, r in pairs]}


def _tokenizer(base: str) -> Any:
    tokenizer = base_tokenizer(base)
    if not tokenizer:
        sys.exit(f"{base} is not on this disk. Start app.py once, or name another --base.")
    return tokenizer


WAYS = {"ours": ours, "datasets.map": datasets_map}

if __name__ == "__main__":
    main()
