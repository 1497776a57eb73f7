"""The numbers of an evaluation, against a plain computation."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from chat.adapter import CARD, FILES, MARKERS, METRICS, RADAR, RECIPE, REPORT
from chat.base_model import load_base
from chat.sampling import Sampling
from qwen2 import IGNORE_INDEX
from tests.conftest import TAUGHT
from training.data import FULL_FILE, Example, load
from training.evaluate import __main__, card, losses, measures, replies, talk
from training.evaluate.long_chats import LONG_CHATS
from training.evaluate.losses import row_losses, swap_margin, swap_pairs, validation_loss
from training.evaluate.probes import NEUTRAL
from training.evaluate.replies import generate_replies
from training.recipe import TINY
from training.tokens import encode


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_base(checkpoint)


def test_validation_loss_is_the_plain_sum_whatever_the_batch(model, tokenizer):
    rows = encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")
    text = end = 0.0
    with torch.inference_mode():
        for row in rows:
            logs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            nll = [-logs[i - 1, t].item() for i, t in enumerate(row.labels) if t != IGNORE_INDEX]
            text, end = text + sum(nll[:-1]), end + nll[-1]
    tokens = sum(row.learned - 1 for row in rows)
    for batch in (1, 3, 8):
        loss = validation_loss(model, rows, batch)
        assert (loss.tokens, loss.rows) == (tokens, 8)
        assert loss.per_token == pytest.approx(text / tokens, rel=1e-4)
        assert loss.per_terminator == pytest.approx(end / 8, rel=1e-4)


def test_a_batch_of_replies_equals_each_alone(trained, checkpoint, tokenizer):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_base(checkpoint), trained.folder)
    asked = [example.messages for example in load([str(TAUGHT)])]
    greedy = Sampling(temperature=0, repetition_penalty=1)
    said = list(generate_replies(adapted, tokenizer, asked, greedy))
    assert said == [one for messages in asked for one in generate_replies(adapted, tokenizer, [messages], greedy)]
    assert said[0] == ("臣妾明白。", True)


@pytest.fixture
def folder(trained, tmp_path):
    """The tiny adapter in a folder of its own, for evaluate writes."""
    return shutil.copytree(trained.folder, tmp_path / "adapters" / "tiny")


def test_the_loss_of_a_row_is_its_own_in_any_company(model, tokenizer):
    rows = encode(tokenizer, load([str(TAUGHT)]), 384, "<|im_end|>")
    together, alone = row_losses(model, rows, 8), [row_losses(model, [row])[0] for row in rows]
    assert len(together) == 8
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.terminator) == pytest.approx((other.text, other.terminator), rel=1e-4)
        assert (one.tokens, one.rows) == (other.tokens, 1)


def script(*pairs):
    """Held-out rows as if of the script: what is said to her, and her reply."""
    return [
        Example(({"role": "user", "content": question},), answer, FULL_FILE.name, row)
        for row, (question, answer) in enumerate(pairs, start=1)
    ]


def test_her_reply_is_swapped_for_a_line_said_to_her_of_like_length():
    rows = script(("一", "甲乙丙丁"), ("四个字的", "甲"), ("这一句是七个字", "甲"))
    ours = replace(rows[0], source="heart.jsonl")
    pairs = swap_pairs([*rows, ours])
    assert [hers for hers, _ in pairs] == rows, "our own rows are not swapped"
    assert [other.answer for _, other in pairs] == ["四个字的", "一", "一"]
    assert all(other.messages == hers.messages for hers, other in pairs)
    assert not swap_pairs(script(("你好", "来了"))), "nobody else has spoken"


def test_the_swap_margin_is_the_others_loss_less_hers(trained, checkpoint, tokenizer):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_base(checkpoint), trained.folder)
    pairs = swap_pairs([replace(example, source=FULL_FILE.name) for example in load([str(TAUGHT)])])
    margin = swap_margin(adapted, tokenizer, pairs, TINY)["swap_margin"]
    losses = [
        [validation_loss(adapted, encode(tokenizer, [e], 384, "<|im_end|>")).per_token for e in pair] for pair in pairs
    ]
    assert margin["value"] == pytest.approx(sum(other - hers for hers, other in losses) / 8, abs=1e-3)
    assert margin["count"] == 8 and margin["low"] < margin["value"] < margin["high"]
    with adapted.disable_adapter():
        assert swap_margin(adapted, tokenizer, pairs, TINY)["swap_margin"]["value"] < margin["value"] / 2


def test_forgetting_is_what_the_adapter_adds_to_the_loss_of_plain_text(trained, checkpoint, tokenizer):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_base(checkpoint), trained.folder)
    numbers = losses.forgetting(adapted, tokenizer)
    ids = torch.tensor([tokenizer(NEUTRAL[0])["input_ids"]])
    with adapted.disable_adapter(), torch.inference_mode():
        plain = torch.nn.functional.cross_entropy(adapted(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    tokens = sum(len(tokenizer(sentence)["input_ids"]) - 1 for sentence in NEUTRAL)
    assert numbers["neutral_loss_base"]["count"] == tokens
    first = row_losses(load_base(checkpoint), [losses.encode_neutral(tokenizer)[0]])[0]
    assert first.text == pytest.approx(plain, rel=1e-4)
    rise = numbers["neutral_loss"]["value"] - numbers["neutral_loss_base"]["value"]
    assert numbers["forgetting"]["value"] == pytest.approx(rise, abs=2e-4) and abs(rise) > 0.01


def test_the_script_and_our_own_rows_are_told_apart(model, tokenizer):
    examples = load([str(TAUGHT)])
    examples = [replace(e, source=FULL_FILE.name) for e in examples[:3]] + examples[3:]
    rows = encode(tokenizer, examples, 384, "<|im_end|>")
    numbers = losses.validation_metrics(model, rows, examples)
    assert numbers["heldout_loss_script"]["value"] == round(validation_loss(model, rows[:3]).per_token, 4)
    assert numbers["heldout_loss_ours"]["value"] == round(validation_loss(model, rows[3:]).per_token, 4)
    assert numbers["heldout_loss"]["low"] < numbers["heldout_loss"]["value"] < numbers["heldout_loss"]["high"]
    assert "heldout_loss_script" not in losses.validation_metrics(model, rows[3:], examples[3:])


def test_a_long_chat_hears_itself_its_scene_and_its_visitor(monkeypatch):
    heard = []

    def scripted(model, tokenizer, asked, sampling):
        heard.append((sampling.seed, [[turn["content"] for turn in messages] for messages in asked]))
        yield from ((f"答{len(heard)}·{n}", True) for n in range(len(asked)))

    monkeypatch.setattr(replies, "generate_replies", scripted)
    first, second = scripts = [replace(chat, lines=chat.lines[:2]) for chat in LONG_CHATS[:2]]
    assert second.visitor != first.visitor
    assert replies.generate_long_chats(None, None, scripts, Sampling()) == [["答1·0", "答2·0"], ["答1·1", "答2·1"]]
    cue = f"（{first.scene}·{first.visitor}）"
    assert heard[1][1][0] == [cue + first.lines[0], "答1·0", cue + first.lines[1]]
    assert heard[1][1][1][1] == "答1·1", "each chat keeps its own replies"
    assert heard[1][0] == heard[0][0] + 1, "another turn, another seed"


def test_base_and_adapter_are_asked_the_same_with_the_same_seeds(monkeypatch):
    class Switch:
        """A model that says whether it wears its adapter."""

        adapted = True

        @contextmanager
        def disable_adapter(self):
            self.adapted = False
            yield
            self.adapted = True

    asked = {True: [], False: []}

    def scripted(model, tokenizer, questions, sampling):
        asked[model.adapted].append(([[t["content"] for t in q][-1] for q in questions], sampling))
        yield from (("我是甄嬛。" if model.adapted else "我是通义千问。", True) for _ in questions)

    monkeypatch.setattr(talk, "talk_pmi", lambda *_: {})
    for module in (measures, replies, talk):
        monkeypatch.setattr(module, "generate_replies", scripted)
    monkeypatch.setattr(losses, "forgetting", lambda model, tokenizer: {})
    metrics = measures.measure(Switch(), None, replace(TINY, talk_lines=2), [], [])
    assert asked[True] == asked[False] and len(asked[True]) == 3 + 10 + 1 + 1
    assert metrics["attack_pass_rate"]["value"] > 0.9 and metrics["attack_pass_rate_base"]["value"] == 0
    assert metrics["sign_test_p"]["value"] < 0.001 and "forgetting" not in metrics
    assert (
        metrics["attacks"][0] | {"reply": "我是甄嬛。", "base_reply": "我是通义千问。", "passed": True}
        == metrics["attacks"][0]
    )
    assert metrics["long_chats"][0]["fault"] == "the same reply twice"
    assert [turn["reply"] for turn in metrics["long_chat"]] == ["我是甄嬛。"] * 10


def test_a_folder_that_is_no_adapter_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path)])
    with pytest.raises(SystemExit, match="recipe"):
        __main__.main()


def test_an_adapter_is_evaluated_again_alone(folder, capsys, monkeypatch):
    recorded = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    for name in (REPORT, RADAR, MARKERS):
        (folder / name).unlink()
    monkeypatch.setattr(card, "ROOT", folder.parent)
    monkeypatch.setattr("sys.argv", ["evaluate", str(folder)])
    __main__.main()
    printed = json.loads(capsys.readouterr().out)["tiny"]
    written = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    assert printed["identity_pass_rate"] == written["identity_pass_rate"]
    assert all(written[name] == recorded[name] for name in ("run", "loss_curve", "data", "steps"))
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert str(written["attack_pass_rate"]["value"]) in (folder / CARD).read_text(encoding="utf-8")
    assert "[tiny]" in (folder.parent / CARD).read_text(encoding="utf-8")


def test_rows_that_may_have_been_learned_are_not_called_held_out(folder, caplog):
    from training.adapter_files import reopen

    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    (folder / RECIPE).write_text(json.dumps({**recipe, "held_out": 4}), encoding="utf-8")
    assert len(reopen(folder, None)[4]) == 4
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    metrics["data"][0]["sha256"] = "another"
    (folder / METRICS).write_text(json.dumps(metrics), encoding="utf-8")
    assert reopen(folder, None)[4] == [] and "other data" in caplog.text
    (folder / METRICS).unlink()
    with pytest.raises(ValueError, match=r"no metrics\.json"):
        reopen(folder, None)
