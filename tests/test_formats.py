"""The forms in which people keep dialogues: what is learned of each, and what is refused with its field."""

import pytest

from chat.persona import HINT, SYSTEM_PROMPT, UNWELL
from training.formats import Notes, read_examples
from training.reader import Fault, Number, Row

ASK, SAY = {"role": "user", "content": "早"}, {"role": "assistant", "content": "早安。"}
SYSTEM = {"role": "system", "content": "乙"}
MORE = {"role": "user", "content": "你是谁？"}
END = {"role": "assistant", "content": "臣妾。"}


def examples(*rows, own_system=False, notes=None):
    found = list(
        read_examples([Row(row, n) for n, row in enumerate(rows, 1)], "own.jsonl", notes or Notes(), own_system)
    )
    for each in found:
        if isinstance(each, Fault):
            raise each
    return found


def said(*rows, **options):
    """Of each example the words before the reply, and the reply."""
    return [([m["content"] for m in each.messages], each.answer) for each in examples(*rows, **options)]


TWO = [(["早"], "早安。"), (["早", "早安。", "你是谁？"], "臣妾。")]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "你是谁？", "output": "臣妾。", "history": [["早", "早安。"]]},
        {"query": "你是谁？", "response": "臣妾。", "history": [{"user": "早", "assistant": "早安。"}]},
        {"prompt": "你是谁？", "completion": "臣妾。", "history": [ASK, SAY]},
        {"question": "你是谁？", "answer": "臣妾。", "history": [["早", "早安。"]], "system": ""},
        {"conversations": [{"from": "human", "value": "早"}, {"from": "gpt", "value": "早安。"},
                           {"from": "human", "value": "你是谁？"}, {"from": "gpt", "value": "臣妾。"}]},
        {"conversations": [{"role": "User", "content": "早"}, {"role": "ASSISTANT", "content": "早安。"}, MORE, END]},
        {"messages": [{"role": "developer", "content": SYSTEM_PROMPT}, ASK, SAY, MORE, END]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "早"}]}, SAY, MORE, END]},
        {"messages": [{"from": "user", "value": "早"}, SAY, MORE, END], "system": SYSTEM_PROMPT + "\n"},
        {"contents": [{"role": "user", "parts": [{"text": "早"}]}, {"role": "model", "parts": [{"text": "早安。"}]},
                      MORE, END]},
        {"conversation": [{"human": "早", "assistant": "早安。"}, {"human": "你是谁？", "assistant": "臣妾。"}]},
        {"conversation": [{"system": SYSTEM_PROMPT, "input": "早", "output": "早安。"},
                          {"input": "你是谁？", "output": "臣妾。"}]},
        {"conversations": [["早", "早安。"], ["你是谁？", "臣妾。"]]},
        [ASK, SAY, MORE, END],
        {"data": [{"messages": [ASK, SAY, MORE, END]}]},
        {"name": "甄嬛", "first_mes": "", "mes_example":
         "<START>\n{{user}}: 早\n{{char}}: 早安。\n{{user}}: 你是谁？\n甄嬛：臣妾。"},
        {"spec": "chara_card_v2", "data": {"name": "嬛", "first_mes": "", "mes_example":
         "{{user}}: 早\n{{char}}: 早安。\n{{user}}: 你是谁？\n{{char}}: 臣妾。"}},
    ],
)  # fmt: skip
def test_every_known_form_gives_the_same_examples(row):
    assert said(row) == TWO


def test_the_replies_within_a_prompt_are_context():
    assert said({"prompt": [ASK, SAY, MORE], "completion": [END]}) == TWO[1:]


def test_a_chat_of_sillytavern_is_one_dialogue_without_its_greeting_and_hidden_lines():
    head = {"user_name": "客", "character_name": "甄嬛", "chat_metadata": {}}
    lines = [("坐罢。", False, False), ("早", True, False), ("隐", False, True), ("早安。", False, False)]
    notes = Notes()
    rows = [{"name": "x", "is_user": user, "is_system": hidden, "mes": text} for text, user, hidden in lines]
    assert said(head, *rows, notes=notes) == TWO[:1]
    assert notes.dropped == {"name": 3} and len(notes.remarks) == 1


def test_columns_are_a_table_and_rows_of_one_file_have_numbers_of_their_own():
    table = {"instruction": ["早", "你是谁？"], "output": ["早安。", "臣妾。"]}
    assert said(table) == [(["早"], "早安。"), (["你是谁？"], "臣妾。")]
    assert [each.row for each in examples(table, table)] == [1, 2, 3, 4]


def test_the_pages_own_json_is_read_without_hints_notes_and_refusals():
    note = {"role": "assistant", "content": "种子 5", "metadata": {"title": "来历"}}
    talk = [
        {"role": "assistant", "content": "坐罢。"}, ASK, SAY | {"content": f"早安。{HINT}话到此处已满〕"}, note,
        {"role": "user", "content": "快说"}, {"role": "assistant", "content": f"{UNWELL}{HINT}太急〕"},
        {"role": "user", "content": "还没答"},
    ]  # fmt: skip
    row = {"scene": "甘露寺", "visitor": "果郡王", "messages": talk}
    assert said(row) == [(["（甘露寺·果郡王）早"], "早安。")]
    marked = [{"role": "user", "content": "（甘露寺·果郡王）早"}, SAY]
    assert said(row | {"messages": marked}) == [(["（甘露寺·果郡王）早"], "早安。")], "the scene stands there once"


@pytest.mark.parametrize("mark", [{"weight": Number("0")}, {"weight": 0.0}, {"loss": False}, {"train": "false"}])
def test_a_reply_that_is_not_to_be_learned_stays_as_context(mark):
    assert said({"messages": [ASK, SAY | mark, MORE, END | {"weight": 1}]}) == TWO[1:]


