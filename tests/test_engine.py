"""Both engines of this machine on the tiny adapter, and sampling that refuses forged values."""

import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file, save_file

import chat.base_model
import chat.local
import chat.prompt
from chat.adapter import WEIGHTS, Adapter
from chat.engine import BASE_ONLY, InferenceThreads, Stalled, max_num_seqs
from chat.llama import LlamaEngine
from chat.local import LocalEngine
from chat.sampling import Sampling
from tests.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module", params=["llama", "transformers"])
def engine(request, trained, checkpoint, tiny_gguf):
    llama = request.param == "llama"
    engine = LlamaEngine(tiny_gguf, [trained], max_num_seqs=2) if llama else LocalEngine(checkpoint, [trained])
    engine.wait()
    return engine


def say(engine, messages=ASK, adapter="tiny", sampling=GREEDY, cancel=None):
    chunks = list(engine.stream(messages, [adapter], sampling, cancel or threading.Event()))
    return "".join(chunk.text for chunk in chunks), chunks[-1].usage


def test_the_served_adapter_says_what_it_was_taught(engine):
    text, usage = say(engine)
    assert text == "臣妾明白。" and usage.finish_reason == "stop"
    assert usage.tokens == len(text.encode()) + 1 and 0 < usage.first_token <= usage.seconds


def test_the_base_alone_says_something_else_and_the_adapter_comes_back(engine):
    assert say(engine, adapter=BASE_ONLY)[0] != "臣妾明白。" == say(engine)[0]


def test_text_comes_chunk_by_chunk(engine):
    chunks = list(engine.stream(ASK, ["tiny"], GREEDY, threading.Event()))
    assert [chunk.text for chunk in chunks if chunk.text] == [*"臣妾明白。"] and chunks[-1].text == ""


def test_a_seed_repeats_a_reply(engine):
    drawn = Sampling(temperature=2, top_p=1, seed=5, max_new_tokens=30)
    assert say(engine, adapter=BASE_ONLY, sampling=drawn)[0] == say(engine, adapter=BASE_ONLY, sampling=drawn)[0]


def test_a_reply_ends_at_the_length_asked_for(engine):
    _, usage = say(engine, sampling=Sampling(temperature=0, max_new_tokens=4))
    assert (usage.tokens, usage.finish_reason) == (4, "length")


@pytest.fixture
def endless(engine, monkeypatch):
    """The engine with terminators it never draws, so that a reply only ends when stopped."""
    for module in ("base_model", "local"):
        monkeypatch.setattr(f"chat.{module}.ends", lambda tokenizer: [0, 0])
    if isinstance(engine, LlamaEngine):
        body = engine._body
        monkeypatch.setattr(engine, "_body", lambda *given: {**body(*given), "ignore_eos": True})
    return engine


def test_closing_the_stream_stops_the_model_within_a_token(endless):
    stream = endless.stream(ASK, [BASE_ONLY], Sampling(max_new_tokens=512), threading.Event())
    while not next(stream).text:
        pass
    stream.close()
    began = time.perf_counter()
    say(endless, sampling=Sampling(max_new_tokens=1))  # waits for the inference thread
    assert time.perf_counter() - began < 0.5


def test_cancelling_stops_the_model_and_says_so(endless):
    cancel, seen = threading.Event(), []
    for chunk in endless.stream(ASK, [BASE_ONLY], Sampling(max_new_tokens=512), cancel):
        seen.append(chunk)
        cancel.set()
    # The tiny model takes 0.1 ms a token, so that some are under way when the first chunk comes.
    assert seen[-1].usage.finish_reason == "cancelled" and len(seen) < 100


def test_a_failure_of_the_model_reaches_the_caller_and_the_engine_lives(engine, monkeypatch):
    with monkeypatch.context() as broken:
        if isinstance(engine, LlamaEngine):
            broken.setattr(engine, "_body", lambda *given: {"prompt": "no ids", "lora": "no list", "stream": True})
        else:
            broken.setattr(engine.model, "generate", lambda **_: 1 / 0)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            say(engine)
    assert say(engine)[0] == "臣妾明白。"


def test_callers_at_once_each_get_the_reply_of_their_own_adapter(engine):
    alone, texts = say(engine, adapter=BASE_ONLY)[0], {}

    def ask(name, adapter):
        texts[name] = say(engine, adapter=adapter)[0]

    threads = [threading.Thread(target=ask, args=(n, ("tiny", BASE_ONLY)[n % 2])) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: ("臣妾明白。", alone)[n % 2] for n in range(6)}


