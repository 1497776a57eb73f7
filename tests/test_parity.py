"""`make parity`: the full set, id for id and label for label, as the tutorial formats it."""

import json

import pytest

from chat.base_model import load_tokenizer
from chat.checkpoints import locate
from chat.convert import ensure_converted
from qwen2 import IGNORE_INDEX
from training import data
from training.recipe import HUANHUAN
from training.tokens import encode

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ensure_converted(locate("small")))


def tutorial_row(tokenizer, row, limit=384):
    """The rule of self-llm's process_func: hand-written ChatML, then the reply, then the pad token."""
    prompt = (
        "<|im_start|>system\n现在你要扮演皇帝身边的女人--甄嬛<|im_end|>\n"
        f"<|im_start|>user\n{row['instruction']}{row['input']}<|im_end|>\n<|im_start|>assistant\n"
    )
    read, learned = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, row["output"]))
    ids = [*read, *learned, tokenizer.pad_token_id]
    return ids[:limit], [*[IGNORE_INDEX] * len(read), *learned, tokenizer.pad_token_id][:limit]


def test_every_row_of_the_full_set_is_the_tutorials(tokenizer):
    examples = data.load(["huanhuan"])
    rows = json.loads(data.FULL_FILE.read_text(encoding="utf-8"))
    assert len(examples) == len(rows) == 3729
    encoded = encode(tokenizer, examples, HUANHUAN.max_length, HUANHUAN.terminator)
    differing = [
        number
        for number, (ours, row) in enumerate(zip(encoded, rows, strict=True), start=1)
        if (ours.input_ids, ours.labels) != tutorial_row(tokenizer, row)
    ]
    print(f"\n{len(encoded)} rows, {sum(len(e.input_ids) for e in encoded):,} tokens, {len(differing)} differ")
    assert not differing
    assert sum(len(e.input_ids) for e in encoded) == 246_969
    assert sum(e.learned for e in encoded) == 81_364
