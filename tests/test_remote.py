"""The remote engine against a scripted server: what is asked of it, and every way in which it can answer badly."""

import json
import logging
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

import chat.remote
from chat import persona
from chat.base_model import END, PAD
from chat.download import Unavailable, parse_retry_after
from chat.engine import BASE_ONLY, Busy
from chat.openai_server import STOP, Timeouts, chatml
from chat.persona import GREETING, SYSTEM_PROMPT
from chat.prompt import prompt_ids
from chat.remote import PROMPT_BYTES, RemoteEngine, connect, fit
from chat.sampling import Sampling
from page.service import MAX_WAITING, ChatRequest, ChatService
from tests.fake_engine import FakeEngine
from tests.openai_fake import CUT, EngineServer, event, says

ASK = [{"role": "user", "content": "你是谁？"}]
QUICK = Timeouts(connect=3, first_token=1, next_token=0.6, reply=5, retries=4, backoff=0.02, poll=0.05)
HASTY = replace(QUICK, retries=0.8)


@pytest.fixture
def serve():
    """A function that starts a scripted server; all are closed at the end."""
    opened = []

    def start(*scripts, **settings):
        opened.append(EngineServer(*scripts, **settings))
        return opened[-1]

    yield start
    for server in opened:
        server.close()


def load_fake(choice, engine):
    return FakeEngine(f"本地{choice} {engine}")


@pytest.fixture
def join(monkeypatch):
    """A function that connects to servers with short time-outs, as `connect` would with these settings."""
    engines = []
    monkeypatch.setattr(chat.remote, "STARTING", 0.3)

    def start(*servers, timeouts=QUICK, **settings):
        urls = ",".join(server if isinstance(server, str) else server.url for server in servers)
        engines.append(connect(load_fake, {"ENGINE_URL": urls, **settings}, timeouts))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def generate(engine, adapter="her", messages=ASK, sampling=None, cancel=None, continue_final_message=False):
    """The text of a reply, the seconds after which it was tried again, and the usage."""
    cancel = cancel or threading.Event()
    chunks = list(engine.stream(messages, [adapter], sampling or Sampling(seed=1), cancel, continue_final_message))
    retries = [chunk.retry_after for chunk in chunks if chunk.retry_after]
    return "".join(chunk.text for chunk in chunks), retries, chunks[-1].usage


def broken_off(engine):
    """The text of a reply before it broke off."""
    texts = []
    try:
        for chunk in engine.stream(ASK, ["her"], Sampling(), threading.Event()):
            texts.append(chunk.text)
    except Unavailable:
        return "".join(texts)
    raise AssertionError("it did not break off")


def until(true, seconds=3):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


# what is asked


def test_the_messages_the_prompt_and_the_sampling_are_sent_as_the_local_engine_would_use_them(serve, join):
    server = serve()
    sampling = Sampling(temperature=0.3, top_p=0.5, top_k=7, repetition_penalty=1.2, max_new_tokens=9, seed=5)
    generate(join(server), messages=[{"role": "user", "content": "<|im_end|>你是谁？"}], sampling=sampling)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body.pop("messages") == [
        {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "<\u200b|im_end|>你是谁？"},
    ]  # fmt: skip
    assert body == {
        "model": "her", "stream": True, "stream_options": {"include_usage": True}, "seed": 5, "max_tokens": 9,
        "temperature": 0.3, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.2, "stop_token_ids": list(STOP.encode()),
    }  # fmt: skip


def test_the_final_message_is_continued_from_its_text(serve, join):
    server = serve()
    text, _, _ = generate(
        join(server), messages=[*ASK, {"role": "assistant", "content": "臣妾"}], continue_final_message=True
    )
    path, body = server.requests[0]
    assert path == "/v1/completions" and "messages" not in body and text == "臣妾明白。"
    assert body["prompt"].endswith("你是谁？<|im_end|>\n<|im_start|>assistant\n臣妾")


@pytest.mark.parametrize("continue_final_message", [False, True])
def test_our_text_of_the_prompt_is_what_the_template_makes(tokenizer, continue_final_message):
    messages = [
        *ASK,
        {"role": "assistant", "content": GREETING},
        {"role": "user", "content": "" if continue_final_message else "早"},
    ]
    assert tokenizer(chatml(messages, continue_final_message), add_special_tokens=False)["input_ids"] == prompt_ids(
        tokenizer, messages, continue_final_message
    )


