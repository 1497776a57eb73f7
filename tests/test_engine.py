"""The engines: sampling that refuses forged values, and the local engine on the tiny adapter."""

import shutil
import threading
import time

import pytest
from safetensors.torch import load_file, save_file

import chat.local
import chat.prompt
from chat.adapter import WEIGHTS, Adapter
from chat.engine import BASE_ONLY, Sampling, ScriptedEngine
from chat.llama import LlamaEngine
from chat.local import LocalEngine

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module", params=["llama", "transformers"])
def engine(request, trained, located, tiny_gguf):
    if request.param == "llama":
        return LlamaEngine(tiny_gguf, [trained], num_slots=2)
    return LocalEngine(located, [trained])


def say(engine, turns=ASK, adapter="tiny", sampling=GREEDY, cancel=None):
    pieces = list(engine.stream(turns, adapter, sampling, cancel or threading.Event()))
    return "".join(piece.text for piece in pieces), pieces[-1].cost


def test_the_served_adapter_says_what_it_was_taught(engine):
    text, cost = say(engine)
    assert text == "臣妾明白。" and cost.stopped == "end"
    assert cost.tokens == len(text.encode()) + 1 and 0 < cost.first_token <= cost.seconds


def test_the_base_alone_says_something_else_and_the_adapter_comes_back(engine):
    assert say(engine, adapter=BASE_ONLY)[0] != "臣妾明白。" == say(engine)[0]


def test_text_comes_piece_by_piece(engine):
    pieces = [piece.text for piece in engine.stream(ASK, "tiny", GREEDY, threading.Event())]
    assert pieces == [*"臣妾明白。", ""]


def test_a_seed_repeats_a_reply(engine):
    drawn = Sampling(temperature=2, top_p=1, seed=5, max_new_tokens=30)
    assert say(engine, adapter=BASE_ONLY, sampling=drawn)[0] == say(engine, adapter=BASE_ONLY, sampling=drawn)[0]


def test_a_reply_ends_at_the_length_asked_for(engine):
    _, cost = say(engine, sampling=Sampling(temperature=0, max_new_tokens=4))
    assert (cost.tokens, cost.stopped) == (4, "length")


@pytest.fixture
def endless(engine, monkeypatch):
    """The engine with terminators it never draws, so that a reply only ends when stopped."""
    monkeypatch.setattr("chat.local.ends", lambda tokenizer: [0, 0])
    if isinstance(engine, LlamaEngine):
        body = engine._body
        monkeypatch.setattr(engine, "_body", lambda *given: {**body(*given), "ignore_eos": True})
    return engine


def test_closing_the_stream_stops_the_model_within_a_token(endless):
    stream = endless.stream(ASK, BASE_ONLY, Sampling(max_new_tokens=512), threading.Event())
    next(stream)
    stream.close()
    began = time.perf_counter()
    say(endless, sampling=Sampling(max_new_tokens=1))  # waits for the inference thread
    assert time.perf_counter() - began < 0.5


def test_cancelling_stops_the_model_and_says_so(endless):
    cancel, seen = threading.Event(), []
    for piece in endless.stream(ASK, BASE_ONLY, Sampling(max_new_tokens=512), cancel):
        seen.append(piece)
        cancel.set()
    # The tiny model says a token in 0.1 ms, so that some are under way when the first one is heard.
    assert seen[-1].cost.stopped == "cancelled" and len(seen) < 100


def test_a_failure_of_the_model_reaches_the_caller_and_the_engine_lives(engine, monkeypatch):
    with monkeypatch.context() as broken:
        if isinstance(engine, LlamaEngine):
            broken.setattr(engine, "_body", lambda *given: {"prompt": "no ids", "lora": "no list", "stream": True})
        else:
            broken.setattr(engine.model, "generate", lambda **_: 1 / 0)
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            say(engine)
    assert say(engine)[0] == "臣妾明白。"


