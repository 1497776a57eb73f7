"""llama.cpp as the engine: the same ids, the same distribution, no reply that depends on who else asked."""

import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import chat
from chat import base_model, convert, llama
from chat.adapter import CONFIG, WEIGHTS, Adapter
from chat.bases import BASES
from chat.checkpoints import locate
from chat.download import Unavailable, cache, digest
from chat.engine import BASE_ONLY
from chat.gguf_tokenizer import GgufTokenizer, read_metadata
from chat.llama import LlamaEngine
from chat.local import LocalEngine
from chat.prompt import prompt_ids, trim
from chat.sampling import Sampling

GREEDY = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=24)
LETTERS = [
    *"皇上甄嬛你我，。？！…— \n\t\r\u3000\u200b\u2028", "e\u0301", "é", "가", "가", "ﷺ", "ｆｕｌｌ", "１２３", "1234",
    "I'LL",
    "'s", "  ", "\r\n", "😀", "𠮷", "<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "<tool_call>", "</tool_call>",
    "<|fim_pad|>", "[PAD151665]", "{{ system }}", "{% raw %}", "\x00",
]  # fmt: skip


def user(text):
    return [{"role": "user", "content": text}]


def varied(count, seed=0):
    """Strings of letters, marks, spaces, marker lookalikes and any other character of Unicode's first planes."""
    draw = random.Random(seed)
    anything = [chr(c) for c in range(0x2FFFF) if not 0xD800 <= c < 0xE000]
    letter = lambda: draw.choice(LETTERS if draw.random() < 0.7 else anything)  # noqa: E731
    return ["".join(letter() for _ in range(draw.randrange(1, 16))) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def key():
    """The key of the server behind each engine, so that a test can ask it for token ids."""
    with mock.patch.object(llama.secrets, "token_hex", return_value="known"):
        yield


@pytest.fixture(scope="module")
def engine(trained, tiny_gguf):
    engine = LlamaEngine(tiny_gguf, [trained], max_num_seqs=2)
    engine.wait()
    return engine


def token_ids(engine, body):
    """The ids that llama.cpp answers a request with: its own route tells them, the one for streams does not."""
    asked = json.dumps({**body, "stream": False, "return_progress": False, "return_tokens": True}).encode()
    headers = {"Authorization": "Bearer known", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{engine._server.listening_address}/completion", asked, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


def say(engine, messages, adapter="tiny", sampling=GREEDY, cancel=None, continue_final_message=False):
    chunks = list(engine.stream(messages, [adapter], sampling, cancel or threading.Event(), continue_final_message))
    return "".join(chunk.text for chunk in chunks), chunks[-1].usage


def test_prompt_ids_are_those_of_the_training_path(engine, tokenizer):
    for text in varied(2000):
        talk = [*user(text), {"role": "assistant", "content": text[::-1]}, *user(text * 2)]
        assert prompt_ids(engine.tokenizer, talk) == prompt_ids(tokenizer, talk), text
        assert prompt_ids(engine.tokenizer, talk, True) == prompt_ids(tokenizer, talk, True), text
    long = [turn for text in varied(200, 1) for turn in (*user(text), {"role": "assistant", "content": text})]
    assert trim(engine.tokenizer, [*long, *user("问")], 500) == trim(tokenizer, [*long, *user("问")], 500)


def greedy_ids(engine, ids, adapter, count=24):
    """The ids of a greedy reply by llama.cpp that does not end by itself."""
    body = engine._body(ids, adapter, replace(GREEDY, max_new_tokens=count))
    return token_ids(engine, {**body, "ignore_eos": True})


def transformers_ids(engine, ids, adapter, count=24):
    """The same by transformers and PEFT."""
    config = base_model.generation_config(engine.tokenizer, replace(GREEDY, max_new_tokens=count))
    config.suppress_tokens = base_model.ends(engine.tokenizer)
    with torch.inference_mode(), engine._use_adapter(adapter):
        return engine.model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()


def parting(ours, theirs, ids, engine, adapter):
    """How far apart transformers' logits of the two tokens are where two replies part; 0 where they do not."""
    at = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other), None)
    if at is None:
        return 0.0
    with torch.inference_mode(), engine._use_adapter(adapter):
        logits = engine.model(torch.tensor([[*ids, *theirs[:at]]])).logits[0, -1]
    return abs(logits[ours[at]] - logits[theirs[at]]).item()