def test_a_pair_marked_as_disliked_is_not_learned_and_another_label_is_no_mark():
    bad, good = {"messages": [ASK, SAY], "label": False}, {"messages": [MORE, END], "label": True}
    assert said(bad, good) == [(["你是谁？"], "臣妾。")]
    notes = Notes()
    assert said({"question": "早", "answer": "早安。", "label": "问候"}, notes=notes) == TWO[:1]
    assert notes.dropped == {"label": 1}


def test_instruction_and_input_are_joined_by_a_line_break_and_that_is_said():
    notes = Notes()
    rows = (
        {"instruction": "译", "input": "早", "output": "Good morning"},
        {"instruction": "早", "input": "", "output": "安"},
    )
    assert said(*rows, {"input": "早", "output": "早安。"}, notes=notes) == [
        (["译\n早"], "Good morning"), (["早"], "安"), (["早"], "早安。"),
    ]  # fmt: skip
    assert list(notes.remarks.values()) == [1]


def test_numbers_and_dates_are_texts():
    assert said({"instruction": "一加一？", "output": Number("2.50")}, {"instruction": "2024-01-01", "output": 7}) == [
        (["一加一？"], "2.50"), (["2024-01-01"], "7"),
    ]  # fmt: skip


def test_a_greeting_and_an_open_question_are_left_out_and_said():
    notes = Notes()
    assert said({"messages": [SAY, ASK, SAY, MORE]}, notes=notes) == TWO[:1]
    assert len(notes.remarks) == 2


def test_what_is_not_learned_is_counted_by_field():
    notes = Notes()
    named = {
        "messages": [ASK | {"name": "陵容", "train": True}, SAY | {"reasoning_content": "想"}],
        "id": 1,
        "images": [],
    }
    examples(named, named, notes=notes)
    assert notes.dropped == {"name": 2, "train": 2, "reasoning_content": 2, "id": 2}


def test_a_system_prompt_of_its_own_is_learned_only_if_asked_for():
    row = {"system": "你是猫", "messages": [ASK, SAY]}
    with pytest.raises(Fault, match="--system own"):
        examples(row)
    own, hers = examples(row, {"messages": [ASK, SAY]}, own_system=True)
    assert (own.system, hers.system) == ("你是猫", SYSTEM_PROMPT)


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"instruction": {"a": 1}, "output": "x"}, "instruction", "an object, not text"),
        ({"instruction": "x", "output": ["x"]}, "output[0]", "a text in a list"),
        ({"instruction": "x", "output": True}, "output", "true or false, not text"),
        ({"instruction": "x", "output": Number("NaN")}, "output", "is NaN"),
        ({"instruction": "x", "output": " \n"}, "output", "is empty"),
        ({"instruction": "\ud83d早", "output": "x"}, "instruction", "half a character"),
        ({"instruction": "x", "output": "x", "history": ["你好", "早安"]}, "history", "no list of pairs"),
        ({"instruction": "x", "output": "x", "history": [["早", None]]}, "history[0][1]", "is empty"),
        ({"prompt": "x", "question": "y", "answer": "z"}, "prompt", "stands beside question"),
        ({"text": "x"}, "", "has text: no question"),
        ("x", "", "no JSON object"),
        ({"messages": "x"}, "messages", "is text, not a list"),
        ({"messages": ["x", "y"]}, "messages[0]", "is text, no message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "is 'robot'"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "has content"),
        ({"messages": [ASK, MORE, SAY]}, "messages[1].content", "user's second message"),
        ({"messages": [ASK, SAY, END]}, "messages[2].content", "assistant's second message"),
        ({"messages": [ASK, SAY, SYSTEM, MORE, END]}, "messages[2].content", "amid"),
        ({"system": "甲", "messages": [SYSTEM, ASK, SAY]}, "messages[0].content", "another"),
        ({"messages": [ASK]}, "", "no question with a reply"),
        ({"messages": [ASK, SAY | {"content": ""}]}, "messages[1].content", "is empty"),
        ({"messages": [ASK, SAY | {"weight": 0.5}]}, "messages[1].weight", "is 0.5"),
        ({"messages": [ASK, SAY | {"train_detail": [1]}]}, "messages[1].train_detail", "learned or not"),
        ({"messages": [ASK, SAY], "images": ["a.jpg"]}, "images", "more than text"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [1]}]}, "messages[1].tool_calls", "more than text"),
        ({"messages": [ASK, {"role": "tool", "content": "3"}]}, "messages[1].role", "a tool's part"),
        ({"messages": [ASK | {"content": [{"type": "image_url"}]}, SAY]}, "messages[0].content[0]", "image_url"),
        ({"messages": [ASK, SAY], "rejected_response": "滚"}, "rejected_response", "ranks one reply"),
        ({"instruction": "x", "chosen": "y", "rejected": "z"}, "chosen", "ranks one reply"),
        ({"scene": ["甘露寺"], "messages": [ASK, SAY]}, "scene and visitor", "no scene"),
        ({"visitor": 3, "messages": [ASK, SAY]}, "scene and visitor", "does not come"),
        ({"name": "甄嬛", "first_mes": "坐罢。", "mes_example": ""}, "", "no question with a reply"),
    ],
)  # fmt: skip
def test_a_fault_names_its_line_and_field(row, field, what):
    good = {"messages": [ASK, SAY]}
    found = list(read_examples([Row(good, 1), Row(row, 7)], "own.jsonl", Notes(), own_system=True))
    assert len(found) == 2 and isinstance(found[1], Fault)
    assert (found[1].line, found[1].field) == (7, field) and what in found[1].args[0]