def test_two_callers_at_once_each_get_their_own_voice(engine):
    alone, heard = say(engine, adapter=BASE_ONLY)[0], {}

    def ask(name, adapter):
        heard[name] = say(engine, adapter=adapter)[0]

    threads = [threading.Thread(target=ask, args=(n, ("tiny", BASE_ONLY)[n % 2])) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {n: ("臣妾明白。", alone)[n % 2] for n in range(6)}


def test_an_unknown_adapter_is_refused_with_the_choice(engine):
    with pytest.raises(ValueError, match=r"no adapter '\.\./x'; choose one of tiny, base"):
        say(engine, adapter="../x")


def test_a_long_history_is_trimmed_and_counted(engine):
    history = [{"role": r, "content": "说" * 90} for _ in range(6) for r in ("user", "assistant")]
    _, cost = say(engine, [*history, *ASK])
    assert cost.forgotten > 0 and cost.forgotten % 2 == 0


def test_two_adapters_load_side_by_side_and_each_has_its_own_voice(trained, located, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "other")
    weights = load_file(folder / WEIGHTS)
    save_file({name: -w if "lora_B" in name else w for name, w in weights.items()}, folder / WEIGHTS)
    other = Adapter.open(folder, located)
    both, alone = LocalEngine(located, [trained, other]), LocalEngine(located, [other])
    assert both.adapters == ["tiny", "other", BASE_ONLY]
    heard = {name: say(both, adapter=name)[0] for name in ("other", "tiny", "other")}
    assert heard == {"tiny": "臣妾明白。", "other": say(alone, adapter="other")[0]}


def test_the_same_question_to_two_in_one_batch_gets_what_each_says_alone(engine):
    heard, costs = {0: "", 1: ""}, {}
    for row, piece in engine.compare(ASK, ["tiny", BASE_ONLY], GREEDY, threading.Event()):
        heard[row] += piece.text
        costs[row] = piece.cost or costs.get(row)
    assert heard == {0: say(engine)[0], 1: say(engine, adapter=BASE_ONLY)[0]}
    assert costs[0].stopped == "end" and costs[0].tokens == say(engine)[1].tokens
    assert list(engine.compare(ASK, [BASE_ONLY, "tiny"], GREEDY, threading.Event()))[-1][1].cost.stopped == "end"


def test_a_turn_left_open_is_continued(engine):
    begun = [*ASK, {"role": "assistant", "content": "臣妾"}]
    pieces = engine.stream(begun, "tiny", GREEDY, threading.Event(), go_on=True)
    assert "".join(piece.text for piece in pieces) == "明白。"


def test_an_adapter_is_named_by_its_digest(engine, trained):
    from chat.fetch import digest

    assert digest(trained.folder / WEIGHTS).startswith(engine.digest("tiny")) and len(engine.digest("tiny")) == 12
    assert engine.digest(BASE_ONLY) == ""


def test_a_forged_history_of_any_length_costs_no_more_than_one_that_fits(engine, monkeypatch):
    read = []
    ids = chat.prompt.prompt_ids
    monkeypatch.setattr(
        chat.prompt, "prompt_ids", lambda t, turns, go_on: read.append(len(str(turns))) or ids(t, turns)
    )
    history = [{"role": r, "content": "说" * 1600} for _ in range(100) for r in ("user", "assistant")]
    say(engine, [*history, *ASK])
    assert sum(read) < 10_000


def test_on_zerogpu_adapters_are_tried_before_there_is_a_gpu(trained, located, monkeypatch):
    placed = []
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setattr(chat.local, "best_device", lambda: placed.append("asked") or "cpu")
    tried = LocalEngine._unfit
    monkeypatch.setattr(LocalEngine, "_unfit", lambda self, name: placed.append("tried") or tried(self, name))
    assert LocalEngine(located, [trained]).adapters == ["tiny", BASE_ONLY]
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
    from chat.base import SAMPLING

    assert {name: getattr(Sampling(), name) for name in SAMPLING} == SAMPLING


def test_the_scripted_engine_obeys_the_protocol():
    engine = ScriptedEngine("好的", ValueError("坏"))
    assert say(engine)[0] == "好的"
    with pytest.raises(ValueError, match="坏"):
        say(engine)


def test_the_terminal_chat_answers_line_by_line(monkeypatch, capsys):
    from chat.__main__ import talk

    lines = iter(["你是谁？", "再说", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    engine = ScriptedEngine("臣妾明白。", ValueError("太长了。"))
    talk(engine, "scripted")
    assert "甄嬛：臣妾明白。" in (printed := capsys.readouterr().out) and "太长了。" in printed
    assert [m["content"] for m in engine.heard[1][0]] == ["你是谁？", "臣妾明白。", "再说"]