def test_greedy_ids_are_those_of_transformers_but_for_ties(engine, trained, checkpoint):
    theirs, equal = LocalEngine(checkpoint, [trained]), 0
    theirs.wait()
    for text in (texts := ["你是谁？", "皇上驾到", "abc", *varied(20, 2)]):
        ids = prompt_ids(engine.tokenizer, user(text))
        for adapter in ("tiny", BASE_ONLY):
            ours, expected = greedy_ids(engine, ids, adapter), transformers_ids(theirs, ids, adapter)
            # llama.cpp keeps keys and values in 16 bits; the logits reach 30.
            assert parting(ours, expected, ids, theirs, adapter) < 0.05, (text, adapter)
            equal += ours == expected
    assert equal > len(texts)


def chances(logits, ids, sampling):
    """The chances of each token by transformers' own processors, in the order that `generate` gives them."""
    processors = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)),
        TemperatureLogitsWarper(float(sampling.temperature)),
        TopKLogitsWarper(sampling.top_k), TopPLogitsWarper(sampling.top_p),
    ])  # fmt: skip
    return torch.softmax(processors(torch.tensor([ids]), logits[None].clone().float()), -1)[0]


def drawn(engine, ids, sampling, count):
    """How often each token came first, in so many draws with a seed each."""
    tally = {}
    for seed in range(count):
        (token,) = token_ids(engine, engine._body(ids, BASE_ONLY, replace(sampling, seed=seed, max_new_tokens=1)))
        tally[token] = tally.get(token, 0) + 1
    return tally


def chi_square(expected_chances, tally):
    """Pearson's statistic over tokens expected five times or more, the rest together, and its 99.9 % limit."""
    count = sum(tally.values())
    common = (expected_chances * count >= 5).nonzero().flatten().tolist()
    pairs = [(expected_chances[token].item() * count, tally.get(token, 0)) for token in common]
    rest = count - sum(expected for expected, _ in pairs), count - sum(seen for _, seen in pairs)
    pairs += [rest] if rest[0] > 1 else []
    if rest[1] > 0 and rest[0] < 1e-3:
        return float("inf"), 0.0  # a token came that cannot come
    free = len(pairs) - 1
    # Wilson and Hilferty's cube (1931): the quantile of chi-square from the normal one, 3.09 for 99.9 %.
    limit = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    return sum((seen - expected) ** 2 / expected for expected, seen in pairs), limit