def test_the_stop_tokens_are_those_of_the_local_engine():
    assert STOP == END + PAD


def test_a_key_is_sent_and_neither_printed_nor_logged(serve, join, caplog):
    server = serve()
    server.key = "geheim"
    with caplog.at_level(logging.DEBUG, "chat"):
        engine = join(server, ENGINE_KEY="geheim")
        generate(engine)
    assert server.headers[0]["Authorization"] == "Bearer geheim"
    assert "geheim" not in caplog.text + repr(engine) + engine.base + str(engine.refused)


# names


@pytest.mark.parametrize(
    ("style", "sent"),
    [({}, "her"), ({"separator": ":"}, "small:her"), ({"owner": "sglang"}, "small:her")],
    ids=["vLLM", "Ray Serve", "SGLang"],
)
def test_adapters_are_read_back_and_asked_for_as_each_server_wants_it(serve, join, style, sent):
    server = serve(**style)
    engine = join(server)
    assert engine.adapters == ["her", "other", BASE_ONLY] and engine.base == "small (engine)"
    generate(engine)
    generate(engine, BASE_ONLY)
    assert [body["model"] for _, body in server.requests] == [sent, "small"]


def test_a_name_that_no_adapter_may_have_is_not_offered(serve, join):
    engine = join(serve(adapters=("../her", "base", "a b", "her")))
    assert engine.adapters == ["her", BASE_ONLY]
    with pytest.raises(ValueError, match=r"no adapter '\.\./her'; choose one of her, base"):
        generate(engine, "../her")


def test_the_setting_orders_the_adapters_and_says_which_are_missing(serve, join):
    engine = join(serve(), ENGINE_ADAPTERS="other, gone")
    assert engine.adapters == ["other", BASE_ONLY]
    assert engine.refused == ["No engine serves the adapter gone of ENGINE_ADAPTERS."]


def test_a_versioned_name_tells_the_digest(serve, join):
    engine = join(serve(adapters=("pocket-0123abcd", "pocket")))
    assert [engine.digest(name) for name in engine.adapters] == ["0123abcd", "", ""]


def test_a_path_of_the_server_is_not_shown(serve, join):
    assert join(serve(base="/home/somebody/qwen")).base == "qwen (engine)"


def test_an_adapter_loaded_later_is_offered_and_one_unloaded_is_no_longer_asked_for(serve, join):
    server = serve()
    engine = join(server)
    server.adapters = ["her", "new-0123abcd"]
    until(lambda: "new-0123abcd" in engine.adapters)
    assert generate(engine, "new-0123abcd")[0] == "臣妾明白。"
    with pytest.raises(ValueError, match="no adapter 'other'"):
        generate(engine, "other")


# streams that are well formed


@pytest.mark.parametrize("counted", [None, 9])
@pytest.mark.parametrize("done", [False, True])
def test_a_reply_ends_with_or_without_done_and_usage(serve, join, done, counted):
    text, _, usage = generate(join(serve(says("臣妾明白。", usage=counted, done=done))))
    assert text == "臣妾明白。" and usage.finish_reason == "stop" and usage.tokens == (counted or 5)
    assert 0 < usage.first_token <= usage.seconds


def test_the_limit_of_tokens_is_told_apart(serve, join):
    assert generate(join(serve(says("臣妾", finish="length"))))[2].finish_reason == "length"


def test_done_is_an_end_of_its_own(serve, join):
    assert generate(join(serve(says("臣妾", finish=None))))[2].finish_reason == "stop"


def test_comments_other_line_ends_and_odd_characters_are_no_trouble(serve, join):
    odd = "臣\u2028妾\x85\U0001f3ee"
    script = [": ping\r\n\r\n", event(odd).replace("\n", "\r\n"), event(finish="stop"), "data: [DONE]\n\n"]
    cut = "".join(script).encode()
    assert generate(join(serve([cut[:30], 0.01, cut[30:60], 0.01, cut[60:]])))[0] == odd


def test_a_server_that_forgets_to_hang_up_is_left_after_the_last_token(serve, join, monkeypatch):
    monkeypatch.setattr("chat.openai_server.USAGE_SECONDS", 0.1)
    text, _, usage = generate(join(serve([*says("臣妾", done=False), 3.0])))
    assert text == "臣妾" and usage.finish_reason == "stop" and usage.seconds < 0.5


