"""Our own dialogues: each rule with a row that is right and one that is not, and the real rows held to all of them."""

import json
import re
import subprocess
import sys

import pytest

from chat.persona import SCENES
from dataset import check
from dataset.check import FACTS, NOT_HERS, NOT_YET, contradictions, faults, read, runs, runs_of_the_set
from tests.conftest import ROOT
from training import data


def write(folder, *rows, **fields):
    """A file of dialogues, each given as the messages in order."""
    path = folder / "own.jsonl"
    roles = ("user", "assistant")
    said = [[{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)] for messages in rows]
    lines = [json.dumps({**fields, "messages": messages}, ensure_ascii=False) for messages in said]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def found(path, fetched=()):
    return list(faults(read(path), set(fetched)))


SET = runs("臣妾做不到啊，皇上。")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("早", "臣妾做不到，皇上。")], None),
        ([("早", "早。"), ("晚", "臣妾 做不到啊皇上！")], r"row 2: .*shares 臣妾做不到啊皇上 with the fetched set"),
        ([("说“臣妾做不到啊，皇上”", "不说。")], "row 1: .*shares 臣妾做不到啊皇上"),
        ([("早", "早安。"), ("早安", "早。")], None),
        (
            [("早", "早啊，快进来坐坐罢。"), ("早安", "早啊，快进来坐坐罢！")],
            r"row 2: 早啊，.* stands in .*own.jsonl, row 1 already",
        ),
        ([("早", "后来呢？"), ("早安", "后来呢？")], None),  # so short a reply is anybody's
        ([("你是谁", "我是甄嬛，不知什么叫模型的。", "语言模型", "语言模型没听过。")], "row 1: .*speaks .语言模型"),
        ([("看电影么", "电影是何物？"), ("早", "小时候。")], None),
        ([("早", "电影是何物？", "看电影么", "不看。")], "row 1: 电影是何物？ says 电影"),
        ([("看电影么", "好。", "几时", "电影几时都好。")], None),
        ([("早", "等你三小时了。")], "row 1: .*says 小时"),
        ([("早", "传太医，太医院的都来。")], None),
        ([("早", "去医院。")], "row 1: .*says 医院"),
        ([("早", "早。"), ("华妃叫什么", "世兰。")], "row 2: 华妃叫什么 is what the evaluation asks"),
        ([("早", "早。"), ("早", "哀家乏了。")], "row 2: 哀家乏了。: she does not call herself 哀家"),
    ],
)
def test_a_row_is_held_to_the_rules_of_voice_and_originality(tmp_path, rows, said):
    faulty = [fault for fault in found(write(tmp_path, *rows), SET) if "says 模型" not in fault]
    assert not faulty if said is None else re.search(said, "\n".join(faulty))


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        (("早",), {}, "line 1: holds no question with a reply"),
        (("早", "早。"), {"scene": "月宫"}, "line 1, scene and visitor: There is no scene '月宫'"),
        (
            ("早", "早。"),
            {"scene": "太后", "visitor": "皇上"},
            "line 1, scene and visitor: '皇上' does not come to her in 太后",
        ),
    ],
)
def test_a_row_of_wrong_form_is_refused(tmp_path, messages, fields, said):
    with pytest.raises(ValueError, match=said):
        read(write(tmp_path, messages, **fields))


def test_a_row_of_another_format_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"instruction": "早", "output": "早。"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.jsonl, row 1 is not in the messages format"):
        read(path)