def test_an_unknown_adapter_is_refused_with_the_choice(engine):
    with pytest.raises(ValueError, match=r"no adapter '\.\./x'; choose one of tiny, base"):
        say(engine, adapter="../x")


def test_a_long_history_is_trimmed_and_counted(engine):
    history = [{"role": r, "content": "说" * 90} for _ in range(6) for r in ("user", "assistant")]
    _, usage = say(engine, [*history, *ASK])
    assert usage.dropped_messages > 0 and usage.dropped_messages % 2 == 0


def test_two_adapters_load_side_by_side_and_each_gives_its_own_reply(trained, checkpoint, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "other")
    weights = load_file(folder / WEIGHTS)
    save_file({name: -w if "lora_B" in name else w for name, w in weights.items()}, folder / WEIGHTS)
    other = Adapter.open(folder, checkpoint)
    both, alone = LocalEngine(checkpoint, [trained, other]), LocalEngine(checkpoint, [other])
    both.wait()
    assert both.adapters == ["tiny", "other", BASE_ONLY]
    texts = {name: say(both, adapter=name)[0] for name in ("other", "tiny", "other")}
    assert texts == {"tiny": "臣妾明白。", "other": say(alone, adapter="other")[0]}


def test_the_same_question_to_two_in_one_batch_gets_what_each_says_alone(engine):
    texts, usages = {0: "", 1: ""}, {}
    for chunk in engine.stream(ASK, ["tiny", BASE_ONLY], GREEDY, threading.Event()):
        texts[chunk.row] += chunk.text
        usages[chunk.row] = chunk.usage or usages.get(chunk.row)
    assert texts == {0: say(engine)[0], 1: say(engine, adapter=BASE_ONLY)[0]}
    assert usages[0].finish_reason == "stop" and usages[0].tokens == say(engine)[1].tokens
    other_way = list(engine.stream(ASK, [BASE_ONLY, "tiny"], GREEDY, threading.Event()))
    assert {chunk.row: chunk.usage.finish_reason for chunk in other_way if chunk.usage}[1] == "stop"


def test_a_turn_left_open_is_continued(engine):
    begun = [*ASK, {"role": "assistant", "content": "臣妾"}]
    chunks = engine.stream(begun, ["tiny"], GREEDY, threading.Event(), continue_final_message=True)
    assert "".join(chunk.text for chunk in chunks) == "明白。"


def test_an_adapter_is_named_by_its_digest(engine, trained):
    from chat.download import digest

    assert digest(trained.folder / WEIGHTS).startswith(engine.digest("tiny")) and len(engine.digest("tiny")) == 12
    assert engine.digest(BASE_ONLY) == ""


def test_a_forged_history_of_any_length_costs_no_more_than_one_that_fits(engine, monkeypatch):
    read = []
    ids = chat.prompt.prompt_ids
    measured = lambda t, messages, final: read.append(len(str(messages))) or ids(t, messages)  # noqa: E731
    monkeypatch.setattr(chat.prompt, "prompt_ids", measured)
    history = [{"role": r, "content": "说" * 1600} for _ in range(100) for r in ("user", "assistant")]
    say(engine, [*history, *ASK])
    assert sum(read) < 10_000


def test_on_zerogpu_adapters_are_tried_before_there_is_a_gpu(trained, checkpoint, monkeypatch):
    placed = []
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    for module in (chat.base_model, chat.local):
        monkeypatch.setattr(module, "best_device", lambda: placed.append("asked") or "cpu")
    tried = LocalEngine._fault
    monkeypatch.setattr(LocalEngine, "_fault", lambda self, name: placed.append("tried") or tried(self, name))
    assert LocalEngine(checkpoint, [trained]).adapters == ["tiny", BASE_ONLY]
    assert placed == ["asked", "tried", "asked"]  # for the dtype, then to move there


@pytest.mark.parametrize(
    "forged",
    [
        {"temperature": -1},
        {"temperature": 1e-45},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": 10**9},
        {"max_new_tokens": 10**6},
        {"repetition_penalty": "1"},
        {"temperature": True},
    ],
)
def test_a_forged_sampling_value_is_refused_by_name(forged):
    with pytest.raises(ValueError, match=f"{next(iter(forged))} is .*choose .*a number from"):
        Sampling(**forged)


