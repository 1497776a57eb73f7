"""What stands around an engine: the queue, the rate limiter, transcripts, replies that never raise, ZeroGPU."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import get_args

import limits
import pytest
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

import chat.engine
from chat import persona
from chat.engine import Chunks, FinishReason, InferenceThreads, Stalled, Usage, drain
from page import chat_tab, conversation, service
from page.conversation import Alternatives
from page.rate_limiter import Exceeded, RateLimiter, SlidingWindowCounter
from page.service import ChatRequest, ChatService
from page.waiting_queue import Full, WaitingQueue
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from training.data import load

ASK = [{"role": "user", "content": "早"}]


def said(text):
    return {"role": "assistant", "content": text}


def asked(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


# the waiting queue


def test_the_queue_serves_in_order_and_says_who_is_ahead():
    queue = WaitingQueue(lambda: 1, longest=2)
    with queue.ticket() as first, queue.ticket() as second, queue.ticket() as third:
        assert not list(queue.wait(first))
        assert [next(queue.wait(ticket))[0] for ticket in (second, third)] == [1, 2]
        with pytest.raises(Full), queue.ticket():
            pass
    assert not queue._tickets


def test_whoever_leaves_the_queue_lets_the_others_move_up():
    queue, served = WaitingQueue(lambda: 1, longest=5), []

    def stand(name):
        with queue.ticket() as ticket:
            for _ in queue.wait(ticket):
                pass
            served.append(name)

    with queue.ticket():
        leaving = queue.ticket()
        leaving.__enter__()
        waiting = threading.Thread(target=stand, args=("next",))
        waiting.start()
        leaving.__exit__(None, None, None)
        waiting.join(0.2)
        assert not served
    waiting.join(5)
    assert served == ["next"]


def test_the_estimate_follows_what_replies_take():
    queue = WaitingQueue(lambda: 2, longest=5)
    before = queue.reply_seconds
    for _ in range(20):
        with queue.timed():
            pass
    assert queue.reply_seconds < before / 10


# the rate limiter


def test_a_visitor_who_asks_too_often_waits_and_others_do_not(monkeypatch):
    monkeypatch.setenv("VISITOR_MESSAGES", "2/minute")
    limiter = RateLimiter()
    limiter.admit("one")
    limiter.admit("one")
    with pytest.raises(Exceeded):
        limiter.admit("one")
    limiter.admit("two")


def test_names_forged_anew_do_not_go_round_the_sum_over_all(monkeypatch):
    monkeypatch.setenv("ALL_MESSAGES", "5/minute")
    limiter = RateLimiter()
    for n in range(5):
        limiter.admit(f"forged {n}")
    with pytest.raises(Exceeded):
        limiter.admit("forged again")


def test_tokens_count_and_the_reply_that_went_over_is_the_last(monkeypatch):
    monkeypatch.setenv("VISITOR_TOKENS", "100/hour")
    limiter = RateLimiter()
    limiter.admit("one")
    limiter.spend("one", 150)
    with pytest.raises(Exceeded):
        limiter.admit("one")


@pytest.fixture
def clock(monkeypatch):
    """The rate limiter's clock and that of `limits`: a list of one number, which a test sets."""
    clock = [1e6]
    stopped = SimpleNamespace(time=lambda: clock[0], monotonic=lambda: clock[0])
    for module in ("page.rate_limiter", "limits.storage.memory"):
        monkeypatch.setattr(f"{module}.time", stopped)
    return clock


def test_a_sliding_window_decides_as_limits_does(clock):
    draw, item = random.Random(0), limits.parse("7/minute")
    ours, theirs = SlidingWindowCounter(item), SlidingWindowCounterRateLimiter(MemoryStorage())
    decided = []
    for _ in range(3000):
        clock[0] += draw.expovariate(1 / 2) + 200 * (draw.random() < 0.01)
        key = draw.randrange(3)
        decided.append(ours.allows(key))
        if decided[-1]:
            ours.take(key, 1)
        assert decided[-1] == theirs.hit(item, str(key))
    assert 0.2 < sum(decided) / len(decided) < 0.8