# scene, question, a reply that denies the canon, one that does not
CANON = [
    ("永寿宫", "早", "家父是安比槐。", "家父是甄远道。"),
    ("永寿宫", "早", "我爹叫王二。", "我爹叫我读书。"),
    ("永寿宫", "你父亲是谁", "沈自山，你认得么？", "不是沈自山，是甄远道。"),
    ("永寿宫", "早", "我父亲是济州协领。", "我父亲是大理寺少卿。"),
    ("永寿宫", "眉庄的父亲是谁", "安比槐。", "沈自山。"),
    ("永寿宫", "早", "陵容的父亲是沈自山。", "陵容的父亲是安比槐。"),
    ("永寿宫", "早", "华妃的哥哥是允礼。", "华妃的哥哥是年羹尧。"),
    ("永寿宫", "你妹妹是谁", "流朱。", "玉娆，还有浣碧。"),
    ("永寿宫", "你几岁进宫的", "十五岁。", "不是十五岁，是十七岁。"),
    ("永寿宫", "谁在带胧月", "端妃。", "敬妃。"),
    ("永寿宫", "早", "胧月由皇后抚养。", "胧月由敬妃抚养。"),
    ("永寿宫", "弘时的额娘是谁", "是华妃。", "是齐妃。"),
    ("永寿宫", "早", "温宜是华妃的女儿。", "温宜是曹琴默的女儿。"),
    ("永寿宫", "静和是谁的孩子", "敬妃的。", "沈眉庄的。"),
    ("永寿宫", "早", "弘曕的生父果郡王。", "弘曕不是果郡王的。"),
    ("永寿宫", "早", "皇后住翊坤宫。", "皇后住景仁宫。"),
    ("永寿宫", "皇后住哪个宫", "坤宁宫。", "不是坤宁宫，是景仁宫。"),
    ("永寿宫", "华妃住哪里", "储秀宫。", "翊坤宫。"),
    ("永寿宫", "早", "端妃姐姐住储秀宫。", "端妃姐姐住延庆殿。"),
    ("永寿宫", "早", "敬妃住长春宫。", "敬妃不住长春宫。"),
    ("永寿宫", "早", "眉姐姐住延禧宫。", "眉姐姐住存菊堂。"),
    ("永寿宫", "早", "陵容住咸福宫。", "陵容住延禧宫。"),
    ("永寿宫", "早", "齐妃住储秀宫。", "齐妃住长春宫。"),
    ("永寿宫", "早", "祺嫔住长春宫。", "祺嫔住储秀宫。"),
    ("永寿宫", "早", "果郡王住安栖观。", "果郡王住清凉台。"),
    ("永寿宫", "早", "舒太妃住寿康宫。", "舒太妃住安栖观。"),
    ("永寿宫", "槿汐是谁", "我的宫女。", "我的掌事姑姑。"),
    ("永寿宫", "早", "温实初是御前侍卫。", "温实初是太医。"),
    ("永寿宫", "早", "苏培盛是太医。", "苏培盛是皇上身边的总管太监。"),
    ("永寿宫", "早", "剪秋伺候华妃。", "剪秋伺候皇后。"),
    ("永寿宫", "颂芝伺候的是谁", "皇后。", "华妃。"),
    ("永寿宫", "早", "宝鹃是我的侍女。", "宝鹃是安陵容的侍女。"),
    ("永寿宫", "早", "我如今住碎玉轩。", "我从前住碎玉轩，如今住永寿宫。"),
    ("永寿宫", "早", "我如今是莞嫔。", "我如今是熹贵妃。"),
    ("初入宫", "你住哪里", "永寿宫。", "碎玉轩。"),
    ("初入宫", "早", "我如今是莞嫔。", "我如今是莞常在。"),
    ("盛宠", "早", "我现在住永寿宫。", "我现在住碎玉轩。"),
    ("盛宠", "早", "如今封了莞常在。", "如今封了莞嫔。"),
    ("甘露寺", "早", "我如今住碎玉轩。", "我如今住凌云峰。"),
    ("甘露寺", "早", "我如今是莞嫔。", "我如今是莫愁。"),
    ("回宫", "早", "如今住碎玉轩。", "如今住永寿宫。"),
    ("回宫", "早", "我如今是莞嫔。", "我如今是熹妃。"),
    ("太后", "早", "如今住永寿宫。", "如今住寿康宫。"),
    ("太后", "早", "哀家如今是熹贵妃。", "哀家如今是圣母皇太后。"),
    ("永寿宫", "早", "哀家乏了。", "本宫乏了。"),
    ("初入宫", "早", "本宫乏了。", "嫔妾乏了。"),
    ("甘露寺", "早", "本宫乏了。", "莫愁乏了。"),
    ("太后", "早", "臣妾乏了。", "哀家乏了。"),
    ("盛宠", "早", "灵犀睡了。", "淳儿睡了。"),
    ("初入宫", "甘露寺远么", "胧月知道。", "甘露寺在山上，我没去过。"),
]  # fmt: skip


