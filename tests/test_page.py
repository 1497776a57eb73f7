"""What stands around an engine: the queue, the rate limiter, requests, replies that never raise, ZeroGPU."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import limits
import pytest
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

import chat.engine
from chat import persona
from chat.engine import MAX_TURNS, Chunk, Chunks, FinishReason, InferenceThreads, Stalled, Usage, drain
from page import chat_tab, conversation, i18n, service
from page.conversation import TalkRequest
from page.rate_limiter import Exceeded, RateLimiter, SlidingWindowCounter
from page.service import ChatRequest, ChatService
from page.waiting_queue import Full, WaitingQueue
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine

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
        (service.Error("x", title="ZeroGPU of another year"), persona.UNWELL, "重试"),
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
    query = chat_tab.link(ChatRequest(adapter="pocket", numbers={"temperature": 0.9}), 5)
    assert query == "temperature=0.9&adapter=pocket&seed=5"


# what the browser sends

TALK = [asked("我叫小林"), said("记下了。" + conversation.HINT + "提示〕")]


def sent(**fields):
    """A request of the browser's, with some fields changed; one that is None is left out."""
    ids = {"talk": "t", "turn": "u", "reply": "r"}
    data = {**ids, "mode": "ask", "messages": TALK, "question": "我叫什么？", "scene": "甘露寺", "visitor": "果郡王"}
    return json.dumps({key: value for key, value in (data | fields).items() if value is not None})


def test_what_the_browser_sends_is_read_into_messages():
    request = TalkRequest.parse(sent())
    assert [turn["content"] for turn in request.messages] == ["我叫小林", "记下了。", "我叫什么？"]
    assert (request.scene, request.visitor) == ("甘露寺", "果郡王")
    assert request.ids == {"talk": "t", "turn": "u", "reply": "r"}
    assert TalkRequest.parse(sent(scene=None, visitor=None)).scene == persona.SCENES[0].name


def test_her_reply_is_continued_and_a_line_of_the_visitors_is_begun():
    assert TalkRequest.parse(sent(mode="continue")).messages[-1] == said("记下了。")
    assert TalkRequest.parse(sent(mode="suggest", question="")).messages[-1] == {"role": "user", "content": ""}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "nonsense", "[1]", "null", "[" * 100_000, sent(mode="shout"), sent(mode=["ask"]), sent(messages=None),
        sent(messages=7), sent(mode="continue", messages=[]), sent(mode="continue", messages=[asked("我的秘密")]),
        sent(question="我的秘密" * conversation.MAX_REQUEST),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_by_a_sentence_without_a_word_of_it(text):
    with pytest.raises(ValueError, match=r"请求|接着说") as refused:
        TalkRequest.parse(text)
    assert "秘密" not in str(refused.value)


def test_forged_ids_and_messages_come_back_no_longer_than_the_pages_own():
    request = TalkRequest.parse(sent(talk="x" * 10_000, turn={"a": 1}, messages=[*TALK * 500, {"role": "system"}]))
    assert len(request.ids["talk"]) == conversation.MAX_ID and isinstance(request.ids["turn"], str)
    assert len(request.messages) == MAX_TURNS + 1 and {turn["role"] for turn in request.messages} == {
        "user",
        "assistant",
    }


# what the page says about a reply


def test_every_way_a_reply_can_end_has_a_word():
    for reason in get_args(FinishReason):
        reply = service.Reply("好", "", Usage(reason, 5, 0.1, 1), 3)
        facts = chat_tab.facts(FakeEngine("x"), ChatRequest(adapter="base"), reply)
        assert f"stop_{facts['finish_reason']}" in i18n.BROWSER and facts["seed"] == 3
    assert chat_tab.facts(FakeEngine("x"), ChatRequest(adapter="base"), service.Reply("好")) is None


def test_every_scene_is_told_in_english_too():
    assert list(i18n.ENGLISH) == [scene.name for scene in persona.SCENES]
    for scene in persona.SCENES:
        greeting, openers = i18n.ENGLISH[scene.name]
        assert greeting.isascii() and len(openers) == len(scene.openers) and set(scene.visitors) <= set(i18n.VISITORS)


