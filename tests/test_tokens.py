"""Encoding, against the tutorial's rule written anew."""

import pytest

from chat.persona import SYSTEM_PROMPT
from chat.prompt import prompt_ids, reply_ids, trim
from qwen2 import IGNORE_INDEX
from tests.conftest import TAUGHT
from training.data import load
from training.formats import Example
from training.tokens import FolderTokenizer, encode, fitting, length_note


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


def test_a_reply_that_lost_its_end_teaches_no_end_unless_the_recipe_says_so(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = example("问", answer="答" * 200)
    [row] = encode(tokenizer, [whole], 200, "<|im_end|>")
    assert len(row) == len(row.input_ids) == 200 and row.cut and not row.ends
    assert row.labels[-1] == row.input_ids[-1] != end
    [ended] = encode(tokenizer, [whole], 200, "<|im_end|>", end_cut_replies=True)
    assert len(ended) == 200 and ended.cut and ended.ends and ended.labels[-1] == ended.input_ids[-1] == end
    assert row.labels[:-1] == ended.labels[:-1] and row.learned == ended.learned
    assert row.full_length == len(encode(tokenizer, [whole], 2000, "<|im_end|>")[0])


def test_what_is_too_long_is_said_with_the_flag_that_helps(tokenizer):
    talk = [
        example("甲" * 90, "乙" * 90, "你是谁？", answer="臣妾。"),
        example("问", answer="答" * 200),
        example("早", answer="早。"),
    ]
    rows = encode(tokenizer, talk, 200, "<|im_end|>")
    said = length_note(rows, 200)
    assert "2 rows are longer than --max-length 200: 1 lose the end of the reply" in said
    assert "1 lose their oldest messages" in said
    fits = int(said.split("--max-length ")[2].split()[0])
    assert not length_note(encode(tokenizer, talk, fits, "<|im_end|>"), fits)
    assert length_note(encode(tokenizer, talk, fits - 1, "<|im_end|>"), fits - 1)


def dialogue(exchanges, system=SYSTEM_PROMPT):
    """The examples of one dialogue, and of one that begins alike; texts of any letters, and with special tokens."""
    texts = [f"{n}：  <|im_end|>ÿé\u0301 早\n\n" * (n % 3 + 1) for n in range(2 * exchanges)]
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ends = range(1, 2 * exchanges, 2)
    return [Example(tuple(said[:end]), texts[end], "own.jsonl", 1, system=system) for end in ends]


@pytest.mark.parametrize("max_length", [260, 400, 10_000])
def test_a_dialogue_tokenized_once_gives_the_ids_that_the_chat_sends(tokenizer, tiny_base, max_length):
    examples = [*dialogue(9), *dialogue(2), *reversed(dialogue(3))]
    rows = encode(tokenizer, examples, max_length, "<|im_end|>")
    for each, row in zip(examples, rows, strict=True):
        [reply] = reply_ids(tokenizer, [each.answer], "<|im_end|>")
        prompt = prompt_ids(tokenizer, each.messages)
        assert row.full_length == len(prompt) + len(reply)
        if row.full_length > max_length:
            _, prompt = trim(tokenizer, each.messages, max_length - max(2, min(len(reply), max_length // 2)))
            reply = reply[: max_length - len(prompt)]
        assert (row.input_ids, row.labels) == (prompt + reply, [IGNORE_INDEX] * len(prompt) + reply)
    alone = encode(FolderTokenizer(tiny_base), examples, max_length, "<|im_end|>")
    assert [row.input_ids for row in alone] == [row.input_ids for row in rows], "also without transformers"


def test_a_dialogue_is_rendered_once_however_many_replies_are_learned(tokenizer, monkeypatch):
    rendered = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda messages, **options: rendered.append(messages) or render(messages, **options),
    )
    encode(tokenizer, dialogue(20), 384, "<|im_end|>")
    assert len(rendered) == 1


def test_a_row_stands_under_its_own_system_prompt(tokenizer):
    rows = encode(tokenizer, [*dialogue(2), *dialogue(2, system="你是猫<|im_end|>")], 10_000, "<|im_end|>")
    texts = [tokenizer.decode(row.input_ids) for row in rows]
    assert [text.startswith(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>") for text in texts] == [
        True,
        True,
        False,
        False,
    ]
    assert all(text.startswith("<|im_start|>system\n你是猫<\u200b|im_end|><|im_end|>\n") for text in texts[2:])


def test_a_base_that_does_not_speak_chatml_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **_: "<s>" + messages[-1]["content"])
    with pytest.raises(ValueError, match="does not open each message"):
        encode(tokenizer, dialogue(1), 384, "<|im_end|>")
    with pytest.raises(ValueError, match="no <end>"):
        encode(tokenizer, dialogue(1), 384, "<end>")


def test_rows_without_room_for_a_reply_are_left_out_and_counted(tokenizer, caplog):
    examples = [example("早", answer="早。"), example("问" * 500, answer="答")]
    assert fitting(tokenizer, examples, 200, "<|im_end|>") == examples[:1]
    assert "1 rows are left out" in caplog.text


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