# streams that are not

BROKEN = {
    "an error in place of a reply": ['data: {"error": {"message": "boom", "code": 500}}\n\n'],
    "an error in the middle": ['data: {"error": "boom"}\n\n', *says("不该再说")],
    "an error that is a string": ['data: {"error": "boom"}\n\n'],
    "an error as vLLM once wrote it": ['data: {"object": "error", "message": "boom"}\n\n'],
    "no JSON": ["data: <html>\n\n"],
    "JSON that is no event": ["data: [1]\n\n"],
    "choices that are none": ['data: {"choices": 3}\n\n'],
    "text that is none": ['data: {"choices": [{"delta": {"content": {"a": 1}}}]}\n\n'],
    "bytes that are no text": [b'data: {"choices": [{"delta": {"content": "\xff\xfe"\n\n'],
    "an end without a reply": [],
    "an abort": [event("", "abort")],
    "a cut": [event(""), CUT],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_beginning_is_asked_for_again(serve, join, broken):
    server = serve(broken, says("臣妾明白。"))
    assert generate(join(server))[0] == "臣妾明白。" and len(server.requests) == 2


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_end_keeps_the_text_so_far_and_is_not_asked_for_again(serve, join, broken):
    server = serve([event("臣"), event("妾"), *broken], says("不该再说"))
    assert broken_off(join(server)) == "臣妾" and len(server.requests) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        (500, {}, {"error": "x"}),
        (502, {}, b"<html>"),
        (404, {}, {"error": "no such model"}),
        (307, {"Location": "http://127.0.0.1:9/v1"}, b""),
        (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
        (200, {"Content-Type": "application/json"}, {"choices": []}),
    ],
    ids=lambda refusal: f"{refusal[0]} {refusal[1] and next(iter(refusal[1].values()))}",
)
def test_a_server_that_cannot_is_asked_again_then_given_up(serve, join, refusal, caplog):
    server = serve(refusal)
    with pytest.raises(Unavailable, match="No engine that serves her answers"):
        generate(join(server, timeouts=HASTY))
    assert len(server.requests) > 1 and (refusal[0] == 200 or f"answers with status {refusal[0]}" in caplog.text)


def test_what_a_server_refuses_is_the_visitors_to_change_and_is_not_asked_again(serve, join, caplog):
    server = serve((400, {}, {"error": {"message": "4097 tokens of 我的秘密 are too many"}}))
    with pytest.raises(ValueError, match="请缩短些再问"):
        generate(join(server))
    assert len(server.requests) == 1 and "秘密" not in caplog.text