@pytest.mark.parametrize(("scene", "question", "wrong", "right"), CANON)
def test_a_reply_is_held_to_the_canon(scene, question, wrong, right):
    assert list(contradictions(scene, question, wrong))
    assert not list(contradictions(scene, question, right))


def test_every_fact_is_tried_above():
    untried = [f.truth for f in FACTS if not any(f.denied_by(scene, asked, wrong) for scene, asked, wrong, _ in CANON)]
    assert not untried


def test_the_facts_stand_in_the_canon_and_its_scenes_are_the_persona_s():
    canon = (ROOT / "dataset" / "canon.md").read_text(encoding="utf-8").replace("| 17 |", "| 十七岁 |")
    for fact in FACTS:
        assert all(name.replace("?", "") in canon for name in fact.right.split("|")), fact.truth
    scenes = {scene.name for scene in SCENES}
    assert set(NOT_HERS) == scenes and set(NOT_YET) <= scenes
    assert {scene for fact in FACTS for scene in fact.scenes} == scenes


def test_the_command_names_file_and_row_and_ends_with_counts(tmp_path, monkeypatch, file_server, caplog):
    caplog.set_level("INFO", "dataset.check")
    body = json.dumps([{"instruction": "早", "output": "臣妾做不到啊，皇上。"}]).encode()
    monkeypatch.setattr(data, "FULL_FILE", tmp_path / "set" / "huanhuan.json")
    monkeypatch.setattr(data, "FULL_SET", file_server.serve("huanhuan.json", body))
    monkeypatch.setattr(data, "FULL_SHA256", file_server.sha256(body))
    for reply, status, said in [("早安。", 0, "0 faults"), ("臣妾做不到啊皇上", 1, "1 faults")]:
        monkeypatch.setattr(sys, "argv", ["check", str(write(tmp_path, ("早", reply)))])
        with pytest.raises(SystemExit) as end:
            check.main()
        assert end.value.code == status
        *faulty, counts = caplog.messages
        caplog.clear()
        assert counts == f"1 files, 1 dialogues, 1 replies, {said}"
        assert len(faulty) == status and all("own.jsonl, row 1: 臣妾" in fault for fault in faulty)


def test_help_answers_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "dataset.check", "--help"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0 and not re.search(r"\| +torch$", asked.stderr, re.M)


@pytest.fixture(scope="module")
def own():
    """Every file of ours and its dialogues."""
    return {path: read(path) for path in sorted((ROOT / "dataset").glob("*.jsonl"))}


def test_our_own_dialogues_hold_to_the_rules(own):
    fetched = runs_of_the_set() if data.FULL_FILE.exists() else set()  # without it all rules but one are tried
    assert not list(faults([dialogue for dialogues in own.values() for dialogue in dialogues], fetched))


def test_the_card_counts_what_is_there(own):
    card = check.CARD.read_text(encoding="utf-8")
    assert check.filled(card, check.table(own)) == card, "Run python -m dataset.check --card."
    assert all(f"| `{path.relative_to(check.FOLDER)}` | " in card.split("<!-- counts -->")[0] for path in own)


def test_a_card_without_a_place_for_counts_is_refused():
    with pytest.raises(ValueError, match=r"lost the lines around its counts"):
        check.filled("# A card", "")


def test_the_figure_is_drawn(tmp_path):
    path = write(tmp_path, ("早", "早。"), ("早", "早。", "晚", "晚。", "安", "安。"))
    check.draw({path: read(path)}, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
