"""A base in 4 or 8 bits, by bitsandbytes itself on the CPU: what is loaded, trained, served and refused."""

import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from bitsandbytes import nn as bnb
from bitsandbytes.functional import dequantize_4bit

import app
import chat
from chat import __main__ as terminal
from chat import local
from chat.adapter import METRICS, RECIPE, Adapter
from chat.base_model import load_base
from chat.engine import BASE_ONLY
from chat.local import LocalEngine
from chat.sampling import Sampling
from qwen2.decoder import Decoder
from tests.conftest import TAUGHT
from training import trainer
from training.adapter_files import reopen
from training.pipeline import run
from training.preflight import prepare_folders
from training.recipe import TINY, Run
from training.tokens import Encoded
from training.trainer import flatten

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=20)
LINEAR = {4: bnb.Linear4bit, 8: bnb.Linear8bitLt}
ROWS = [Encoded([*range(1, 20)], [*range(1, 20)])]


@pytest.fixture(scope="module")
def learned(tiny_base, tmp_path_factory):
    """The tiny adapter, trained on the tiny base in 4 bits."""
    folder = tmp_path_factory.mktemp("bits")
    recipe = replace(TINY, base=str(tiny_base), dataset=(str(TAUGHT),), bits=4, validation_rows=0, probe_replies=0,
                     long_chats=0, logging_steps=1)  # fmt: skip
    with mock.patch.object(trainer, "attach", side_effect=trainer.attach) as attach:
        adapter = run(Run(recipe=recipe, output=folder / "her", work=folder / "work"))
    assert in_4_bits(attach.call_args.args[0])
    return adapter


@pytest.fixture(scope="module")
def engine(checkpoint, learned):
    engine = LocalEngine(checkpoint, [learned], 4)
    engine.wait()
    return engine


def say(engine, adapter):
    """The texts of a reply's chunks."""
    return [chunk.text for chunk in engine.stream(ASK, [adapter], GREEDY, threading.Event()) if chunk.text]


def in_4_bits(model):
    return any(isinstance(module, bnb.Linear4bit) for module in model.modules())