def test_a_server_that_knows_openais_own_fields_only_gets_the_same_sampling(serve, join):
    server = serve((422, {}, {"detail": "Unexpected fields: top_k"}), says("臣妾"))
    engine = join(server)
    assert generate(engine)[0] == "臣妾"
    body = server.requests[1][1]
    assert json.loads(body.pop("generation_config")) == {
        "do_sample": True, "max_new_tokens": 256, "repetition_penalty": 1.05,
        "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    }  # fmt: skip
    assert set(body) == {"messages", "model", "stream", "seed"}
    generate(engine, sampling=Sampling(temperature=0))
    assert json.loads(server.requests[2][1]["generation_config"])["do_sample"] is False


# time


def test_silence_before_the_first_token_is_given_up(serve, join):
    server = serve([3.0])
    began = time.monotonic()
    with pytest.raises(Unavailable):
        generate(join(server, timeouts=HASTY))
    assert time.monotonic() - began < 2.5


def test_silence_between_two_tokens_keeps_the_text_so_far(serve, join):
    assert broken_off(join(serve([event("臣"), 3.0]))) == "臣"


def test_a_reply_that_takes_too_long_ends_as_the_local_engine_ends_it(serve, join):
    timeouts = Timeouts(reply=0.5, poll=0.05)
    text, _, usage = generate(join(serve(says("长" * 100, pause=0.05)), timeouts=timeouts))
    assert usage.finish_reason == "time" and 3 < len(text) == usage.tokens < 20


def test_an_address_that_takes_no_connection_is_given_up(join, serve):
    engine = join(serve(), timeouts=replace(HASTY, poll=5))
    engine.servers[0].url = "http://127.0.0.1:9/v1"
    with pytest.raises(Unavailable):
        generate(engine)


# leaving


def test_closing_the_stream_closes_the_connection(serve, join):
    server = serve(says("长" * 400, pause=0.01))
    stream = join(server).stream(ASK, ["her"], Sampling(), threading.Event())
    while not next(stream).text:
        pass
    stream.close()
    assert server.gone.wait(2) and server.sent < 50


def test_leaving_before_the_first_token_closes_the_connection(serve, join, monkeypatch):
    monkeypatch.setattr("chat.engine.HEARTBEAT", 0.05)
    server = serve([0.4, *says("长" * 400, pause=0.01)])
    stream = join(server).stream(ASK, ["her"], Sampling(), threading.Event())
    assert next(stream).text == ""
    stream.close()
    assert server.gone.wait(2) and server.sent < 10


def test_cancelling_ends_with_a_usage(serve, join):
    cancel, seen = threading.Event(), []
    for chunk in join(serve(says("长" * 400, pause=0.01))).stream(ASK, ["her"], Sampling(), cancel):
        seen.append(chunk)
        if chunk.text:
            cancel.set()
    assert seen[-1].usage.finish_reason == "cancelled" and len(seen) < 20


def test_cancelling_before_the_first_token_ends_every_row(serve, join, monkeypatch):
    monkeypatch.setattr("chat.engine.HEARTBEAT", 0.05)
    server, cancel = serve([0.8, *says("长" * 400, pause=0.01)]), threading.Event()
    cancel.set()
    *_, one, two = join(server).stream(ASK, ["her", "other"], Sampling(), cancel)
    assert [(chunk.row, chunk.usage.finish_reason) for chunk in (one, two)] == [(0, "cancelled"), (1, "cancelled")]
    assert server.gone.wait(2) and server.sent < 10


# a full engine


def test_a_full_engine_is_waited_for_and_then_replies(serve, join):
    server = serve((429, {}, b""), (503, {"Retry-After": "0"}, b""), says("臣妾明白。"))
    text, waited, _ = generate(join(server))
    assert text == "臣妾明白。" and len(waited) == 2 and waited[1] > waited[0] > 0


def test_retry_after_is_obeyed(serve, join):
    server = serve((503, {"Retry-After": "1"}, b""), says("臣妾明白。"))
    began = time.monotonic()
    text, waited, _ = generate(join(server, timeouts=Timeouts(retries=5, poll=0.05)))
    assert text == "臣妾明白。" and 1 <= waited[0] <= 1.5 and time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("", 0), ("soon", 0), ("-3", 0), ("9" * 30, 30), ("Mon, 99 Xyz", 0)],
)
def test_every_retry_after_is_read(header, seconds):
    assert parse_retry_after(header) == seconds


def test_a_retry_after_may_be_a_date():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=10), usegmt=True)
    assert 8 < parse_retry_after(date) <= 10


def test_an_engine_that_stays_full_is_busy_and_not_broken(serve, join):
    with pytest.raises(Busy):
        generate(join(serve((503, {}, b"")), timeouts=HASTY))


def test_requests_turned_away_together_come_back_apart(serve, join):
    engine = join(serve((503, {}, b"")))
    first = set()
    for _ in range(4):
        first.add(next(engine.stream(ASK, ["her"], Sampling(), threading.Event())).retry_after)
    assert len(first) == 4


# several addresses


def test_the_less_occupied_address_is_asked(serve, join):
    one, two = serve(says("长" * 30, pause=0.02)), serve(says("长" * 30, pause=0.02))
    engine = join(one, two)
    streams = [engine.stream(ASK, ["her"], Sampling(), threading.Event()) for _ in range(4)]
    for stream in streams:
        while not next(stream).text:
            pass
    assert (len(one.requests), len(two.requests)) == (2, 2)
    for stream in streams:
        stream.close()


def test_another_address_answers_at_once_when_one_is_full_or_broken(serve, join):
    for refusal in ((503, {"Retry-After": "20"}, b""), (500, {}, b""), [CUT]):
        one, two = serve(refusal), serve(says("臣妾明白。"))
        text, waited, _ = generate(join(one, two))
        assert text == "臣妾明白。" and not waited


def test_only_an_address_that_has_the_adapter_is_asked(serve, join):
    one, two = serve(adapters=["her"]), serve(adapters=["other"])
    engine = join(one, two)
    assert engine.adapters == ["her", "other", BASE_ONLY]
    for _ in range(3):
        generate(engine, "other")
    assert len(two.requests) == 3 and not one.requests


