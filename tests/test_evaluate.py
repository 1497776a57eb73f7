"""The numbers of an evaluation, against a plain computation."""

import pytest
import torch

from chat.engine import Sampling
from chat.local import load_base
from tests.conftest import TAUGHT
from training import evaluate
from training.data import load
from training.evaluate import PROBES, Probe, distinct_2, heldout_loss, replies, style
from training.tokens import IGNORED, encode


@pytest.fixture(scope="module")
def model(located):
    return load_base(located)


def test_heldout_loss_is_the_plain_sum_whatever_the_batch(model, tokenizer):
    rows = [encode(tokenizer, example, 384, "<|im_end|>") for example in load([str(TAUGHT)])]
    text = end = 0.0
    with torch.inference_mode():
        for row in rows:
            logs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            nll = [-logs[i - 1, t].item() for i, t in enumerate(row.labels) if t != IGNORED]
            text, end = text + sum(nll[:-1]), end + nll[-1]
    tokens = sum(row.learned - 1 for row in rows)
    for batch in (1, 3, 8):
        loss = heldout_loss(model, rows, batch)
        assert (loss.tokens, loss.rows) == (tokens, 8)
        assert loss.per_token == pytest.approx(text / tokens, rel=1e-4)
        assert loss.per_terminator == pytest.approx(end / 8, rel=1e-4)


def test_a_batch_of_replies_equals_each_alone(trained, located, tokenizer):
    from peft import PeftModel

    worn = PeftModel.from_pretrained(load_base(located), trained.folder)
    asked = [example.turns for example in load([str(TAUGHT)])]
    greedy = Sampling(temperature=0, repetition_penalty=1)
    said = list(replies(worn, tokenizer, asked, greedy))
    assert said == [one for turns in asked for one in replies(worn, tokenizer, [turns], greedy)]
    assert said[0] == ("臣妾明白。", True)


@pytest.mark.parametrize(
    ("reply", "passes"), [("我叫甄嬛。", True), ("臣妾叫苏公公", False), ("我是甄嬛，也是通义千问", False), ("", False)]
)
def test_a_probe_wants_the_fact_and_no_assistant(reply, passes):
    assert Probe("你叫什么？", "甄嬛").passes(reply) is passes


@pytest.mark.parametrize(
    ("reply", "passes"),
    [("我是人工智能，也是甄嬛。", False), ("哪里是人工智能，我是甄嬛。", True), ("我不是人工智能。", True)],
)
def test_she_may_deny_being_a_machine_but_not_claim_it(reply, passes):
    assert PROBES[-1].passes(reply) is passes


def test_there_are_twenty_probes_and_neither_small_talk_nor_the_assistant_passes():
    assert len({probe.question for probe in PROBES}) == 20
    assert not any(probe.passes("今日天气晴好，去御花园走走罢。") for probe in PROBES)
    assert not any(probe.passes("我是通义千问，阿里云开发的语言模型，很高兴为您服务。") for probe in PROBES)


def test_style_counts_endings_pairs_and_slips():
    numbers = style([("好好好", True), ("作为一个AI，好", False)])
    assert numbers["stop_rate"] == {"value": 0.5, "count": 2}
    assert numbers["assistant_phrase_rate"] == {"value": 0.5, "count": 2}
    assert distinct_2(["好好好"]) == (0.5, 2)


def test_a_folder_that_is_no_adapter_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path)])
    with pytest.raises(SystemExit, match="recipe"):
        evaluate.main()


def test_an_adapter_is_evaluated_again_alone(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate", str(trained.folder)])
    evaluate.main()
    assert '"identity_pass_rate"' in capsys.readouterr().out