def gradients(model):
    """Of a pass of the LoRA, with B drawn so that A has one too."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.02)
    model.train()
    model(**flatten(ROWS), use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_linear_layers_have_so_many_bits_and_nothing_else_has(checkpoint, bits):
    whole, less = load_base(checkpoint), load_base(checkpoint, bits=bits)
    kinds = {name: type(module) for name, module in less.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds.pop("lm_head") is torch.nn.Linear and set(kinds.values()) == {LINEAR[bits]} and len(kinds) == 14
    for name in kinds:
        weight, before = less.get_submodule(name).weight, whole.get_submodule(name).weight
        assert weight.nbytes == before.numel() * bits / 8
        if bits == 4:
            assert (weight.quant_type, weight.quant_state.nested) == ("nf4", True)
            error = (dequantize_4bit(weight.data, weight.quant_state) - before).norm() / before.norm()
            assert 0.01 < error < 0.12
    assert torch.equal(less.model.embed_tokens.weight, whole.model.embed_tokens.weight)


def test_a_run_over_4_bits_lowers_the_loss_and_its_adapter_opens(learned, checkpoint):
    losses = [loss for _, loss in json.loads((learned.folder / METRICS).read_text())["loss_curve"]]
    assert losses[-1] < losses[0] / 10
    assert Adapter.open(learned.folder, checkpoint).recipe["bits"] == 4


def test_replies_stream_with_the_adapter_and_without_it(engine):
    assert say(engine, "her") == [*"臣妾明白。"]
    alone = say(engine, BASE_ONLY)
    assert len(alone) > 1 and alone != say(engine, "her")
    assert in_4_bits(engine.model) and engine.base.endswith(", 4 bits)")


def test_side_by_side_each_row_has_its_own_adapter(engine):
    texts = {0: [], 1: []}
    for chunk in engine.stream(ASK, ["her", BASE_ONLY], GREEDY, threading.Event()):
        texts[chunk.row] += [chunk.text] if chunk.text else []
    assert texts == {0: say(engine, "her"), 1: say(engine, BASE_ONLY)}


@pytest.mark.parametrize(("trained_in", "served_in"), [(4, 16), (16, 4), (16, 8)])
def test_an_adapter_is_served_in_any_bits_whatever_it_was_trained_in(
    learned, trained, checkpoint, trained_in, served_in
):
    adapter = learned if trained_in == 4 else trained
    other = LocalEngine(checkpoint, [adapter], served_in)
    other.wait()
    assert other.adapters == [adapter.name, BASE_ONLY]  # it changes the logits, and leaves them finite
    assert say(other, adapter.name) != say(other, BASE_ONLY)
    assert served_in == 4 or "".join(say(other, adapter.name)) == "臣妾明白。"


def test_gradients_are_the_same_with_checkpointing(checkpoint):
    one, other = (
        gradients(trainer.attach(load_base(checkpoint, bits=4), replace(TINY, bits=4, gradient_checkpointing=asked)))
        for asked in (False, True)
    )
    assert all(grad.abs().sum() > 0 for grad in one)
    torch.testing.assert_close(one, other)


def test_gradients_are_the_same_after_a_look_on_a_processor_with_bf16(checkpoint):
    grads = []
    for bf16 in (False, True):
        with mock.patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=bf16):
            model = trainer.attach(load_base(checkpoint, bits=4), replace(TINY, bits=4))
        with torch.no_grad():
            model.eval()(**flatten(ROWS), use_cache=False)
        grads.append(gradients(model))
    torch.testing.assert_close(*grads)


def test_an_adapter_is_measured_again_in_its_own_bits(learned, tmp_path):
    model, *_ = reopen(learned.folder, None)
    assert in_4_bits(model)
    older = shutil.copytree(learned.folder, tmp_path / "her")
    recipe = json.loads((older / RECIPE).read_text())
    assert recipe.pop("bits") == 4
    (older / RECIPE).write_text(json.dumps(recipe))
    model, _, recipe, *_ = reopen(older, None)
    assert recipe.bits == 16 and not in_4_bits(model)


def test_a_run_begun_before_there_was_a_choice_goes_on_in_16_bits(tiny_run):
    job = tiny_run()
    prepare_folders(job, job.output, job.work)
    noted = json.loads((job.work / RECIPE).read_text())
    assert noted.pop("bits") == 16
    (job.work / RECIPE).write_text(json.dumps(noted))
    prepare_folders(replace(job, resume=True), job.output, job.work)
    with pytest.raises(ValueError, match="started with another bits"):
        prepare_folders(replace(tiny_run(bits=4), resume=True), job.output, job.work)


def test_the_decoder_is_not_tried_and_would_refuse(engine, tiny_base, monkeypatch):
    monkeypatch.setattr(local, "num_slots", lambda: 8)
    monkeypatch.setattr(LocalEngine, "start_batching", lambda *_: pytest.fail("it would batch"))
    served = local.load(str(tiny_base), 4)
    served.wait()
    assert (served.max_num_seqs, served.num_slots) == (1, 1) and served.base.endswith(", 4 bits)")
    with pytest.raises(RuntimeError, match="multiplies weights of 16 bits"):
        Decoder(engine.model, ["her"], 2, 64)


@pytest.mark.parametrize(
    ("gigabytes", "bits", "base"),
    [
        (24, 16, "7b"), (16, 16, "medium"), (12, 8, "7b"), (10, 8, "medium"), (8, 4, "7b"), (6, 4, "medium"),
        (4, 4, "small"),
    ],
)  # fmt: skip
def test_a_gpu_gets_the_largest_base_that_it_has_room_for(monkeypatch, gigabytes, bits, base):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    assert local.best_base(bits) == base


def test_without_bitsandbytes_the_sentence_tells_how_to_install_it(monkeypatch, tiny_run, tiny_base):
    monkeypatch.setattr("chat.base_model.find_spec", lambda name: None)
    job = tiny_run(bits=4)
    for ask in (lambda: run(job), lambda: local.load(str(tiny_base), 4)):
        with pytest.raises(ValueError, match=r"^4 bits need bitsandbytes.*pip install .*-r requirements-bits\.txt"):
            ask()
    assert not job.work.exists()
    assert (Path(__file__).parent.parent / "requirements-bits.txt").read_text() == "bitsandbytes\n"


REFUSED = {
    "which ZeroGPU lends only later. Leave --bits out": ({"bits": 4}, {"SPACES_ZERO_GPU": "1"}),
    "No base has weights of 5 bits. Choose --bits from 16, 8, 4": ({"bits": 5}, {}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_is_written(tiny_run, monkeypatch, sentence):
    fields, environment = REFUSED[sentence]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    job = tiny_run(**fields)
    with pytest.raises(ValueError, match=sentence):
        run(job)
    assert not job.work.exists()


@pytest.mark.parametrize("fields", [{"bits": 4}, {"rank": 64}])
def test_the_fast_profile_is_not_for_fewer_bits_nor_for_more_rank(tiny_run, fields):
    with pytest.raises(ValueError, match="in 16 bits, up to rank 32"):
        run(replace(tiny_run(**fields), profile="fast"))


def test_a_run_over_8_bits_passes_its_proofs_and_the_gate(tiny_run):
    job = tiny_run(bits=8, epochs=1, validation_rows=0, probe_replies=0, long_chats=0, reply_tokens=1)
    with mock.patch.object(trainer, "attach", side_effect=trainer.attach) as attach:
        assert run(job).recipe["bits"] == 8
    assert sum(isinstance(module, LINEAR[8]) for module in attach.call_args.args[0].modules()) == 14


def test_an_engine_elsewhere_has_bits_of_its_own(monkeypatch):
    monkeypatch.setenv("ENGINE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="Leave --bits out"):
        chat.load(bits=4)


@pytest.mark.parametrize("program", [app, terminal])
def test_page_and_terminal_hand_bits_and_engine_on(monkeypatch, program):
    def load(base, bits, engine):
        raise ValueError(f"asked for {base} in {bits} bits by {engine}")

    monkeypatch.setattr("chat.load_here", load)
    given = [([], 16, None), (["--bits", "4"], 4, None), (["--engine", "transformers"], 16, "transformers")]
    for words, bits, engine in given:
        monkeypatch.setattr(sys, "argv", ["chat", "--base", "small", *words])
        with pytest.raises(SystemExit, match=f"asked for small in {bits} bits by {engine}"):
            program.main()
