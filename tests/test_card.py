"""The card and the ledger say what the folder's files say, and nothing else."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from chat.adapter import CARD, CONFIG, FIGURE, METRICS, RECIPE, ROOT, WEIGHTS
from chat.base import SEVEN_B, SMALL
from training import card, data
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


def test_a_dense_base_is_served_by_vllm_too_and_a_packed_one_names_its_file(folder):
    packed = (folder / CARD).read_text(encoding="utf-8")
    edit(folder / CONFIG, base_model_name_or_path=SEVEN_B.name)
    card.write(folder)
    dense = (folder / CARD).read_text(encoding="utf-8")
    assert "vllm serve Qwen/Qwen2.5-7B-Instruct " in dense and "gguf_file" not in dense
    assert "vllm" not in packed and f'gguf_file="{SMALL.packed.file}"' in packed


def test_the_code_on_the_card_runs(trained, tiny_base, capsys):
    code = re.search(r"```python\n(.*?)```", (trained.folder / CARD).read_text(encoding="utf-8"), re.S).group(1)
    exec(code.replace('"tiny"', repr(str(tiny_base))).replace('"USER/NAME"', repr(str(trained.folder))), {})
    assert capsys.readouterr().out == "臣妾明白。\n", "what it was taught"


def test_the_figures_are_a_model_index(folder):
    card.write(folder)
    results = {each.metric_type: each.metric_value for each in ModelCard.load(folder / CARD).data.eval_results}
    measured = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    assert results["heldout_loss"] == measured["heldout_loss"]["value"]
    assert results["identity_pass_rate"] == measured["identity_pass_rate"]["value"]


def test_what_is_shipped_can_be_written_again_byte_for_byte(folder):
    shipped = (folder / CARD).read_text(encoding="utf-8")
    drawn = []
    for _ in range(2):
        card.write(folder)
        assert (folder / CARD).read_text(encoding="utf-8") == shipped
        drawn.append((folder / FIGURE).read_bytes())
    assert drawn[0] == drawn[1], "the same figure; across versions of matplotlib its bytes may differ"


def test_what_is_shipped_was_trained_on_the_data_that_stands():
    recorded = json.loads((ROOT / "pocket" / METRICS).read_text(encoding="utf-8"))["data"]
    ours = data.record([str(ROOT.parent / "dataset")])
    assert recorded == [{"file": "huanhuan.json", "sha256": data.FULL_SHA256}, *ours]


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