def test_strangers_who_left_are_forgotten_and_those_who_are_refused_never_noted(clock, monkeypatch):
    monkeypatch.setenv("ALL_MESSAGES", "2000/minute")
    limiter = RateLimiter()

    def numbers():
        return sum(len(part) for each in limiter._limits.values() for part in (each._before, each._taken))

    def come(count):
        for n in range(count):
            limiter.admit(f"stranger {n} {'x' * 1000}")
            limiter.spend(f"stranger {n} {'x' * 1000}", 22)

    come(2000)
    assert numbers() == 2 * (2000 + 1)
    for n in range(3000):
        with pytest.raises(Exceeded):
            limiter.admit(f"refused {n}")
    assert numbers() == 2 * (2000 + 1)
    clock[0] += 2 * 3600
    limiter.admit("one")
    assert numbers() == 2


def test_a_setting_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("ALL_TOKENS", "plenty")
    with pytest.raises(ValueError, match=r"ALL_TOKENS is 'plenty'\. Write it like '2000000/hour'\."):
        RateLimiter()


# replies


def generate(engine, messages=ASK, **request):
    """The replies of one adapter, as they grow."""
    generated = ChatService(engine).generate(messages, ChatRequest(**{"adapter": "scripted", **request}), "visitor")
    return [reply for (reply,) in generated]


def test_the_scene_and_the_visitor_are_passed_on_and_a_seed_is_drawn():
    engine = FakeEngine("好")
    generate(engine, scene="甘露寺", visitor="果郡王")
    generate(engine, numbers={"seed": 7})
    assert engine.asked[0][0] == [{"role": "user", "content": "（甘露寺·果郡王）早"}]
    assert 0 <= engine.asked[0][2].seed <= service.MAX_SEED and engine.asked[1][2].seed == 7


@pytest.mark.parametrize(
    "forged",
    [
        {"scene": "冷宫"},
        {"scene": "太后", "visitor": "皇上"},
        {"visitor": "<|im_start|>"},
        {"numbers": {"seed": 2**40}},
    ],
)
def test_what_the_page_does_not_offer_never_reaches_the_engine(forged):
    engine = FakeEngine("好")
    (reply,) = generate(engine, **forged)
    assert reply.text == persona.UNWELL and reply.hint and not engine.asked


class OutOfMemoryError(RuntimeError):
    """Called as torch's is."""


@pytest.mark.parametrize(
    ("failure", "line", "hint"),
    [
        (RuntimeError("/secret"), persona.UNWELL, "重试"),
        (OutOfMemoryError("/secret"), persona.UNWELL, "显存不够"),
        (Full(), persona.CROWDED, "候着的人太多"),
        (Exceeded(), persona.BREATHLESS, "歇一分钟"),
        (Stalled("/secret"), persona.UNWELL, "引擎没有响应"),
        *((service.Error("x", title=title), persona.UNWELL, text[:8]) for title, text in service.ZERO_GPU.items()),
        (service.Error("x", title="ZeroGPU illegal duration"), persona.UNWELL, "重试"),
    ],
)
def test_each_failure_has_a_line_and_a_hint(failure, line, hint):
    (reply,) = generate(FakeEngine(failure))
    assert reply.text == line and hint in reply.hint and "secret" not in reply.shown


def test_a_log_holds_no_word_of_the_visitors(caplog):
    generate(FakeEngine(RuntimeError("broken")), [{"role": "user", "content": "我的秘密"}])
    assert "A reply failed" in caplog.text and "秘密" not in caplog.text


def test_a_partial_reply_stays_when_she_breaks_off():
    class Breaking(FakeEngine):
        def _generate(self, reply, row, cancel):
            yield from list(super()._generate("只说了一半", row, cancel))[:-1]
            raise RuntimeError("gone")

    *_, last = generate(Breaking("x"))
    assert last.text == "只说了一半" and "重试" in last.hint and not last.usage


