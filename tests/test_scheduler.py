"""Replies generated together: to the letter what each would be alone, whoever joins, leaves, stops or fails."""

import copy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from chat import local
from chat.engine import BASE_ONLY, Stalled
from chat.local import LocalEngine
from chat.sampling import Sampling
from chat.scheduler import Request
from qwen2 import decode_kernels as kernels
from qwen2.decoder import Decoder, SamplingParams

MESSAGES = [{"role": "user", "content": "可曾听雨？"}]
GREEDY = SamplingParams(temperature=0, top_p=0.8, top_k=20, repetition_penalty=1.05)


def asked(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def engine(checkpoint, trained):
    engine = LocalEngine(checkpoint, [trained])
    engine.wait()
    return engine


@pytest.fixture(scope="module")
def one_by_one(engine):
    """What it says to some questions, generated one by one, before it batches."""
    greedy = Sampling(temperature=0, max_new_tokens=24)
    return {(q, name): say(engine, q, name, greedy) for q in QUESTIONS for name in engine.adapters}


@pytest.fixture
def batching(engine, one_by_one):
    if not engine._scheduler:
        assert engine.num_slots == 1
        engine.start_batching(4)
        while not engine._scheduler:
            engine._thread.submit(lambda: None).result()
        assert engine.num_slots == engine.max_num_seqs == 4
    return engine


QUESTIONS = ["你是谁？", "可曾听雨？", "今日天气如何？", "皇上驾到", "早"]


def listen(engine, question, name, sampling, cancel=None, after=None):
    """The whole text and the usage; `after` so many chunks it is stopped."""
    cancel, text, usage = cancel or threading.Event(), "", None
    chunks = (chunk for chunk in engine.stream(asked(question), [name], sampling, cancel) if chunk.text or chunk.usage)
    for number, chunk in enumerate(chunks, start=1):
        text, usage = text + chunk.text, chunk.usage
        if number == after:
            cancel.set()
    return text, usage


def say(*given):
    return listen(*given)[0]


def test_greedy_replies_are_those_of_generate(batching, one_by_one):
    greedy = Sampling(temperature=0, max_new_tokens=24)
    assert {(q, name): say(batching, q, name, greedy) for q, name in one_by_one} == one_by_one
    assert one_by_one["可曾听雨？", "tiny"] != one_by_one["可曾听雨？", BASE_ONLY]


def test_more_visitors_than_slots_each_get_what_they_would_get_alone(batching):
    wanted = [(q, name, Sampling(temperature=1.5, seed=n, max_new_tokens=6 + 3 * n))
              for n, (q, name) in enumerate((q, name) for q in QUESTIONS for name in batching.adapters)]  # fmt: skip
    alone = [say(batching, *one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as visitors:
        together = list(visitors.map(lambda one: say(batching, *one), wanted))
    assert together == alone and len(set(alone)) > len(alone) / 2


def test_the_same_question_to_two_in_the_batch_gets_what_each_says_alone(batching):
    sampling = Sampling(temperature=0, max_new_tokens=24)
    texts = ["", ""]
    for chunk in batching.stream(MESSAGES, ["tiny", BASE_ONLY], sampling, threading.Event()):
        texts[chunk.row] += chunk.text
    assert texts == [say(batching, MESSAGES[0]["content"], name, sampling) for name in ("tiny", BASE_ONLY)]


def test_one_that_is_stopped_stops_within_a_token_and_harms_nobody(batching):
    long = Sampling(temperature=1.5, seed=3, max_new_tokens=60)
    alone = say(batching, "皇上驾到", BASE_ONLY, long)
    with ThreadPoolExecutor(2) as visitors:
        other = visitors.submit(say, batching, "皇上驾到", BASE_ONLY, long)
        _, usage = listen(batching, "早", BASE_ONLY, long, None, 5)
        assert other.result() == alone
    assert usage.finish_reason == "cancelled" and usage.tokens < 20


def test_the_next_turn_reads_only_what_is_new_and_says_the_same(batching, monkeypatch):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    decoder, read = batching._scheduler.decoder, []
    step = decoder._step

    def listening(run, count, *inputs):
        if run == decoder._prefill:
            read.append(int(inputs[3][0]) + 1)  # tokens that are not padding
        return step(run, count, *inputs)

    monkeypatch.setattr(decoder, "_step", listening)
    messages = asked("听说山里下了一场大雨，可是真的？")
    first = "".join(chunk.text for chunk in batching.stream(messages, ["tiny"], sampling, threading.Event()))
    messages = [*messages, {"role": "assistant", "content": first}, *asked("那便好。")]
    follow = "".join(chunk.text for chunk in batching.stream(messages, ["tiny"], sampling, threading.Event()))
    whole = len(local.trim(batching.tokenizer, messages, local.PROMPT_TOKENS)[1])
    assert read[1] < whole - read[0] + 16
    for slot in batching._scheduler.slots:
        slot.ids = []
    assert follow == "".join(chunk.text for chunk in batching.stream(messages, ["tiny"], sampling, threading.Event()))
    assert read[2] == whole
    "".join(chunk.text for chunk in batching.stream(messages, [BASE_ONLY], sampling, threading.Event()))
    assert read[3] == whole, "what one adapter has read is not another's"


def test_a_failure_at_the_start_is_its_own_and_one_on_the_way_reaches_all_that_are_running(batching, monkeypatch):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    decoder, fine = batching._scheduler.decoder, say(batching, "早", "tiny", sampling)
    for broken in ("prefill", "decode_step"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, broken, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
            with pytest.raises(torch.OutOfMemoryError):
                say(batching, "早", "tiny", sampling)
        assert say(batching, "早", "tiny", sampling) == fine


def test_an_exit_on_the_inference_thread_reaches_all_that_are_running(batching, monkeypatch):
    sampling = Sampling(temperature=0, max_new_tokens=8)
    for broken in ("prefill", "decode_step"):
        with monkeypatch.context() as patch:
            patch.setattr(batching._scheduler.decoder, broken, lambda *_: sys.exit(3))
            with pytest.raises(Stalled, match="ended its thread"):
                say(batching, "早", "tiny", sampling)
        assert batching.health == "ok" and say(batching, "早", "tiny", sampling)


@pytest.mark.parametrize("stuck", ["prefill", "decode_step"])
def test_a_step_that_never_ends_ends_every_reply(batching, monkeypatch, stuck):
    monkeypatch.setattr("chat.engine.STALL_SECONDS", 0.4)
    monkeypatch.setattr("chat.engine.HEARTBEAT", 0.05)
    sampling, go, decoder = Sampling(temperature=0, max_new_tokens=8), threading.Event(), batching._scheduler.decoder
    fine, step = say(batching, "早", "tiny", sampling), getattr(decoder, stuck)
    monkeypatch.setattr(decoder, stuck, lambda *given: (go.wait(30), step(*given))[1])
    try:
        with ThreadPoolExecutor(6) as visitors:  # more than there are slots
            asked = [visitors.submit(say, batching, "早", "tiny", sampling) for _ in range(6)]
            assert [type(each.exception()) for each in asked] == [Stalled] * 6
        assert batching.health == "stuck"
    finally:
        go.set()
    while batching.health != "ok":
        time.sleep(0.01)
    assert say(batching, "早", "tiny", sampling) == fine


def test_slow_steps_are_no_stall(batching, monkeypatch):
    monkeypatch.setattr("chat.engine.STALL_SECONDS", 0.4)
    monkeypatch.setattr("chat.engine.HEARTBEAT", 0.05)
    decoder, step = batching._scheduler.decoder, batching._scheduler.decoder.decode_step
    monkeypatch.setattr(decoder, "decode_step", lambda *given: (time.sleep(0.2), step(*given))[1])
    assert listen(batching, "皇上驾到", BASE_ONLY, Sampling(temperature=0, max_new_tokens=6))[1].tokens == 6


def test_without_room_for_more_conversations_one_is_answered_at_a_time(checkpoint, trained, monkeypatch, caplog):
    engine = LocalEngine(checkpoint, [trained])
    monkeypatch.setattr("chat.local.Decoder", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    engine.start_batching(4)
    assert listen(engine, "早", "tiny", Sampling(temperature=0, max_new_tokens=4))[1].tokens
    assert engine.num_slots == 1 and "one at a time: full" in caplog.text


def test_captures_one_after_another_are_no_stall(checkpoint, monkeypatch):
    class SlowDecoder:
        num_slots = 2

        def __init__(self, *_):
            pass

        def capture_graphs(self):
            for _ in range(4):
                time.sleep(0.3)
                yield

    engine, states = LocalEngine(checkpoint), set()
    engine.wait()
    monkeypatch.setattr("chat.engine.STALL_SECONDS", 0.6)
    monkeypatch.setattr("chat.local.Decoder", SlowDecoder)
    engine.start_batching(2)
    while not engine._scheduler:
        states.add(engine.health)
        time.sleep(0.01)
    assert states == {"ok"}


def test_padding_stays_where_it_is_however_long_three_generate(batching):
    decoder = batching._scheduler.decoder
    short = Decoder(batching.model, ["tiny"], 4, 24)
    for step in range(60):
        if step % 16 == 0:
            for slot in range(3):
                short.prefill(slot, [5, 6, 7], 0, 0, GREEDY, 0)
        short.decode_step([0, 1, 2])
    assert int(short.state.position[4]) <= 1 and decoder is not short


def test_what_was_drawn_between_the_parts_of_a_long_prompt_does_not_count_as_generated(batching, monkeypatch):
    monkeypatch.setattr("qwen2.decoder.PREFILL_SIZES", (16,))
    decoder = batching._scheduler.decoder
    prompt = [5 + n % 7 for n in range(50)]
    drawn = decoder.prefill(3, prompt, 0, -1, GREEDY._replace(temperature=1.5), 1).tolist()
    assert set(decoder.state.seen[3].nonzero().flatten().tolist()) == {*prompt, *drawn}


def test_a_listener_that_fails_harms_nobody_else(batching):
    long = Sampling(temperature=1.5, seed=3, max_new_tokens=60)
    alone = say(batching, "皇上驾到", BASE_ONLY, long)
    deaf = Request([5, 6, 7], -1, long, threading.Event(), lambda token: 1 // 0, 10.0)
    with ThreadPoolExecutor(1) as visitor:
        other = visitor.submit(say, batching, "皇上驾到", BASE_ONLY, long)
        while not any(slot.request for slot in batching._scheduler.slots):
            time.sleep(0)
        batching._scheduler.submit(deaf)
        with pytest.raises(ZeroDivisionError):
            deaf.usage.result(10)
        assert other.result() == alone


def test_another_architecture_is_not_taken_for_ours(batching):
    config = copy.deepcopy(batching.model.config)
    config.layer_types = ["sliding_attention", "full_attention"]
    with (
        mock.patch.object(batching.model.get_base_model(), "config", config),
        pytest.raises(RuntimeError, match="Qwen2"),
    ):
        Decoder(batching.model, [], 4, 24)


@pytest.mark.parametrize("asked", ["1", "64", "", "8"])
def test_slots_are_as_many_as_can_be_recorded(monkeypatch, asked):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("qwen2.supported.find_spec", lambda name: True)
    monkeypatch.setenv("PLACES", asked)
    assert local.num_slots() == {"1": 1, "64": 32, "": 32, "8": 8}[asked]


def test_who_gave_up_while_waiting_costs_nothing(batching):
    gone = threading.Event()
    gone.set()
    assert listen(batching, "早", "tiny", Sampling(), gone)[1].tokens == 0


def test_draws_are_those_of_the_logits_processors():
    rows, logits = 2_000, torch.randn(1, 1, 300, generator=torch.Generator().manual_seed(0)) * 2
    seen, params = torch.zeros(2, 300, dtype=torch.uint8), torch.tensor([[0.7, 0.8, 20, 1.05]] * 2)
    seen[0, :150] = 1
    every = {"dtype": torch.int64}
    last_token, position = torch.zeros(2, **every), torch.zeros(2, **every)
    state = kernels.SlotState(torch.zeros(2), last_token, position, seen, params, torch.arange(2))
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
        token = kernels.sample(logits, state, torch.tensor([0]), torch.tensor([position]), torch.float32, 32)
        counts[token] += 1
    expected = p * rows
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 45  # of about 10 degrees of freedom
