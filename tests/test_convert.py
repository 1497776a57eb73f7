"""A GGUF made a folder for transformers: the same model, what older programs read of it, and what becomes of damage."""

import json
from dataclasses import replace

import pytest
import torch

from chat import convert
from chat.base_model import load_base, load_tokenizer
from chat.checkpoints import CONFIG, converted_folder, verified_source
from chat.download import Unavailable
from chat.prompt import prompt_ids

ASK = [{"role": "user", "content": "你是谁？"}]


@pytest.fixture
def converted(tiny_gguf):
    """The folder that `ensure_converted` makes of the tiny GGUF in this test's own cache."""
    return convert.ensure_converted(tiny_gguf)


def test_it_computes_what_the_gguf_was_made_from(converted, checkpoint, tokenizer):
    ids = prompt_ids(load_tokenizer(converted), ASK)
    assert ids == prompt_ids(tokenizer, ASK)
    with torch.inference_mode():
        ours, theirs = (load_base(one)(torch.tensor([ids])).logits for one in (converted, checkpoint))
    # It is kept in bf16, and both tables are the output's, as in the real bases.
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()


def test_older_programs_find_the_base_of_rope_where_they_look(converted):
    config = json.loads((converted.path / CONFIG).read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000.0
    assert load_base(converted).config.rope_parameters["rope_theta"] == 1_000_000.0


def test_it_is_made_once_and_again_when_it_is_damaged(converted, tiny_gguf, monkeypatch):
    made, real = [], convert._convert
    monkeypatch.setattr(convert, "_convert", lambda *given: made.append(given) or real(*given))
    assert convert.ensure_converted(tiny_gguf) == converted and not made
    weights = converted.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert convert.ensure_converted(tiny_gguf) == converted and len(made) == 1
    assert weights.read_bytes() == whole and verified_source(converted_folder(tiny_gguf.base)) == "a test"


def test_a_gguf_that_is_damaged_is_not_converted(tiny_gguf, tmp_path):
    path = tmp_path / tiny_gguf.path.name
    path.write_bytes(b"\0" * tiny_gguf.base.gguf.size)
    with pytest.raises(Unavailable, match="is not the published file"):
        convert.ensure_converted(replace(tiny_gguf, path=path))
    assert not converted_folder(tiny_gguf.base).exists()
