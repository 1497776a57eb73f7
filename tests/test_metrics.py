"""The page's figures: counted by the page, without words, at a port of their own; and its health."""

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import REGISTRY

import app
from chat.engine import BASE_ONLY
from page import metrics
from page.service import ChatRequest, ChatService
from tests.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "我的秘密"}]


def value(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0


@pytest.fixture
def grown():
    """A function that tells how much a figure has grown since it was first asked for."""
    before = {}

    def growth(name, **labels):
        key = (name, *sorted(labels.items()))
        before.setdefault(key, value(name, **labels))
        return value(name, **labels) - before[key]

    return growth


def generate(engine):
    return list(ChatService(engine).generate(ASK, ChatRequest(adapter="scripted"), "visitor"))


def read(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_a_reply_is_counted_with_its_adapter_its_end_its_tokens_and_its_time(grown):
    one = {"adapter": "scripted"}
    names = ("chat_tokens_total", "chat_first_token_seconds_count", "chat_reply_seconds_count")
    figures = [("chat_replies_total", one | {"finish_reason": "stop"}), *((name, one) for name in names)]
    assert [grown(name, **labels) for name, labels in figures] == [0] * 4
    generate(FakeEngine("臣妾明白。"))
    assert [grown(name, **labels) for name, labels in figures] == [1, 5, 1, 1]


def test_both_sides_of_a_comparison_are_counted(grown):
    pairs = [{"adapter": name, "finish_reason": "stop"} for name in ("scripted", BASE_ONLY)]
    assert [grown("chat_replies_total", **labels) for labels in pairs] == [0, 0]
    service = ChatService(FakeEngine("一", "二"))
    list(service.generate(ASK, ChatRequest(adapter="scripted"), "visitor", ["scripted", BASE_ONLY]))
    assert [grown("chat_replies_total", **labels) for labels in pairs] == [1, 1]


def test_failures_are_counted_by_kind_and_leaving_as_leaving(grown):
    kinds = ("ZeroDivisionError", "ValueError", "Full")
    assert [grown("chat_errors_total", kind=kind) for kind in kinds] == [0, 0, 0] and grown("chat_left_total") == 0
    generate(FakeEngine(ZeroDivisionError("我的秘密")))
    generate(FakeEngine(ValueError("不行")))
    stream = ChatService(FakeEngine("长" * 9)).generate(ASK, ChatRequest(adapter="scripted"), "visitor")
    next(stream)
    assert value("chat_generating") == 1
    stream.close()
    assert [grown("chat_errors_total", kind=kind) for kind in kinds] == [1, 1, 0] and grown("chat_left_total") == 1
    assert value("chat_generating") == value("chat_waiting") == 0


def test_those_who_wait_are_counted():
    service = ChatService(FakeEngine("好"))
    with service.queue.ticket():
        waiting = service.generate(ASK, ChatRequest(adapter="scripted"), "visitor")
        next(waiting)
        assert value("chat_waiting") == 1
        waiting.close()
    assert value("chat_waiting") == 0


def test_the_figures_stand_at_a_port_of_their_own_without_words():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    metrics.serve(str(port))
    generate(FakeEngine("臣妾明白。", ValueError("我的秘密")))
    figures = read(f"http://127.0.0.1:{port}/metrics")
    assert 'chat_replies_total{adapter="scripted",finish_reason="stop"}' in figures
    assert "秘密" not in figures and "臣妾" not in figures
    with pytest.raises(OSError, match="in use"):
        metrics.serve(str(port))


@pytest.mark.parametrize("address", ["", "here", "0.0.0.0:", "0.0.0.0:99999", "1:2:x"])
def test_an_address_for_the_figures_that_cannot_be_read_is_named(address):
    with pytest.raises(ValueError, match=r"METRICS is .*\. Write a port, or ADDRESS:PORT"):
        metrics.serve(address)


def test_the_public_page_tells_its_health_and_no_figures():
    page = app.build_page(engine := FakeEngine("好"))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    try:
        assert read(f"{url}health") == "ok"
        engine.health = "loading"
        assert read(f"{url}health") == "loading"
        for engine.health in ("stuck", "dead", "unavailable"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                read(f"{url}health")
            assert (refused.value.code, refused.value.read().decode()) == (503, engine.health)
        with pytest.raises(urllib.error.HTTPError):
            read(f"{url}metrics")
    finally:
        page.close(verbose=False)