def test_the_defaults_are_those_of_qwen():
    from chat.bases import SAMPLING

    assert {name: getattr(Sampling(), name) for name in SAMPLING} == SAMPLING


def test_the_fake_engine_obeys_the_protocol():
    engine = FakeEngine("好的", ValueError("坏"))
    assert say(engine, adapter="scripted")[0] == "好的"
    with pytest.raises(ValueError, match="坏"):
        say(engine, adapter="scripted")


def test_the_terminal_chat_answers_line_by_line(monkeypatch, capsys):
    from chat.__main__ import talk

    lines = iter(["你是谁？", "再说", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    engine = FakeEngine("臣妾明白。", ValueError("太长了。"))
    talk(engine, "scripted")
    assert "甄嬛：臣妾明白。" in (printed := capsys.readouterr().out) and "太长了。" in printed
    assert [m["content"] for m in engine.asked[1][0]] == ["你是谁？", "臣妾明白。", "再说"]


# Loading on the engine's own thread.


@pytest.fixture(params=["llama", "transformers"])
def slow(request, trained, checkpoint, tiny_gguf, monkeypatch):
    """An engine of either kind that loads when the event is set, and the event."""
    go = threading.Event()
    engine = {"llama": LlamaEngine, "transformers": LocalEngine}[request.param]
    load = engine._load
    monkeypatch.setattr(engine, "_load", lambda *given: go.wait(30) and load(*given))
    monkeypatch.setattr(chat.engine, "HEARTBEAT", 0.02)
    yield engine(tiny_gguf if request.param == "llama" else checkpoint, [trained]), go
    go.set()


def test_an_engine_that_loads_tells_what_is_expected_and_a_reply_waits(slow, tiny_base):
    engine, go = slow
    assert engine.health == "loading"
    assert not engine.ready and engine.adapters == ["tiny", BASE_ONLY] and tiny_base.name in engine.base
    assert engine.num_slots == 1
    stream = engine.stream(ASK, ["tiny"], GREEDY, threading.Event())
    assert [next(stream).text for _ in range(3)] == ["", "", ""]  # a visitor can leave meanwhile
    go.set()
    assert "".join(chunk.text for chunk in stream) == "臣妾明白。"
    engine.wait()
    assert engine.ready and engine.num_slots == engine.max_num_seqs


def test_loading_for_long_is_no_stall_to_those_who_waited_for_it(checkpoint, monkeypatch):
    load = LocalEngine._load
    monkeypatch.setattr(chat.engine, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(LocalEngine, "_load", lambda *given: (time.sleep(1.2), load(*given))[1])
    engine = LocalEngine(checkpoint, max_num_seqs=2)
    assert say(engine, adapter=BASE_ONLY, sampling=ONE_TOKEN)[1].tokens == 1
    while not engine._scheduler:
        engine._thread.submit(int).result()


@pytest.mark.parametrize("kind", [LlamaEngine, LocalEngine])
def test_a_failure_of_loading_is_raised_by_wait_and_by_every_reply(kind, checkpoint, monkeypatch):
    monkeypatch.setattr(kind, "_load", lambda *_: 1 / 0)
    engine = kind(checkpoint)
    for ask in (engine.wait, lambda: say(engine, adapter=BASE_ONLY), lambda: say(engine, adapter=BASE_ONLY)):
        with pytest.raises(ZeroDivisionError):
            ask()
    assert engine.ready


# An engine that gets no further.


@pytest.fixture
def stepwise(engine, monkeypatch):
    """A function that has something called before each step of the engine, which counts as stuck after 0.4 s."""
    monkeypatch.setattr(chat.engine, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(chat.engine, "HEARTBEAT", 0.05)

    def begin(step):
        if isinstance(engine, LlamaEngine):
            monkeypatch.setattr(engine, "_server", ScriptedServer(step))
        for layer in [] if isinstance(engine, LlamaEngine) else engine.model.get_base_model().model.layers:
            monkeypatch.setattr(layer, "forward", before(step, layer.forward))
        return engine

    return begin


def before(step, forward):
    return lambda *args, **kwargs: (step(), forward(*args, **kwargs))[1]


class ScriptedServer:
    """llama.cpp's stream for a prompt of two parts and a reply of one token."""

    def __init__(self, step):
        self.step = step

    def handle_completions(self, body, reply):
        last = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
        for event in ({"choices": [], "prompt_progress": {}}, {"choices": [], "prompt_progress": {}}, last):
            self.step()
            if reply(event):
                return


ONE_TOKEN = Sampling(temperature=0, max_new_tokens=1)


def test_a_step_that_never_ends_ends_every_reply_and_the_engine_is_back_when_it_ends_after_all(stepwise, monkeypatch):
    go = threading.Event()
    engine = stepwise(lambda: go.wait(30))
    try:
        with ThreadPoolExecutor(50) as callers:
            asked = [callers.submit(say, engine, adapter=name) for name in ("tiny", BASE_ONLY)]
            assert engine.health == "ok"
            while not all(each.done() for each in asked) and len(asked) < 50:  # others keep coming
                asked.append(callers.submit(say, engine))
                time.sleep(0.1)
            assert len(asked) < 50 and {type(each.exception()) for each in asked} == {Stalled}
        time.sleep(0.3)
        assert engine.health == "stuck", "that visitors come, and give up, is no progress"
        with pytest.raises(Stalled, match="thread is stuck"):
            next(engine.stream(ASK, ["tiny"], GREEDY, threading.Event()))  # told at once, without a chunk before that
    finally:
        go.set()
    while engine.health != "ok":
        time.sleep(0.01)
    monkeypatch.undo()
    assert say(engine)[0] == "臣妾明白。"


def test_slow_steps_and_a_wait_behind_others_are_no_stall(stepwise):
    engine = stepwise(lambda: time.sleep(0.3))
    began = time.monotonic()
    with ThreadPoolExecutor(2) as callers:
        asked = [callers.submit(say, engine, adapter=name, sampling=ONE_TOKEN) for name in ("tiny", BASE_ONLY)]
        assert [each.result()[1].tokens for each in asked] == [1, 1]
    assert time.monotonic() - began > 2 * chat.engine.STALL_SECONDS
    time.sleep(chat.engine.STALL_SECONDS + 0.1)
    assert engine.health == "ok", "nor is it one when nobody asks"


@pytest.mark.parametrize("end", [lambda threads: threads.shutdown(), lambda threads: threads._work_queue.put("no job")])
def test_a_dead_inference_thread_is_told_at_once(engine, monkeypatch, end):
    threads = InferenceThreads(1, "dying")
    threads.submit(int).result()
    monkeypatch.setattr(engine, "_threads" if isinstance(engine, LlamaEngine) else "_thread", threads)
    end(threads)
    (thread,) = threads._threads
    thread.join(5)
    assert engine.health == "dead"
    with pytest.raises(Stalled, match="thread is dead"):
        say(engine)


def test_an_exit_on_the_inference_thread_ends_the_reply_alone(engine, monkeypatch):
    with monkeypatch.context() as broken:
        target = engine._lora_queue if isinstance(engine, LlamaEngine) else engine.model
        name = "enter" if isinstance(engine, LlamaEngine) else "generate"
        broken.setattr(target, name, lambda *_, **__: sys.exit(3))
        with pytest.raises(Stalled, match="ended its thread"):
            say(engine)
    assert engine.health == "ok" and say(engine)[0] == "臣妾明白。"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 7),
        ({"PLACES": "3"}, 3),
        ({"PLACES": "3", "MAX_NUM_SEQS": "4"}, 4),
        ({"MAX_NUM_SEQS": "", "PLACES": "5"}, 5),
    ],
)
def test_max_num_seqs_may_still_be_called_places(settings, expected):
    assert max_num_seqs(7, settings=settings) == expected
    assert max_num_seqs(7, "ENGINE_", {f"ENGINE_{name}": value for name, value in settings.items()}) == expected
    with pytest.raises(ValueError, match=r"MAX_NUM_SEQS is '0'\. Write a whole number from 1 on"):
        max_num_seqs(7, settings={"MAX_NUM_SEQS": "0"})


def test_a_slider_at_a_whole_number_gives_the_type_that_is_declared():
    parameters = Sampling(repetition_penalty=1, temperature=1).parameters()
    assert [type(parameters[name]) for name in ("repetition_penalty", "temperature", "top_k")] == [float, float, int]
    assert set(parameters) == {*vars(Sampling())} - {"seed"}