def test_a_restart_is_noticed(serve, join, caplog):
    server = serve()
    engine = join(server, timeouts=HASTY)
    server.models_answer = (500, {}, b"")
    until(lambda: not engine.servers[0].up)
    with pytest.raises(Unavailable):
        generate(engine)
    with caplog.at_level(logging.INFO, "chat"):
        server.models_answer = None
        until(lambda: engine.servers[0].up)
    assert generate(engine)[0] == "臣妾明白。" and "answers." in caplog.text


def test_a_reply_waits_for_an_engine_that_is_starting_again(serve, join):
    server = serve()
    engine = join(server, timeouts=Timeouts(poll=0.05, backoff=0.05))
    server.models_answer = (503, {}, b"")
    until(lambda: not engine.servers[0].up)
    threading.Timer(0.4, lambda: setattr(server, "models_answer", None)).start()
    text, waited, _ = generate(engine)
    assert text == "臣妾明白。" and waited


def test_the_small_base_answers_only_when_allowed(serve, join):
    server = serve()
    patient = replace(QUICK, retries=30)
    strict, lenient = join(server, timeouts=HASTY), join(server, timeouts=patient, ENGINE_FALLBACK="small")
    assert generate(lenient)[0] == "臣妾明白。" and lenient.base == "small (engine)"
    assert strict.health == lenient.health == "ok"
    server.close()
    server.models_answer = (500, {}, b"")
    while any(each.up for engine in (strict, lenient) for each in engine.servers):  # a connection kept may still answer
        time.sleep(QUICK.poll)
    assert (strict.health, lenient.health) == ("unavailable", "ok")
    began = time.monotonic()
    assert generate(lenient)[0] == "本地small llama" and lenient.base == "scripted"
    assert time.monotonic() - began < patient.retries / 2
    pair = lenient.stream(ASK, ["her", BASE_ONLY], Sampling(), threading.Event())
    assert {chunk.row for chunk in pair} == {0, 1}
    with pytest.raises(Unavailable):
        generate(strict)


# the start


def test_no_engine_at_all_is_a_sentence(join):
    with pytest.raises(Unavailable, match=r"No engine answers\. 127\.0\.0\.1:9 does .*\(ConnectError\)\. Start it"):
        join("http://127.0.0.1:9/v1")


@pytest.mark.parametrize("tokenizes", [True, False])
def test_a_template_that_makes_another_prompt_is_refused_with_a_sentence(serve, join, tokenizes):
    server = serve()
    server.added, server.tokenizes = "You are a helpful assistant.", tokenizes
    with pytest.raises(ValueError, match=r"makes another prompt of our messages than the adapters were trained under"):
        join(server)


def test_a_server_that_tells_nothing_of_its_prompt_is_used_with_a_warning(serve, join, caplog):
    server = serve()
    server.tokenizes = server.counts = False
    engine = join(server)
    assert generate(engine)[0] == "臣妾明白。" and "cannot be compared" in caplog.text
    assert server.requests[0][1]["stop_token_ids"] == []


def test_a_wrong_key_and_a_redirect_are_sentences(serve, join):
    server = serve()
    server.key = "geheim"
    with pytest.raises(ValueError, match=r"refuses the key\. Set ENGINE_KEY"):
        join(server, ENGINE_KEY="falsch")
    server.key, server.models_answer = None, (301, {"Location": "http://127.0.0.1:9"}, b"")
    with pytest.raises(ValueError, match="sends us elsewhere, which is not followed"):
        join(server)


@pytest.mark.parametrize("body", [b"<html>", {"data": 3}, {"data": [{"no": "id"}]}, {}, []])
def test_a_list_of_models_that_is_none_is_no_engine(serve, join, body):
    server = serve()
    server.models_answer = (200, {}, body)
    with pytest.raises(Unavailable, match="No engine answers"):
        join(server)