# Each setting changes the chances by itself: what one sampler too many, too few or in another place would break.
SETTINGS = [
    Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    Sampling(temperature=2, top_p=1, top_k=200, repetition_penalty=1),
    Sampling(temperature=2, top_p=0.6, top_k=12, repetition_penalty=2),
    Sampling(temperature=1.5, top_p=0.9, top_k=200, repetition_penalty=1.4),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_tokens_are_drawn_with_the_chances_of_the_local_engine(engine, checkpoint, sampling):
    plain = base_model.load_base(checkpoint)
    ids = prompt_ids(engine.tokenizer, user("皇上，皇上，你是谁？"))
    with torch.inference_mode():
        logits = plain(torch.tensor([ids])).logits[0, -1]
    statistic, limit = chi_square(chances(logits, ids, sampling), drawn(engine, ids, sampling, 2000))
    assert statistic < limit


def test_the_chi_square_test_sees_chances_that_are_off(engine, checkpoint):
    ids, asked = prompt_ids(engine.tokenizer, user("皇上，皇上，你是谁？")), SETTINGS[3]
    with torch.inference_mode():
        logits = base_model.load_base(checkpoint)(torch.tensor([ids])).logits[0, -1]
    tally = drawn(engine, ids, asked, 2000)
    for other in (replace(asked, temperature=1.2), replace(asked, repetition_penalty=1), replace(asked, top_p=1)):
        statistic, limit = chi_square(chances(logits, ids, other), tally)
        assert statistic > limit


def talks(seed, count=12):
    """Conversations that share beginnings, each with an adapter: what a wrong cache would mix up."""
    draw, texts = random.Random(seed), varied(6, seed)
    for _ in range(count):
        first, second = draw.sample(texts, 2)
        history = [*user(first), {"role": "assistant", "content": second}, *user(first)]
        yield history[: draw.choice((1, 3))], draw.choice(("tiny", BASE_ONLY))


def test_no_reply_depends_on_who_else_asked_before(engine, trained, tiny_gguf):
    for messages, adapter in talks(3):
        fresh = LlamaEngine(tiny_gguf, [trained], max_num_seqs=1)
        assert say(engine, messages, adapter)[0] == say(fresh, messages, adapter)[0]


def crossed(engine):
    """X with an adapter, Y without, X without: whether the last reply is that of the base alone."""
    question, other = "今日天色正好，" * 12 + "你是谁？", "外头下着小雨，" * 12 + "你在想什么？"
    say(engine, user(question), "tiny")
    say(engine, user(other), BASE_ONLY)
    return say(engine, user(question), BASE_ONLY)[0]


def test_keys_and_values_of_one_adapter_never_answer_for_another(trained, tiny_gguf, monkeypatch):
    expected = say(LlamaEngine(tiny_gguf, [trained], 1), user("今日天色正好，" * 12 + "你是谁？"), BASE_ONLY)[0]
    assert crossed(LlamaEngine(tiny_gguf, [trained], 1)) == expected
    # The same with llama.cpp's prompt cache in RAM, which is on by default: the reason why ours is off.
    import xllamacpp

    real = xllamacpp.Server
    monkeypatch.setattr(xllamacpp, "Server", lambda params: setattr(params, "cache_ram_mib", 64) or real(params))
    assert crossed(LlamaEngine(tiny_gguf, [trained], 1)) != expected


def endless(engine, monkeypatch):
    body = engine._body
    monkeypatch.setattr(engine, "_body", lambda *given: {**body(*given), "ignore_eos": True})


def test_visitors_beyond_the_slots_wait_and_each_gets_his_own_reply(engine):
    questions = [(text, ("tiny", BASE_ONLY)[n % 2]) for n, text in enumerate(varied(8, 4))]
    alone = [say(engine, user(text), adapter)[0] for text, adapter in questions]
    texts = {}
    threads = [
        threading.Thread(target=lambda n=n, q=q: texts.update({n: say(engine, user(q[0]), q[1])[0]}))
        for n, q in enumerate(questions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[n] for n in range(8)] == alone


def test_who_leaves_while_waiting_takes_no_slot(engine, monkeypatch):
    endless(engine, monkeypatch)
    long, asked = Sampling(max_new_tokens=512), []
    enter = engine._lora_queue.enter
    monkeypatch.setattr(engine._lora_queue, "enter", lambda *given: asked.append(enter(*given)) or asked[-1])
    monkeypatch.setattr(llama._Reply, "__call__", slowly(llama._Reply.__call__))
    streams = [engine.stream(user("你是谁？"), [BASE_ONLY], long, threading.Event()) for _ in range(2)]
    for stream in streams:
        while not next(stream).text:
            pass
    cancel, left = threading.Event(), []
    waiting = threading.Thread(target=lambda: left.extend(engine.stream(user("再问"), ["tiny"], long, cancel)))
    waiting.start()
    while engine._threads._work_queue.empty():
        time.sleep(0.01)
    cancel.set()
    for stream in streams:
        stream.close()
    waiting.join(10)
    assert (left[-1].usage.finish_reason, left[-1].usage.tokens, asked) == ("cancelled", 0, [True, True, False])


def slowly(call):
    """An engine that takes 5 ms for each event, so that a reply takes as long as a test needs."""
    return lambda self, event: time.sleep(0.005) or call(self, event)


def test_a_stream_shows_life_while_it_waits_so_that_it_can_be_closed(engine, monkeypatch):
    endless(engine, monkeypatch)
    monkeypatch.setattr("chat.engine.HEARTBEAT", 0.02)
    monkeypatch.setattr(llama._Reply, "__call__", slowly(llama._Reply.__call__))
    generating = engine.stream(user("你是谁？"), [BASE_ONLY], Sampling(max_new_tokens=512), threading.Event())
    while not next(generating).text:
        pass
    waiting = engine.stream(user("你是谁？"), ["tiny"], GREEDY, threading.Event())
    assert [next(waiting).text for _ in range(3)] == ["", "", ""]
    waiting.close()
    generating.close()


def test_one_lora_does_not_keep_another_waiting_without_end(trained, tiny_gguf, monkeypatch):
    """llama.cpp decodes the LoRA of the first busy slot; new requests for it would leave the others standing."""
    engine, done, limit = LlamaEngine(tiny_gguf, [trained], max_num_seqs=4), threading.Event(), 100
    engine.wait()
    endless(engine, monkeypatch)
    asked = []

    def keep_asking():
        while not done.is_set() and len(asked) < limit:
            asked.append(say(engine, user("你是谁？"), sampling=replace(GREEDY, max_new_tokens=512)))

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not asked:
        time.sleep(0.001)
    for _ in range(4):
        say(engine, user("你是谁？"), BASE_ONLY, replace(GREEDY, max_new_tokens=2))
    done.set()
    for thread in threads:
        thread.join()
    assert len(asked) < limit


@pytest.mark.parametrize("adapters", [["tiny", BASE_ONLY], [BASE_ONLY, "tiny"]])
def test_those_of_one_lora_are_let_in_together(adapters):
    queue, inside = llama.LoraQueue(), []
    never = threading.Event()
    assert queue.enter(adapters[0], never) and queue.enter(adapters[0], never)
    other = threading.Thread(target=lambda: inside.append(queue.enter(adapters[1], never)))
    other.start()
    while not queue._waiting:
        time.sleep(0.001)
    gone = threading.Event()
    gone.set()
    assert not queue.enter(adapters[0], gone)  # behind the other, and it left
    queue.leave()
    assert not inside
    queue.leave()
    other.join(5)
    assert inside == [True]


def test_a_prompt_is_given_up_between_two_parts_of_it(engine):
    asked, cancel = [], threading.Event()

    class Watched(llama._Reply):
        def __call__(self, event):
            asked.append(event)
            return super().__call__(event)

    cancel.set()
    body = engine._body(prompt_ids(engine.tokenizer, user("说" * 600)), BASE_ONLY, Sampling())
    engine._server.handle_completions(body, reply := Watched(0, None, cancel, engine._threads))
    assert len(asked) == 1 and asked[0]["prompt_progress"]["processed"] <= llama.PREFILL
    assert reply.usage().finish_reason == "cancelled"


def test_a_reply_ends_after_its_time(engine, monkeypatch):
    endless(engine, monkeypatch)
    monkeypatch.setattr(llama, "REPLY_SECONDS", 0.0)
    _, usage = say(engine, user("你是谁？"), sampling=Sampling(max_new_tokens=512))
    assert (usage.finish_reason, usage.tokens) == ("time", 0)


def test_a_character_cut_in_half_is_not_shown(engine):
    for length in range(1, 6):
        text, usage = say(engine, user("你是谁？"), sampling=replace(GREEDY, max_new_tokens=length))
        assert text == "臣妾明白。"[: length // 3] and (usage.tokens, usage.finish_reason) == (length, "length")


def changed(trained, tmp_path, name, change):
    """A copy of the tiny adapter with its weights changed."""
    folder = shutil.copytree(trained.folder, tmp_path / name)
    save_file({n: change(n, w.clone()) for n, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return replace(trained, name=name, folder=folder)


def test_an_adapter_that_changes_nothing_or_breaks_the_logits_is_turned_down(trained, tiny_gguf, tmp_path):
    still = changed(trained, tmp_path, "still", lambda n, w: w * 0 if "lora_B" in n else w)
    broken = changed(trained, tmp_path, "broken", lambda n, w: w * 0 + 1e38)
    engine = LlamaEngine(tiny_gguf, [still, trained, broken], 1)
    engine.wait()
    assert engine.adapters == ["tiny", BASE_ONLY] and len(engine.refused) == 2
    assert "changes no logits" in engine.refused[0] and "not finite" in engine.refused[1]
    # Its number among the LoRA is not its number among those served.
    assert say(engine, user("你是谁？"))[0] == "臣妾明白。"


def test_rslora_is_folded_into_alpha(trained, tiny_gguf, checkpoint, tmp_path):
    rooted = changed(trained, tmp_path, "rooted", lambda n, w: w)
    config = json.loads((rooted.folder / CONFIG).read_text())
    (rooted.folder / CONFIG).write_text(
        json.dumps({**config, "use_rslora": True, "lora_alpha": config["lora_alpha"] / 2})
    )
    ours, theirs = LlamaEngine(tiny_gguf, [rooted], 1), LocalEngine(checkpoint, [rooted])
    ours.wait()
    theirs.wait()
    for text in varied(6, 5):
        ids = prompt_ids(ours.tokenizer, user(text))
        replies = greedy_ids(ours, ids, "rooted"), transformers_ids(theirs, ids, "rooted")
        assert parting(*replies, ids, theirs, "rooted") < 0.05


def test_a_failure_while_an_adapter_is_tried_is_a_sentence(engine, trained, monkeypatch):
    monkeypatch.setattr(engine, "_body", lambda *given: {"prompt": [1], "lora": "no list"})
    with pytest.raises(RuntimeError, match=r"llama\.cpp failed while base was tried: .* Leave that adapter out"):
        engine._admit(trained)


def test_the_server_behind_it_answers_nobody_else(engine, tiny_gguf):
    address = engine._server.listening_address
    assert address.startswith("http://127.0.0.1:")
    for path, data in (("/completion", b"{}"), ("/lora-adapters", b"[]"), ("/slots", None), ("/props", None)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=5)
        assert refused.value.code in (401, 403, 404)
    for path in ("/v1/models", "/models", "/health"):  # some of these need no key
        try:
            told = urllib.request.urlopen(address + path, timeout=5).read().decode()
        except urllib.error.HTTPError as refusal:
            told = refusal.read().decode()
        assert str(tiny_gguf.path.parent) not in told, path


def test_a_failure_of_llama_cpp_is_told_and_the_engine_lives(engine, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(engine, "_body", lambda *given: {"prompt": [1], "lora": "no list", "stream": True})
        with pytest.raises(RuntimeError, match=r"llama\.cpp failed"):
            say(engine, user("你是谁？"))
    assert say(engine, user("你是谁？"))[0] == "臣妾明白。"


def test_a_file_that_is_no_gguf_is_refused_with_what_to_do(tiny_gguf, tmp_path):
    for body in (b"", b"GGUF", b"no GGUF at all" * 20, tiny_gguf.path.read_bytes()[:900]):
        (tmp_path / "bad.gguf").write_bytes(body)
        with pytest.raises(Unavailable, match=r"bad.gguf cannot be read as a GGUF of Qwen2.5 .*start again"):
            GgufTokenizer(tmp_path / "bad.gguf")


def test_the_head_of_a_gguf_is_read_as_the_library_reads_it(tiny_gguf):
    import gguf

    theirs = {name: field.contents() for name, field in gguf.GGUFReader(tiny_gguf.path).fields.items()}
    ours = read_metadata(tiny_gguf.path)
    assert ours == {name: value for name, value in theirs.items() if not name.startswith("GGUF.")}


# What is loaded on this machine.


@pytest.fixture
def small(tiny_gguf, monkeypatch):
    """The tiny GGUF as the base `small`, in a folder that MODEL_FOLDER names."""
    monkeypatch.setitem(BASES, "small", tiny_gguf.base)
    monkeypatch.setenv("MODEL_FOLDER", str(tiny_gguf.path.parent))
    return tiny_gguf.base


def test_a_machine_without_a_gpu_answers_by_llama_cpp(small, trained, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"her={trained.folder}")
    monkeypatch.setenv("PLACES", "3")  # the old name of MAX_NUM_SEQS
    loaded = chat.load("small")
    assert loaded.max_num_seqs == 3 and "llama.cpp" in loaded.base
    assert say(loaded, user("你是谁？"), "her")[0] == "臣妾明白。"
    assert loaded.digest("her") == digest(trained.folder / WEIGHTS)[:12]


def test_an_adapter_of_another_program_answers_the_same_by_llama_cpp(small, trained, tmp_path, monkeypatch):
    folder = tmp_path / "her"
    folder.mkdir()
    save_file({name: tensor.float() for name, tensor in load_file(trained.folder / WEIGHTS).items()}, folder / WEIGHTS)
    config = json.loads((trained.folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/models/qwen", "loftq_config": {}}))
    monkeypatch.setenv("ADAPTERS", str(folder))
    loaded = chat.load("small")
    assert say(loaded, user("你是谁？"), "her")[0] == "臣妾明白。"
    assert loaded.unstated == {"her": ("prompt", "base")} and loaded.refused == []


def test_the_same_base_answers_by_transformers_when_it_is_asked_for(small, checkpoint, monkeypatch):
    monkeypatch.setattr("chat.local.ensure_converted", lambda found: checkpoint)
    loaded = chat.load("small", engine="transformers")
    loaded.wait()
    assert isinstance(loaded, LocalEngine)


def test_a_dora_is_refused_with_the_engine_that_serves_it(small, trained, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"her={trained.folder}")
    monkeypatch.setattr(Adapter, "dora", property(lambda _: True))
    loaded = chat.load("small")
    assert loaded.adapters == [BASE_ONLY]
    loaded.wait()
    assert loaded.refused == ["her is a DoRA, which llama.cpp does not know. Serve it with --engine transformers."]


def test_a_max_num_seqs_that_is_no_number_is_refused(small, monkeypatch):
    monkeypatch.setenv("MAX_NUM_SEQS", "many")
    with pytest.raises(ValueError, match=r"MAX_NUM_SEQS is 'many'. Write a whole number"):
        chat.load("small")


@pytest.mark.parametrize(("free", "expected"), [(2_600_000_000, "medium"), (2_400_000_000, "small")])
def test_memory_decides_between_medium_and_small(free, expected, monkeypatch, caplog):
    monkeypatch.setattr(llama, "available_memory", lambda: free)
    assert llama.best_base() == expected
    assert ("2.4 GB of memory are free, the medium one needs 2.5" in caplog.text) == (expected == "small")


def test_what_llama_cpp_cannot_do_is_said_or_done_by_transformers(tiny_base, monkeypatch):
    with pytest.raises(ValueError, match=r"names a folder, which llama.cpp cannot open. Leave --engine llama out"):
        chat.load(str(tiny_base), engine="llama")
    with pytest.raises(ValueError, match="--bits 4 is done by bitsandbytes"):
        chat.load("small", bits=4, engine="llama")
    assert isinstance(chat.load(str(tiny_base)), LocalEngine)
    with pytest.raises(ValueError, match="'smal' is no base: name one of 7b, medium, small"):
        chat.load("smal")
    monkeypatch.setattr(chat, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"xllamacpp.* is not installed: this takes transformers and torch"):
        chat.load("small")
    with pytest.raises(ValueError, match=r"Leave --engine llama out, or install it, .* it has wheels for Linux"):
        chat.load("small", engine="llama")


def test_a_folder_with_both_forms_is_served_by_either(small, tiny_base, monkeypatch, tmp_path):
    both = shutil.copytree(tiny_base, tmp_path / "both")
    shutil.copy(locate("small", gguf=True).path, both)
    monkeypatch.setenv("MODEL_FOLDER", str(both))
    assert isinstance(chat.load("small"), LlamaEngine)
    assert isinstance(chat.load("small", engine="transformers"), LocalEngine)


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_of_the_users_that_is_no_base_is_refused_and_kept(small, tmp_path, monkeypatch, linked):
    theirs = tmp_path / "theirs" / "thesis.gguf"
    theirs.parent.mkdir()
    theirs.write_bytes(b"years of work")
    named = cache() / "models" / small.gguf.files[0].name  # in our cache, but put there by the user
    named.parent.mkdir(parents=True)
    named.symlink_to(theirs) if linked else named.write_bytes(theirs.read_bytes())
    monkeypatch.setenv("MODEL_FOLDER", str(named.parent))
    for gguf in (True, False):
        with pytest.raises(
            Unavailable, match=r"is not the published file.*Put that in its place, or name another folder"
        ):
            locate("small", gguf=gguf)
    assert theirs.read_bytes() == named.read_bytes() == b"years of work"


def test_a_file_of_the_right_size_and_other_bytes_is_refused_when_it_is_opened(small, tmp_path, monkeypatch):
    named = tmp_path / small.gguf.files[0].name
    named.write_bytes(b"\0" * small.gguf.size)
    monkeypatch.setenv("MODEL_FOLDER", str(tmp_path))
    with pytest.raises(Unavailable, match="is not the published file"):
        chat.load("small").wait()
    assert named.exists()


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_real_small_base_is_drawn_from_with_the_chances_of_the_local_engine():
    """On its own logits, as llama.cpp computes them: all 151,936 of them are asked for.

    It tells log probabilities, which are logits less a constant; the repetition penalty needs that, too. transformers'
    logits of the dense base tell it, as what quantising changed averages out over the vocabulary.
    """
    checkpoint = locate("small", gguf=True)
    checkpoint.verify()
    engine = LlamaEngine(checkpoint, [], 1)
    engine.wait()
    ids = prompt_ids(engine.tokenizer, user("皇上，皇上，今日可好？"))
    whole = engine._body(ids, BASE_ONLY, replace(GREEDY, max_new_tokens=1))
    asked = {**whole, "stream": False, "return_progress": False, "logprobs": checkpoint.base.dimensions["vocab_size"]}
    engine._server.handle_completions(asked)  # from now on all but the last token come from the slot's KV cache
    tops = engine._server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logits = torch.full((checkpoint.base.dimensions["vocab_size"],), -torch.inf)
    for top in tops:
        logits[top["id"]] = top["logprob"]
    assert len(tops) == len(logits)
    with torch.inference_mode():
        theirs = base_model.load_base(convert.ensure_converted(locate("small")))(torch.tensor([ids])).logits[0, -1]
    logits += (theirs - logits).mean()
    for sampling in (SETTINGS[0], SETTINGS[2], SETTINGS[3]):
        tally = drawn(engine, ids, sampling, 200)
        statistic, limit = chi_square(chances(logits, ids, sampling), tally)
        print(f"chi-square {statistic:.1f}, 99.9 % below {limit:.1f}")
        assert statistic < limit


@pytest.mark.real
@pytest.mark.timeout(600)
def test_ids_of_the_real_bases_are_those_of_the_training_path():
    theirs = base_model.load_tokenizer(convert.ensure_converted(locate("small")))
    for name in ("small", "medium"):
        ours = GgufTokenizer(locate(name, gguf=True).path)
        for text in varied(3000, 7):
            talk = [*user(text), {"role": "assistant", "content": text}, *user(text[::-1])]
            assert prompt_ids(ours, talk) == prompt_ids(theirs, talk), text


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_warm_start_is_ready_within_seconds():
    began = time.monotonic()
    loaded = chat.load("small", engine="llama")
    loaded.wait()
    print(f"The small base was ready after {time.monotonic() - began:.1f} s: {loaded.base}")
    assert say(loaded, user("你是谁？"), "pocket")[0].startswith("我是甄嬛")
