"""A DoRA from its run to its replies: what is learned is what PEFT serves."""

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat import local
from chat.adapter import WEIGHTS, Adapter
from chat.decoder import Decoder
from chat.engine import BASE_ONLY, Sampling
from chat.local import LocalEngine
from tests.conftest import TAUGHT
from training.recipe import TINY
from training.run import Run, run

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=20)


@pytest.fixture(scope="module")
def learned(tiny_base, tmp_path_factory):
    """The tiny adapter, trained as a DoRA."""
    folder = tmp_path_factory.mktemp("dora")
    recipe = replace(TINY, base=str(tiny_base), dataset=(str(TAUGHT),), dora=True, held_out=0, probe_replies=0,
                     long_chats=0, reply_tokens=1)  # fmt: skip
    return run(Run(recipe=recipe, output=folder / "her", work=folder / "work"))


@pytest.fixture
def loud(learned, located, tmp_path):
    """The same with magnitudes that nobody could overlook."""
    folder = shutil.copytree(learned.folder, tmp_path / "loud")
    weights = load_file(folder / WEIGHTS)
    draw = torch.Generator().manual_seed(0)
    factors = {n: t * (0.5 + torch.rand(t.shape, generator=draw)) for n, t in weights.items() if "magnitude" in n}
    save_file(weights | factors, folder / WEIGHTS)
    return Adapter.open(folder, located)


def said(spoken):
    texts = {}
    for row, piece in spoken:
        texts[row] = texts.get(row, "") + piece.text
    return texts


def test_a_run_learns_it_and_the_gate_opens_it(learned):
    assert learned.dora
    curve = learned.metrics["loss_curve"]
    assert curve[-1][1] < curve[0][1] / 2
    kinds = {
        (name.rpartition(".lora_")[2], tensor.dtype) for name, tensor in load_file(learned.folder / WEIGHTS).items()
    }
    whole, half = torch.float32, torch.bfloat16  # of a magnitude half would leave three digits
    assert kinds == {("A.weight", half), ("B.weight", half), ("magnitude_vector", whole)}


def test_magnitudes_are_learned_and_served_whole_on_a_base_in_half_precision(learned, located, monkeypatch):
    real = local.load_base
    monkeypatch.setattr(local, "load_base", lambda *given: real(*given).to(torch.bfloat16))
    model = LocalEngine(located, [learned]).model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude, norms = layer.lora_magnitude_vector["her"].weight, layer.base_layer.weight.float().norm(dim=1)
    assert magnitude.dtype == torch.float32 and ((magnitude / norms - 1).abs() > 0.01).any()
    with pytest.raises(RuntimeError, match="knows no DoRA, and her is one"):
        Decoder(model, ["her"], 2, 64)


def test_it_answers_beside_the_base_as_it_does_alone(learned, located):
    engine = LocalEngine(located, [learned])
    voices = [BASE_ONLY, "her"]
    alone = ["".join(p.text for p in engine.stream(ASK, name, GREEDY, threading.Event())) for name in voices]
    together = list(engine.compare(ASK, voices, GREEDY, threading.Event()))
    assert said(together) == dict(enumerate(alone)) and alone[0] != alone[1]
    assert [row for row, piece in together if piece.cost] == [0, 1]


def test_a_magnitude_that_is_missing_is_named(learned, located, tmp_path):
    folder = shutil.copytree(learned.folder, tmp_path / "her")
    weights = load_file(folder / WEIGHTS)
    lost = next(name for name in weights if "magnitude" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"lacks {lost}, of a layer that it adapts"):
        Adapter.open(folder, located)


def test_a_gpu_answers_one_at_a_time_with_it(learned, tiny_base, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"her={learned.folder}")
    monkeypatch.setattr(local, "places", lambda: 8)
    monkeypatch.setattr(LocalEngine, "quicken", lambda *_: pytest.fail("quickened"))
    served = local.load(str(tiny_base))
    assert (served.most, served.wait().places) == (1, 1) and "her" in served.adapters