def test_what_an_adapter_does_not_tell_of_its_training_is_said_below_its_replies():
    engine, reply = FakeEngine("x"), service.Reply("好", "", Usage("stop", 5, 0.1, 1), 3)
    engine.unstated = {"scripted": ("prompt", "base")}
    assert chat_tab.facts(engine, ChatRequest(adapter="scripted"), reply)["unstated"] == ["prompt", "base"]
    assert chat_tab.facts(engine, ChatRequest(adapter="base"), reply)["unstated"] == []
    assert "未注明" in i18n.BROWSER["unstated_prompt"][0] and "unstated_base" in i18n.BROWSER


# ZeroGPU


def test_each_refusal_that_zerogpu_knows_has_a_line_of_its_own():
    (folder,) = importlib.util.find_spec("spaces").submodule_search_locations
    known = {
        title
        for file in Path(folder, "zero").glob("*.py")
        for title in re.findall(r'raise error\("(ZeroGPU [^"]+)"', file.read_text())
    }
    assert len(known) > 4 and known == service.ZERO_GPU.keys()
    assert len(set(service.ZERO_GPU.values())) == len(known)


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
    assert [line.startswith(persona.UNWELL) for line in refusals] == [True] * (len(service.ZERO_GPU) + 1)
    assert all(text[:8] in line for text, line in zip(service.ZERO_GPU.values(), refusals, strict=False))
    assert float(lines[-1]) <= 25, "a visitor's quota is asked for in small portions"


def test_a_link_names_the_temperature_as_each_base_has_its_own_default():
    given = ChatRequest(adapter="pocket", numbers={"temperature": 0.7, "top_p": 0.8})
    assert "temperature=0.7&" in (query := chat_tab.link(given, 5)) and "top_p" not in query


INTERNAL = "Counters can only be incremented by non-negative amounts: /home/her/chat/engine.py"


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, OSError, RecursionError, UnicodeError, TypeError])
def test_a_visitor_reads_none_of_the_text_of_an_internal_error(kind):
    (reply,) = list(ChatService(FakeEngine(kind(INTERNAL))).generate(ASK, ChatRequest(adapter="scripted"), "one"))[-1]
    assert (reply.text, reply.hint) == (persona.UNWELL, service.OTHERWISE)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")],
)
def test_memory_that_is_full_is_told_on_a_cpu_too(error):
    assert service.error_message(error) == (persona.UNWELL, service.NO_MEMORY)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ({"scene": "月宫"}, "There is no scene '月宫'"),
        ({"visitor": "她"}, "'她' does not come to her in"),
        ({"numbers": {"top_k": 0}}, "top_k is 0; choose a number from 1 to 200"),
        ({"numbers": {"seed": float("nan")}}, "The seed is not a number up to"),
        ({"numbers": {"seed": "7"}}, "The seed is not a number up to"),
        ({"numbers": {"seed": float("-inf")}}, "The seed is not a number up to"),
        ({"numbers": {"temperature": "9" * 10_000}}, "temperature is '9999"),
    ],
)
def test_what_a_visitor_asked_wrongly_is_told_him_in_short(asked, hint):
    request = ChatRequest(adapter="scripted", **asked)
    (reply,) = list(ChatService(FakeEngine("好")).generate(ASK, request, "one"))[-1]
    assert reply.text == persona.UNWELL and reply.hint.startswith("此问不成：") and hint in reply.hint
    assert len(reply.hint) < 200


@pytest.mark.parametrize(
    "file",
    [
        "[" * 100_000,
        '{"messages":' + "[" * 100_000,
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": "\ud800"}]}',
        "null", "[]", '{"messages": 5}', '{"messages": ["早"]}', '{"messages": [], "scene": ["a"]}',
    ],
    ids=repr,
)  # fmt: skip
def test_a_request_that_the_page_cannot_have_sent_is_refused(file):
    with pytest.raises(ValueError, match="not a request of this page"):
        TalkRequest.parse(file)


class Ends(FakeEngine):
    """An engine whose reply ends for a reason."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason

    def _generate(self, reply, row, cancel):
        yield Chunk(reply, row)
        yield Chunk("", row, Usage(self.reason, len(reply), 0, 0))


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("", "stop", service.OTHERWISE), ("", "time", service.OTHERWISE), ("臣妾", "stop", ""),
        ("臣妾", "time", service.FINISHED["time"]), ("臣妾", "length", service.FINISHED["length"]),
        ("", "cancelled", ""),
    ],
)  # fmt: skip
def test_a_reply_that_is_empty_or_cut_says_so(text, reason, hint):
    (reply,) = list(ChatService(Ends(text, reason)).generate(ASK, ChatRequest(adapter="scripted"), "one"))[-1]
    assert (reply.text, reply.hint) == (text, hint)
