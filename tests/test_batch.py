"""Replies given together: to the letter what each would be alone, whoever joins, leaves, stops or fails."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from chat import kernels, local
from chat.batch import Request
from chat.decoder import Decoder
from chat.engine import BASE_ONLY, Sampling
from chat.local import LocalEngine

TURNS = [{"role": "user", "content": "可曾听雨？"}]


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def engine(located, trained):
    return LocalEngine(located, [trained])


@pytest.fixture(scope="module")
def plainly(engine):
    """What it says to some questions, generated one by one, before it is quick."""
    greedy = Sampling(temperature=0, max_new_tokens=24)
    return {(q, name): say(engine, q, name, greedy) for q in QUESTIONS for name in engine.adapters}


@pytest.fixture
def quick(engine, plainly):
    if not engine._batch:
        assert engine.places == 1
        engine.quicken(4)
        while not engine._batch:
            engine._thread.submit(lambda: None).result()
        assert engine.places == engine.most == 4
    return engine


QUESTIONS = ["你是谁？", "可曾听雨？", "今日天气如何？", "皇上驾到", "早"]


def listen(engine, question, name, sampling, cancel=None, after=None):
    """The whole text and the cost; `after` so many pieces it is stopped."""
    cancel, text, cost = cancel or threading.Event(), "", None
    for number, piece in enumerate(engine.stream(asked(question), name, sampling, cancel), start=1):
        text, cost = text + piece.text, piece.cost
        if number == after:
            cancel.set()
    return text, cost


def say(*given):
    return listen(*given)[0]


def test_greedy_replies_are_those_of_generate(quick, plainly):
    greedy = Sampling(temperature=0, max_new_tokens=24)
    assert {(q, name): say(quick, q, name, greedy) for q, name in plainly} == plainly
    assert plainly["可曾听雨？", "tiny"] != plainly["可曾听雨？", BASE_ONLY]


def test_more_visitors_than_places_each_get_what_they_would_get_alone(quick):
    wanted = [(q, name, Sampling(temperature=1.5, seed=n, max_new_tokens=6 + 3 * n))
              for n, (q, name) in enumerate((q, name) for q in QUESTIONS for name in quick.adapters)]  # fmt: skip
    alone = [say(quick, *one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as visitors:
        together = list(visitors.map(lambda one: say(quick, *one), wanted))
    assert together == alone and len(set(alone)) > len(alone) / 2


def test_the_same_question_to_two_in_the_batch_gets_what_each_says_alone(quick):
    sampling = Sampling(temperature=0, max_new_tokens=24)
    texts = ["", ""]
    for row, piece in quick.compare(TURNS, ["tiny", BASE_ONLY], sampling, threading.Event()):
        texts[row] += piece.text
    assert texts == [say(quick, TURNS[0]["content"], name, sampling) for name in ("tiny", BASE_ONLY)]


def test_one_that_is_stopped_stops_within_a_token_and_harms_nobody(quick):
    long = Sampling(temperature=1.5, seed=3, max_new_tokens=60)
    alone = say(quick, "皇上驾到", BASE_ONLY, long)
    with ThreadPoolExecutor(2) as visitors:
        other = visitors.submit(say, quick, "皇上驾到", BASE_ONLY, long)
        _, cost = listen(quick, "早", BASE_ONLY, long, None, 5)
        assert other.result() == alone
    assert cost.stopped == "cancelled" and cost.tokens < 20


def test_the_next_turn_reads_only_what_is_new_and_says_the_same(quick, monkeypatch):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    decoder, read = quick._batch.decoder, []
    step = decoder._step

    def listening(kind, given, count):
        if kind == "read":
            read.append(int(given[3][0]) + 1)  # tokens that are not padding
        return step(kind, given, count)

    monkeypatch.setattr(decoder, "_step", listening)
    turns = asked("听说山里下了一场大雨，可是真的？")
    first = "".join(piece.text for piece in quick.stream(turns, "tiny", sampling, threading.Event()))
    turns = [*turns, {"role": "assistant", "content": first}, *asked("那便好。")]
    follow = "".join(piece.text for piece in quick.stream(turns, "tiny", sampling, threading.Event()))
    whole = len(local.trim(quick.tokenizer, turns, local.PROMPT_TOKENS)[1])
    assert read[1] < whole - read[0] + 16
    for place in quick._batch.places:
        place.ids = []
    assert follow == "".join(piece.text for piece in quick.stream(turns, "tiny", sampling, threading.Event()))
    assert read[2] == whole
    "".join(piece.text for piece in quick.stream(turns, BASE_ONLY, sampling, threading.Event()))
    assert read[3] == whole, "what one adapter has read is not another's"


def test_a_failure_at_the_start_is_its_own_and_one_on_the_way_reaches_all_who_are_spoken_to(quick, monkeypatch):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    decoder, fine = quick._batch.decoder, say(quick, "早", "tiny", sampling)
    for broken in ("begin", "go_on"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, broken, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
            with pytest.raises(torch.OutOfMemoryError):
                say(quick, "早", "tiny", sampling)
        assert say(quick, "早", "tiny", sampling) == fine


def test_without_room_for_more_conversations_one_is_answered_at_a_time(located, trained, monkeypatch, caplog):
    engine = LocalEngine(located, [trained])
    monkeypatch.setattr("chat.local.Decoder", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    engine.quicken(4)
    assert listen(engine, "早", "tiny", Sampling(temperature=0, max_new_tokens=4))[1].tokens
    assert engine.places == 1 and "one at a time: full" in caplog.text


def test_padding_stays_where_it_is_however_long_three_are_spoken_to(quick):
    decoder = quick._batch.decoder
    short = Decoder(quick.model, ["tiny"], 4, 24)
    for step in range(60):
        if step % 16 == 0:
            for slot in range(3):
                short.begin(slot, [5, 6, 7], 0, 0, Sampling(temperature=0), 0)
        short.go_on([0, 1, 2])
    assert int(short.state.position[4]) <= 1 and decoder is not short


def test_what_was_drawn_between_the_parts_of_a_long_prompt_does_not_count_as_said(quick, monkeypatch):
    monkeypatch.setattr("chat.decoder.READ", (16,))
    decoder = quick._batch.decoder
    prompt = [5 + n % 7 for n in range(50)]
    said = decoder.begin(3, prompt, 0, -1, Sampling(temperature=1.5), 1).tolist()
    assert set(decoder.state.seen[3].nonzero().flatten().tolist()) == {*prompt, *said}


def test_a_listener_that_fails_harms_nobody_else(quick):
    long = Sampling(temperature=1.5, seed=3, max_new_tokens=60)
    alone = say(quick, "皇上驾到", BASE_ONLY, long)
    deaf = Request([5, 6, 7], -1, long, threading.Event(), lambda token: 1 // 0, 10.0)
    with ThreadPoolExecutor(1) as visitor:
        other = visitor.submit(say, quick, "皇上驾到", BASE_ONLY, long)
        while not any(place.request for place in quick._batch.places):
            time.sleep(0)
        quick._batch.submit(deaf)
        with pytest.raises(ZeroDivisionError):
            deaf.cost.result(10)
        assert other.result() == alone


def test_another_architecture_is_not_taken_for_ours(quick):
    config = copy.deepcopy(quick.model.config)
    config.layer_types = ["sliding_attention", "full_attention"]
    with mock.patch.object(quick.model.get_base_model(), "config", config), pytest.raises(RuntimeError, match="Qwen2"):
        Decoder(quick.model, [], 4, 24)


@pytest.mark.parametrize("asked", ["1", "64", "", "8"])
def test_places_are_as_many_as_can_be_recorded(monkeypatch, asked):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("chat.local.find_spec", lambda name: True)
    monkeypatch.setenv("PLACES", asked)
    assert local.places() == {"1": 1, "64": 32, "": 32, "8": 8}[asked]


def test_who_gave_up_while_waiting_costs_nothing(quick):
    gone = threading.Event()
    gone.set()
    assert listen(quick, "早", "tiny", Sampling(), gone)[1].tokens == 0


def test_draws_are_those_of_the_law():
    rows, logits = 2_000, torch.randn(1, 1, 300, generator=torch.Generator().manual_seed(0)) * 2
    seen, law = torch.zeros(2, 300, dtype=torch.uint8), torch.tensor([[0.7, 0.8, 20, 1.05]] * 2)
    seen[0, :150] = 1
    every = {"dtype": torch.int64}
    state = kernels.State(torch.zeros(2), torch.zeros(2, **every), torch.zeros(2, **every), seen, law,
                          torch.arange(2))  # fmt: skip
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    stock = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.05), TemperatureLogitsWarper(0.7),
                                 TopKLogitsWarper(20), TopPLogitsWarper(0.8)])  # fmt: skip
    p = stock(torch.arange(150)[None], logits[0].clone())[0].softmax(0)
    counts = torch.zeros(300)
    for position in range(rows):
        seen[0, 150:] = 0
        token = kernels.choose(logits, state, torch.tensor([0]), torch.tensor([position]), torch.float32, 32)
        counts[token] += 1
    expected = p * rows
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 45  # of about 10 degrees of freedom
