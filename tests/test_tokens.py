"""Encoding, against the tutorial's rule written anew."""

import pytest

from chat.persona import SYSTEM_PROMPT
from qwen2 import IGNORE_INDEX
from tests.conftest import TAUGHT
from training.data import Example, load
from training.tokens import encode


def tutorial(tokenizer, question, answer, max_length=384):
    """The rule of self-llm's Qwen2.5 LoRA tutorial: a hand-written ChatML string, the reply, the pad token."""
    head = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    read = tokenizer(head, add_special_tokens=False)["input_ids"]
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = read + said + [tokenizer.pad_token_id]
    labels = [-100] * len(read) + said + [tokenizer.pad_token_id]
    return ids[:max_length], labels[:max_length]


def test_rows_equal_the_tutorials_id_for_id_and_label_for_label(tokenizer):
    examples = load([str(TAUGHT)])
    assert len(examples) == 8
    for example, row in zip(examples, encode(tokenizer, examples, 384, "<|endoftext|>"), strict=True):
        assert (row.input_ids, row.labels) == tutorial(tokenizer, example.question, example.answer)


def example(*messages, answer):
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return Example(tuple(said), answer, "own.jsonl", 3)


def test_a_row_too_long_keeps_its_terminator(tokenizer):
    [row] = encode(tokenizer, [example("问", answer="答" * 200)], 200, "<|im_end|>")
    assert len(row.input_ids) == 200
    assert row.labels[-1] == row.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_row_too_long_loses_its_oldest_messages_first(tokenizer):
    [row] = encode(tokenizer, [example("甲" * 90, "乙" * 90, "你是谁？", answer="臣妾。")], 200, "<|im_end|>")
    text = tokenizer.decode(row.input_ids)
    assert "甲" not in text and text.endswith("你是谁？<|im_end|>\n<|im_start|>assistant\n臣妾。<|im_end|>")
    assert row.learned == len("臣妾。".encode()) + 1


def test_only_the_reply_is_learned(tokenizer):
    [row] = encode(tokenizer, [example("你是谁？", answer="臣妾。")], 384, "<|im_end|>")
    learned = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "臣妾。<|im_end|>"


def test_a_question_too_long_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"own\.jsonl, row 3"):
        encode(tokenizer, [example("早", answer="早。"), example("问" * 500, answer="答")], 200, "<|im_end|>")