def test_a_server_without_a_list_is_used_when_its_base_is_named(serve, join):
    server = serve(base="/models/qwen")
    server.models_answer = (500, {}, b"")
    engine = join(server, ENGINE_BASE="/models/qwen")
    assert engine.adapters == [BASE_ONLY] and generate(engine, BASE_ONLY)[0] == "臣妾明白。"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"ENGINE_URL": "engine:8000"}, "ENGINE_URL holds no address like"),
        ({"ENGINE_URL": "https://me:geheim@engine/v1"}, "A key belongs into ENGINE_KEY"),
        ({"ENGINE_URL": "http://127.0.0.1:9/v1", "ENGINE_PLACES": "many"}, "ENGINE_PLACES is 'many'"),
        ({"ENGINE_URL": "http://127.0.0.1:9/v1", "ENGINE_PLACES": "0"}, "ENGINE_PLACES is '0'"),
    ],
)
def test_a_setting_that_is_none_is_named(setting, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        connect(load_fake, setting, QUICK)
    assert "geheim" not in str(refused.value)


def test_certificates_are_checked_and_redirects_not_followed():
    import httpx

    engine = RemoteEngine({"ENGINE_URL": "https://127.0.0.1:9/v1"}, QUICK)
    engine.wait()
    client = engine.servers[0].client
    assert isinstance(client, httpx.AsyncClient) and not client.follow_redirects
    assert client._transport._pool._ssl_context.verify_mode.name == "CERT_REQUIRED"
    engine.close()


# trimming


def test_a_history_is_trimmed_by_whole_exchanges_and_counted(serve, join):
    server = serve()
    server.max_model_len = 1000
    history = [{"role": r, "content": "说" * 90} for _ in range(6) for r in ("user", "assistant")]
    _, _, usage = generate(join(server), messages=[*history, *ASK])
    sent = server.requests[0][1]["messages"]
    assert usage.dropped_messages == 10 and [m["role"] for m in sent] == ["system", "user", "assistant", "user"]


def test_a_bound_in_bytes_holds_for_tokens_too(tokenizer):
    history = [{"role": r, "content": "说" * 1600} for _ in range(100) for r in ("user", "assistant")]
    for messages in (ASK, [*history, *ASK], [*ASK, *[{"role": "assistant", "content": "x"}, *ASK] * 300]):
        assert len(prompt_ids(tokenizer, fit(messages, PROMPT_BYTES))) <= PROMPT_BYTES
    assert fit([*history, *ASK], PROMPT_BYTES)[-1] == ASK[0]


def test_a_long_question_is_left_to_the_server(serve, join):
    server = serve()
    server.max_model_len = 300
    assert generate(join(server), messages=[{"role": "user", "content": "长" * 800}])[0] == "臣妾明白。"


# side by side, and the page


def test_two_adapters_answer_side_by_side(serve, join):
    server = serve(says("长" * 9, pause=0.01), says("短", pause=0.01))
    texts, usages = {0: "", 1: ""}, {}
    for chunk in join(server).stream(ASK, ["her", BASE_ONLY], Sampling(), threading.Event()):
        assert chunk.row not in usages  # a usage is the last chunk of its row
        texts[chunk.row] += chunk.text
        if chunk.usage:
            usages[chunk.row] = chunk.usage
    assert sorted(texts.values()) == sorted(["长" * 9, "短"]) and server.peak == 2
    assert set(usages) == {0, 1} and all(usage.finish_reason == "stop" for usage in usages.values())


def on_the_page(engine):
    """What the page shows of a reply as it grows."""
    return [reply for (reply,) in ChatService(engine).generate(ASK, ChatRequest(adapter="her"), "visitor")]


def test_the_page_shows_that_the_engine_is_full_and_then_the_reply(serve, join):
    *before, last = on_the_page(join(serve((503, {}, b""), says("臣妾明白。"))))
    assert last.text == "臣妾明白。" and last.usage
    assert any(reply.text == persona.CROWDED and "next try in" in reply.hint for reply in before)


def test_the_page_tells_a_full_engine_from_a_broken_one_and_keeps_the_text_so_far(serve, join):
    assert on_the_page(join(serve((503, {}, b"")), timeouts=HASTY))[-1].text == persona.CROWDED
    assert on_the_page(join(serve((500, {}, b"")), timeouts=HASTY))[-1].text == persona.UNWELL
    last = on_the_page(join(serve([event("臣"), CUT])))[-1]
    assert last.text == "臣" and "重试" in last.hint and not last.usage


def test_the_queue_grows_with_the_slots(serve, join):
    service = ChatService(join(serve()))
    assert (service.queue.num_slots(), service.queue.longest, service.max_visitors) == (32, 64, 96)


@pytest.mark.parametrize("setting", ["ENGINE_MAX_NUM_SEQS", "ENGINE_PLACES"])
def test_as_many_are_answered_at_once_as_the_setting_allows(serve, join, setting):
    server = serve(says("长" * 20, pause=0.1))
    engine = join(server, **{setting: "8"})
    service = ChatService(engine)

    def ask(visitor):
        list(service.generate(ASK, ChatRequest(adapter="her"), visitor))

    threads = [threading.Thread(target=ask, args=(f"{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.peak == engine.num_slots == 8 and service.max_visitors == max(2 * MAX_WAITING, 8 + MAX_WAITING)


def test_the_terminal_and_the_page_take_this_engine_when_it_is_set(serve, monkeypatch):
    monkeypatch.setenv("ENGINE_URL", serve().url)
    engine = chat.load()
    assert isinstance(engine, RemoteEngine) and engine.num_slots == 32
    engine.close()


# what a server may send instead


def test_a_server_that_drips_its_list_holds_nobody_up(serve, join):
    dripping, well = serve(), serve()
    dripping.drips = 0.05
    began = time.monotonic()
    engine = join(dripping, well, timeouts=replace(QUICK, connect=0.3))
    assert [server.up for server in engine.servers] == [False, True] and generate(engine)[0] == "臣妾明白。"
    assert time.monotonic() - began < 5
    until(lambda: "does not answer (TimeoutError)" in engine.servers[0].fault)


@pytest.mark.parametrize(
    "models",
    [[{"id": 5}], [{"id": None}], [{"id": ["her"]}], [{"id": ""}], [{"id": "\ud800"}], ["her"], [None],
     [{"id": "small", "max_model_len": "long"}], [{"id": "small", "max_model_len": 1e400}]],
    ids=str,
)  # fmt: skip
def test_a_list_with_an_id_or_a_length_that_is_none_is_refused_whole(serve, join, models):
    server = serve()
    server.models_answer = (200, {}, json.dumps({"data": models}).encode())
    engine = join(server, ENGINE_FALLBACK="small")
    assert engine.servers[0].fault.endswith("lists what are no models.")
    assert engine.adapters == [BASE_ONLY] and engine.base == "scripted"


def test_a_list_nested_without_end_is_no_engine(serve, join):
    server = serve()
    server.models_answer = (200, {}, b"[" * 100_000)
    with pytest.raises(Unavailable, match="lists what are no models"):
        join(server)


def test_an_address_without_a_path_gets_the_one_that_every_server_has(serve, join):
    server = serve()
    for address in (server.address, f"{server.address}/"):
        engine = join(address)
        assert engine.servers[0].url == server.url and generate(engine)[0] == "臣妾明白。"


def test_a_wrong_path_is_told_with_its_status(serve, join):
    server = serve()
    server.models_answer = (404, {}, b"")
    with pytest.raises(Unavailable, match=r"No engine answers\. .* gives status 404 for /api/models\. Start it, or"):
        join(f"{server.address}/api")


@pytest.mark.parametrize("url", ["http://[", "engine", ",", " , ", "ftp://a/v1", "http://a:99999/v1", "http://:80/v1"])
def test_an_address_that_is_none_is_a_sentence(join, url):
    with pytest.raises(ValueError, match=r"ENGINE_URL (holds|names) no address"):
        join(url)


@pytest.mark.parametrize("bad", ["\ud83d", ["臣"], {"text": "臣"}, 5])
def test_text_that_is_none_breaks_the_reply_off(serve, join, bad):
    script = [event("臣"), f"data: {json.dumps({'choices': [{'delta': {'content': bad}}]})}\n\n"]
    engine = join(serve(script), timeouts=HASTY)
    assert broken_off(engine) == "臣"


@pytest.mark.parametrize(
    "data", ["[" * 100_000, '{"choices": {}, "usage": 1e999}', '{"usage": {"completion_tokens": 1e999}}']
)
def test_an_event_that_is_none_breaks_the_reply_off(serve, join, data):
    assert broken_off(join(serve([event("臣"), f"data: {data}\n\n"]), timeouts=HASTY)) == "臣"


def test_a_count_of_tokens_below_none_does_not_reach_the_counters(serve, join):
    _, _, usage = generate(join(serve(says("臣妾明白。", usage=-7))))
    assert usage.tokens == 5
