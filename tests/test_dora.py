"""A DoRA from its run to its replies: what is learned is what PEFT serves."""

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chat import local
from chat.adapter import WEIGHTS, Adapter
from chat.engine import BASE_ONLY
from chat.local import LocalEngine
from chat.sampling import Sampling
from qwen2.decoder import Decoder
from tests.conftest import TAUGHT
from training.pipeline import run
from training.recipe import TINY, Run

ASK = [{"role": "user", "content": "你是谁？"}]
GREEDY = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=20)


@pytest.fixture(scope="module")
def learned(tiny_base, tmp_path_factory):
    """The tiny adapter, trained as a DoRA."""
    folder = tmp_path_factory.mktemp("dora")
    recipe = replace(TINY, base=str(tiny_base), dataset=(str(TAUGHT),), dora=True, validation_rows=0, probe_replies=0,
                     long_chats=0, reply_tokens=1)  # fmt: skip
    return run(Run(recipe=recipe, output=folder / "her", work=folder / "work"))


@pytest.fixture
def loud(learned, checkpoint, tmp_path):
    """The same with magnitudes that nobody could overlook."""
    folder = shutil.copytree(learned.folder, tmp_path / "loud")
    weights = load_file(folder / WEIGHTS)
    draw = torch.Generator().manual_seed(0)
    factors = {n: t * (0.5 + torch.rand(t.shape, generator=draw)) for n, t in weights.items() if "magnitude" in n}
    save_file(weights | factors, folder / WEIGHTS)
    return Adapter.open(folder, checkpoint)


def texts(chunks):
    """The text of each row."""
    rows = {}
    for chunk in chunks:
        rows[chunk.row] = rows.get(chunk.row, "") + chunk.text
    return rows


def test_a_run_learns_it_and_the_gate_opens_it(learned):
    assert learned.dora
    curve = learned.metrics["loss_curve"]
    assert curve[-1][1] < curve[0][1] / 2
    kinds = {
        (name.rpartition(".lora_")[2], tensor.dtype) for name, tensor in load_file(learned.folder / WEIGHTS).items()
    }
    whole, half = torch.float32, torch.bfloat16  # of a magnitude half would leave three digits
    assert kinds == {("A.weight", half), ("B.weight", half), ("magnitude_vector", whole)}


def test_magnitudes_are_learned_and_served_whole_on_a_base_in_half_precision(learned, checkpoint, monkeypatch):
    real = local.load_base
    monkeypatch.setattr(local, "load_base", lambda *given: real(*given).to(torch.bfloat16))
    engine = LocalEngine(checkpoint, [learned])
    engine.wait()
    model = engine.model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude, norms = layer.lora_magnitude_vector["her"].weight, layer.base_layer.weight.float().norm(dim=1)
    assert magnitude.dtype == torch.float32 and ((magnitude / norms - 1).abs() > 0.01).any()
    with pytest.raises(RuntimeError, match="knows no DoRA, and her is one"):
        Decoder(model, ["her"], 2, 64)


def test_it_answers_beside_the_base_as_it_does_alone(learned, checkpoint):
    engine = LocalEngine(checkpoint, [learned])
    adapters = [BASE_ONLY, "her"]
    alone = [texts(engine.stream(ASK, [name], GREEDY, threading.Event()))[0] for name in adapters]
    together = list(engine.stream(ASK, adapters, GREEDY, threading.Event()))
    assert texts(together) == dict(enumerate(alone)) and alone[0] != alone[1]
    assert [chunk.row for chunk in together if chunk.usage] == [0, 1]


def test_a_magnitude_that_is_missing_is_named(learned, checkpoint, tmp_path):
    folder = shutil.copytree(learned.folder, tmp_path / "her")
    weights = load_file(folder / WEIGHTS)
    lost = next(name for name in weights if "magnitude" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"lacks {lost}, of a layer that it adapts"):
        Adapter.open(folder, checkpoint)


def test_a_gpu_answers_one_at_a_time_with_it(learned, tiny_base, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"her={learned.folder}")
    monkeypatch.setattr(local, "num_slots", lambda: 8)
    monkeypatch.setattr(LocalEngine, "start_batching", lambda *_: pytest.fail("it would batch"))
    served = local.load(str(tiny_base))
    served.wait()
    assert (served.max_num_seqs, served.num_slots) == (1, 1) and "her" in served.adapters
