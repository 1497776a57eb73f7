"""The card and the ledger say what the folder's files say, and nothing else."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from chat.adapter import CARD, FIGURE, METRICS, RECIPE, ROOT, WEIGHTS
from training import card
from training.recipe import POCKET
from training.run import _as_json


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped adapter without its weights."""
    return shutil.copytree(ROOT / "pocket", tmp_path / "pocket", ignore=shutil.ignore_patterns(WEIGHTS))


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}))


def test_the_card_follows_its_files(folder):
    edit(folder / METRICS, stop_rate={"value": 0.123, "count": 77})
    card.write(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    assert "| replies she ended herself | 0.123 | 77 |" in text
    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert (folder / FIGURE).read_bytes().startswith(b"\x89PNG")


def test_the_reproduction_names_its_differences(folder):
    edit(folder / RECIPE, name="huanhuan")
    card.write(folder)
    assert "transformers 4.44" in (folder / CARD).read_text(encoding="utf-8")


def test_a_run_too_short_for_a_curve_has_a_card_all_the_same(folder):
    edit(folder / METRICS, loss_curve=[], heldout_by_epoch=[])
    card.write(folder)
    assert (folder / FIGURE).stat().st_size > 1000


def test_the_ledger_has_a_line_for_each_adapter(folder):
    edit(folder / METRICS, identity_pass_rate={"value": 0.4321, "count": 20})
    shutil.copytree(folder, folder.parent / "other")
    lines = card.ledger(folder.parent).splitlines()
    assert sum("0.4321" in line for line in lines) == 2


def test_what_is_shipped_was_made_by_the_recipe_that_stands():
    shipped = json.loads((ROOT / "pocket" / RECIPE).read_text(encoding="utf-8"))
    assert shipped == _as_json(POCKET)
    assert (ROOT / "pocket" / WEIGHTS).stat().st_size < 10_000_000
    assert (ROOT / "README.md").read_text(encoding="utf-8") == card.ledger(ROOT)
    measured = json.loads((ROOT / "pocket" / METRICS).read_text(encoding="utf-8"))
    assert measured["assistant_phrase_rate"] == {"value": 0.0, "count": 200}
    assert measured["identity_pass_rate"]["value"] >= 0.9 and len(measured["identity_probes"]) == 20
    assert measured["heldout_loss"]["value"] <= 0.80 * measured["heldout_loss_base"]["value"]