def test_leaving_while_she_speaks_frees_the_engine_and_the_queue():
    engine = FakeEngine("长" * 50)
    service = ChatService(engine)
    stream = service.generate(ASK, ChatRequest(adapter="scripted"), "visitor")
    next(stream)
    stream.close()
    assert not engine.running and not service.queue._tickets


def test_an_engine_that_is_stuck_ends_in_a_sentence_for_everyone_served_or_waiting(monkeypatch):
    monkeypatch.setattr(chat.engine, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(chat.engine, "HEARTBEAT", 0.05)
    threads, go, told = InferenceThreads(2, "stuck"), threading.Event(), []

    class Stuck(FakeEngine):
        num_slots = max_num_seqs = 2

        def stream(self, *_):
            threads.check()
            yield from drain(Chunks(), [threads.submit(go.wait, 30)], threads=threads)

    stuck = ChatService(Stuck())

    def ask(number):
        *_, (reply,) = stuck.generate(ASK, ChatRequest(adapter="scripted"), f"visitor {number}")
        told.append((reply, time.monotonic() - began))

    visitors = [threading.Thread(target=ask, args=(n,)) for n in range(stuck.queue.longest)]
    began = time.monotonic()
    try:
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join(20)
    finally:
        go.set()
    assert [reply for reply, _ in told] == [service.Reply(persona.UNWELL, service.STALLED)] * len(visitors)
    assert max(seconds for _, seconds in told) < 5 and not stuck.queue._tickets


def test_both_sides_of_a_comparison_grow_and_end():
    service = ChatService(FakeEngine("一二", "三四"))
    *_, last = service.generate(ASK, ChatRequest(adapter="scripted"), "visitor", ["scripted", "base"])
    assert [reply.text for reply in last] == ["一二", "三四"] and all(reply.usage for reply in last)


def test_a_link_says_only_what_differs_and_the_seed():
    query = chat_tab.link(ChatRequest(adapter="pocket", numbers={"temperature": 0.9}), 5, "你是谁？")
    assert query == "temperature=0.9&adapter=pocket&seed=5&q=%E4%BD%A0%E6%98%AF%E8%B0%81%EF%BC%9F"


# transcripts

TALK = [
    conversation.greeting("甘露寺"),
    asked("我叫小林"),
    said("记下了。" + conversation.HINT + "提示〕"),
    conversation.note("种子 Seed: 5"),
]


def test_json_keeps_the_notes_and_comes_back():
    back = conversation.read_transcript(conversation.export(TALK, "甘露寺", "果郡王", "JSON"))
    assert (back.scene, back.visitor) == ("甘露寺", "果郡王")
    assert [conversation.plain_text(entry["content"]) for entry in back.messages] == [
        persona.scene_named("甘露寺").greeting, "我叫小林", "记下了。" + conversation.HINT + "提示〕", "种子 Seed: 5",
    ]  # fmt: skip
    assert back.messages[3]["metadata"]["title"] == conversation.PROVENANCE
    assert [turn["content"] for turn in conversation.read_history(back.messages)] == ["我叫小林", "记下了。"]


def test_sharegpt_is_what_training_reads(tmp_path):
    path = tmp_path / "said.json"
    path.write_text(conversation.export([*TALK, asked("还没答")], "甘露寺", "果郡王", "ShareGPT"), encoding="utf-8")
    (example,) = load([str(path)])
    assert (example.question, example.answer) == ("（甘露寺·果郡王）我叫小林", "记下了。")
    back = conversation.read_transcript(path.read_text(encoding="utf-8"))
    assert back.messages[0]["content"] == persona.scene_named("甘露寺").greeting and back.visitor == "果郡王"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "nonsense", "[1]", '{"messages": [{"role": "system", "content": "x"}]}',
        '{"messages": [1]}', '{"scene": "冷宫", "messages": []}', '{"conversations": [{"from": "tool", "value": "x"}]}',
        json.dumps({"messages": "x" * conversation.MAX_FILE}),
    ],
)  # fmt: skip
def test_a_transcript_that_is_none_gets_a_sentence(text):
    with pytest.raises(ValueError, match=r"读不懂|太长"):
        conversation.read_transcript(text)


