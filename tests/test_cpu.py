"""The packed base: transformers' and PEFT's logits, transformers' draws, and what is kept of conversations."""

import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chat import cpu
from chat.adapter import CONFIG
from chat.base import locate
from chat.engine import BASE_ONLY, Sampling
from chat.local import LocalEngine, load_base
from chat.prompt import prompt_ids
from tests.conftest import ROOT

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=20)


@pytest.fixture(scope="module")
def engine(trained, located):
    engine = LocalEngine(located, [trained])
    assert isinstance(engine.model, cpu.Packed)
    return engine


@pytest.fixture
def read(engine, monkeypatch):
    """How many tokens each call of `read` was given, prompts only; nothing is kept from another test."""
    counts, real = [], engine.model.read
    engine.model.kept.clear()

    def counting(ids, names, memory, start):
        counts.extend([ids.shape[1]] if ids.shape[1] > 1 else [])
        return real(ids, names, memory, start)

    monkeypatch.setattr(engine.model, "read", counting)
    return counts


def say(engine, turns=ASK, adapter="tiny", cancel=None):
    return "".join(piece.text for piece in engine.stream(turns, adapter, GREEDY, cancel or threading.Event()))


@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_those_of_transformers_and_peft(trained, located, tmp_path, tokenizer, rslora):
    folder = shutil.copytree(trained.folder, tmp_path / "her")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_rslora": rslora}))
    model = PeftModel.from_pretrained(load_base(located), folder)
    packed = cpu.Packed(located.path)
    packed.load_adapter(folder, "her")
    packed.set_adapter("her")
    ids = torch.tensor([prompt_ids(tokenizer, ASK)])
    with torch.inference_mode():
        worn = model(ids).logits
        torch.testing.assert_close(packed(ids).logits, worn, atol=0.15, rtol=0)
        with model.disable_adapter(), packed.disable_adapter():
            plain = model(ids).logits
            torch.testing.assert_close(packed(ids).logits, plain, atol=0.15, rtol=0)
    assert (worn - plain).abs().max() > 2  # or the adapter was not seen at all


def test_a_prompt_read_in_pieces_gives_the_logits_of_one_read_at_once(engine):
    model, ids = engine.model, torch.arange(40)[None]
    with torch.inference_mode():
        whole = model.read(ids, ["tiny"], model._memory(1, 40), 0)
        memory = model._memory(1, 60)
        pieces = [model.read(ids[:, a:b], ["tiny"], memory, a) for a, b in ((0, 17), (17, 18), (18, 40))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-3, rtol=1e-3)


def test_draws_follow_the_chances_that_transformers_gives():
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 3
    said = logits.topk(12).indices[:, [0, 3, 3, 7]]  # likely ones, or the penalty would not be seen
    config = SimpleNamespace(do_sample=True, temperature=0.8, top_k=12, top_p=0.9, repetition_penalty=1.3)
    order = [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.8), TopKLogitsWarper(12)]
    chances = LogitsProcessorList([*order, TopPLogitsWarper(0.9)])(said, logits).softmax(-1)[0]
    drawn = cpu.draw(logits.expand(20_000, -1), said.expand(20_000, -1), config)
    shares = torch.bincount(drawn, minlength=50) / 20_000
    assert (shares > 0).equal(chances > 1e-9)
    torch.testing.assert_close(shares, chances, atol=0.015, rtol=0)


def test_the_next_turn_reads_its_new_tokens_only_and_answers_as_if_all_were_read(engine, read, trained, located):
    first = say(engine)
    turns = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "再说一遍。"}]
    again = say(engine, turns)
    whole, longer = (len(prompt_ids(engine.tokenizer, asked)) for asked in (ASK, turns))
    said = len(first.encode())  # all of it was read as it was drawn
    assert read == [whole, longer - whole - said]
    assert again == say(LocalEngine(located, [trained]), turns)


def test_what_one_adapter_read_is_nothing_to_another(engine, read):
    say(engine)
    say(engine, adapter=BASE_ONLY)
    assert read[0] == read[1]
    assert say(engine) == "臣妾明白。" and len(read) == 2  # now it is known whole, but for the last token


def test_an_adapter_loaded_anew_under_its_name_remembers_nothing(engine, trained):
    say(engine)
    assert engine.model.kept
    engine.model.load_adapter(trained.folder, "tiny")
    assert not engine.model.kept


def test_another_question_shares_no_more_than_begins_alike(engine, read, trained, located):
    say(engine, [{"role": "user", "content": "本宫有一个秘密"}])
    other = [{"role": "user", "content": "本宫累了"}]
    heard = say(engine, other)
    assert read[1] == len(prompt_ids(engine.tokenizer, other)) - cpu._common(*(
        prompt_ids(engine.tokenizer, [{"role": "user", "content": text}]) for text in ("本宫有一个秘密", "本宫累了")
    ))  # fmt: skip
    assert heard == say(LocalEngine(located, [trained]), other)


def test_few_conversations_are_kept_and_a_longer_one_takes_the_place_of_its_beginning(engine, read):
    for n in range(cpu.KEPT + 3):
        say(engine, [{"role": "user", "content": f"{n}"}])
    assert len(engine.model.kept) == cpu.KEPT
    engine.model.kept.clear()
    said = say(engine)
    say(engine, [*ASK, {"role": "assistant", "content": said}, {"role": "user", "content": "嗯"}])
    assert len(engine.model.kept) == 1


def test_two_voices_at_once_recall_what_both_have_read(engine, read):
    say(engine)
    say(engine, adapter=BASE_ONLY)
    read.clear()
    heard = {0: "", 1: ""}
    for row, piece in engine.compare(ASK, ["tiny", BASE_ONLY], GREEDY, threading.Event()):
        heard[row] += piece.text
    assert not read and heard == {0: say(engine), 1: say(engine, adapter=BASE_ONLY)}


def test_a_long_prompt_is_left_between_its_pieces_when_the_visitor_leaves(engine, read, monkeypatch):
    cancel = threading.Event()
    counting = engine.model.read
    monkeypatch.setattr(engine.model, "read", lambda *asked: cancel.set() or counting(*asked))
    assert say(engine, [{"role": "user", "content": "长" * 400}], cancel=cancel) == ""
    assert read == [cpu.CHUNK] and not engine.model.kept


@pytest.mark.parametrize(
    "other",
    [{"model_type": "llama"}, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}],
)
def test_another_architecture_stays_with_transformers(tiny_base, tmp_path, other):
    folder = shutil.copytree(tiny_base, tmp_path / "other")
    assert cpu.fits(locate(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | other))
    assert not cpu.fits(locate(str(folder)))


@pytest.mark.parametrize("package", ["chat", "benchmarks"])
def test_it_is_said_how_threads_wait_before_torch_is_there(package):
    program = f"import os, sys, {package}; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    asked = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert asked.stdout.strip() == "1000", asked.stderr