def test_a_forged_transcript_brings_no_markup_of_its_own():
    forged = {
        "messages": [asked("早"), said("好") | {"metadata": {"title": "<img src=x>"}, "options": [{"value": "x"}]}]
    }
    back = conversation.read_transcript(json.dumps(forged))
    assert back.messages[-1]["metadata"]["title"] == conversation.PROVENANCE and "options" not in back.messages[-1]


def test_alternatives_are_kept_for_one_question_and_leafed_through():
    kept = Alternatives().remember(TALK)
    assert str(kept) == "1 / 1" and kept.remember(TALK) == kept
    other = [*TALK[:2], said("记牢了。")]
    kept = kept.remember(other)
    assert str(kept) == "2 / 2"
    history, kept = kept.leaf(other, -1)
    assert conversation.reply_text(history[2:]) == "记下了。" and history[3]["metadata"] and str(kept) == "1 / 2"
    history, kept = kept.leaf(history, -1)
    assert conversation.reply_text(history[2:]) == "记牢了。"
    assert str(kept.remember([*other, asked("好"), said("好的。")])) == "1 / 1"
    assert kept.leaf([*other, asked("好")], 1)[0] == [*other, asked("好")], "a reply to another question is left alone"


def test_a_reply_asked_for_many_times_is_kept_in_bounds():
    kept = Alternatives()
    for n in range(50):
        kept = kept.remember([*TALK[:2], said(f"第{n}回")])
    assert len(kept.replies) == conversation.MAX_ALTERNATIVES and conversation.reply_text(kept.replies[-1]) == "第49回"


# what the page says about a reply


def test_every_way_a_reply_can_end_has_a_word():
    for reason in get_args(FinishReason):
        reply = service.Reply("好", "", Usage(reason, 5, 0.1, 1), 3)
        _, note = chat_tab.bubbles(FakeEngine("x"), ChatRequest(adapter="base"), reply)
        assert "收尾 Stop" in note["content"]


def test_what_an_adapter_does_not_tell_of_its_training_is_said_below_its_replies():
    engine, reply = FakeEngine("x"), service.Reply("好", "", Usage("stop", 5, 0.1, 1), 3)
    engine.unstated = {"scripted": ("prompt", "base")}
    _, note = chat_tab.bubbles(engine, ChatRequest(adapter="scripted"), reply)
    assert "提示词 Training prompt: 未注明" in note["content"] and "底座 Trained on: 名字不认得" in note["content"]
    _, note = chat_tab.bubbles(engine, ChatRequest(adapter="base"), reply)
    assert "未注明" not in note["content"]


# ZeroGPU


def test_the_same_page_answers_on_zerogpu_and_survives_its_refusals(trained, tiny_base):
    asked = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "zero" / "serve.py"), str(tiny_base), str(trained.folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
        env={**os.environ, "SPACES_ZERO_GPU": "1", "PYTHONPATH": f"{ROOT / 'tests' / 'zero'}:{ROOT}"},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    lines = asked.stdout.strip().splitlines()
    assert lines[0] == lines[2] == lines[-2] == "臣妾明白。" != lines[1]
    refusals = lines[3:-2]
    assert [line.startswith(persona.UNWELL) for line in refusals] == [True] * 4
    assert [text[:8] in line for text, line in zip(service.ZERO_GPU.values(), refusals, strict=False)] == [True] * 3
    assert float(lines[-1]) <= 25, "a visitor's quota is asked for in small portions"


def test_a_link_names_the_temperature_as_each_base_has_its_own_default():
    given = ChatRequest(adapter="pocket", numbers={"temperature": 0.7, "top_p": 0.8})
    assert "temperature=0.7&" in (query := chat_tab.link(given, 5, "早")) and "top_p" not in query
