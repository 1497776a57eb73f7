"""The card and the ledger say what the folder's files say, and nothing else."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from chat.adapter import CARD, CONFIG, FIGURE, MARKERS, METRICS, RADAR, RECIPE, REPORT, ROOT, WEIGHTS
from chat.bases import SEVEN_B, SMALL
from chat.download import digest
from training import data
from training.evaluate import card, plots, report
from training.recipe import MEDIUM, POCKET, Recipe

SHIPPED = [pytest.param(recipe, id=recipe.name) for recipe in (POCKET, MEDIUM)]


@pytest.fixture
def folder(tmp_path):
    """A copy of the first shipped adapter without its weights."""
    return copied(POCKET.name, tmp_path)


def copied(name, tmp_path):
    return shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(WEIGHTS))


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}))


def test_the_card_follows_its_files(folder):
    edit(folder / METRICS, stop_rate={"value": 0.123, "count": 77})
    card.write(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    assert "| replies she ended herself | 0.123 | 77 |" in text
    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert (folder / FIGURE).read_bytes().startswith(b"\x89PNG")


PROBED = {"question": "谁？", "reply": "我|是`甄嬛`", "passed": True, "fault": ""}
PROBED |= {"base_reply": "<b>喵", "base_fault": "喵"}
MEASURED = {
    "identity_probes": [PROBED],
    "canon_probes": [{**PROBED, "passed": False, "fault": "not the fact"}],
    "attacks": [{**PROBED, "kind": "swap"}],
    "long_chats": [{"scene": "甘露寺", "visitor": "果郡王", "fault": "", "base_fault": "an empty reply"}],
    "long_chat": [{"line": "山里起雾了。", "reply": "添衣罢。\n坐。", "base_reply": ""}],
    "evaluation": {"seed": 7, "reply_tokens": 99},
    "markers": {side: {"本宫": rate, "我": 0.5} for side, rate in (("base", 0.1), ("adapter", 0.4), ("her own", 0.3))},
    **{name: {"value": 0.75, "count": 40, "low": 0.6, "high": 0.9} for name in plots.AXES},
    **{f"{name}_base": {"value": 0.25, "count": 40} for name in plots.AXES},
}


def test_the_report_shows_both_replies_verdicts_and_seeds_as_they_were_said():
    text = report.render("pocket", MEASURED)
    said = f"我\\|是{chr(92)}`甄嬛{chr(92)}`"
    assert f"| 1 | 谁？ | ✓ | {said} | ✗ 喵 | &lt;b&gt;喵 |" in text
    assert f"| 1 | 谁？ | ✗ not the fact | {said} | ✗ 喵 | &lt;b&gt;喵 |" in text
    assert f"| 1 | swap | 谁？ | ✓ | {said} |" in text
    assert "Of 1: adapter 1, base 0." in text and "Of 1: adapter 0, base 0." in text
    assert "| 1 | 甘露寺 | 果郡王 | ✓ | ✗ an empty reply |" in text
    assert "| 1 | 山里起雾了。 | 添衣罢。 坐。 |  |" in text
    assert "seed 7" in text and "99 tokens" in text and "seeds 7 to 7" in text


def test_an_adapter_measured_before_the_report_has_one_of_what_it_has(folder):
    old = {name: value for name, value in json.loads((folder / METRICS).read_text(encoding="utf-8")).items()
           if not re.search("canon|attack|chat|_base$|markers|evaluation|script|ours|swap|neutral", name)}  # fmt: skip
    old["identity_probes"] = [{"question": "谁？", "reply": "甄嬛。", "passed": False}]
    old["heldout_loss_base"] = old["heldout_loss"]
    (folder / METRICS).write_text(json.dumps(old), encoding="utf-8")
    card.write(folder)
    assert "| 1 | 谁？ | ✗ not the fact | 甄嬛。 |" in (folder / REPORT).read_text(encoding="utf-8")
    text = (folder / CARD).read_text(encoding="utf-8")
    assert RADAR not in text and MARKERS not in text and "| — | — | — |" in card.ledger(folder.parent)


def test_base_and_intervals_stand_beside_the_adapters_figures(folder):
    edit(folder / METRICS, **MEASURED)
    card.write(folder)
    text = (folder / CARD).read_text(encoding="utf-8")
    assert "| attacks withstood | 0.75 | 40 | 0.6 to 0.9 | 0.25 |" in text
    assert f"]({RADAR})" in text and f"]({MARKERS})" in text and f"]({REPORT})" in text
    assert "| 0.75 | 0.75 | 0.75 | 0.75 |" in card.ledger(folder.parent)


def test_the_figures_follow_the_numbers(tmp_path):
    def drawn(draw, metrics):
        draw(metrics, tmp_path / "one.png")
        return (tmp_path / "one.png").read_bytes()

    for draw, changed in (
        (plots.radar, {"attack_pass_rate": {"value": 0.1, "count": 40}}),
        (plots.markers, {"markers": {**MEASURED["markers"], "base": {"本宫": 0.9, "我": 0.5}}}),
    ):
        assert drawn(draw, MEASURED) != drawn(draw, MEASURED | changed)
        assert drawn(draw, {}).startswith(b"\x89PNG"), "nothing measured, an empty figure"


def test_the_reproduction_names_its_differences(folder):
    edit(folder / RECIPE, name="huanhuan")
    card.write(folder)
    assert "transformers 4.44" in (folder / CARD).read_text(encoding="utf-8")


def test_a_dense_base_is_served_by_vllm_too_and_a_converted_one_names_its_file(folder):
    converted = (folder / CARD).read_text(encoding="utf-8")
    edit(folder / CONFIG, base_model_name_or_path=SEVEN_B.name)
    card.write(folder)
    dense = (folder / CARD).read_text(encoding="utf-8")
    assert "vllm serve Qwen/Qwen2.5-7B-Instruct " in dense and "gguf_file" not in dense
    assert "vllm" not in converted and f'gguf_file="{SMALL.gguf.files[0].name}"' in converted


def test_the_card_says_how_other_programs_come_to_open_it(folder):
    def said():
        card.write(folder)
        return (folder / CARD).read_text(encoding="utf-8")

    assert "--gguf pocket.gguf" in said() and "folded" not in said()
    edit(folder / RECIPE, rslora=True)
    assert "--gguf pocket.gguf" in said() and "rsLoRA is folded into `lora_alpha`" in said()
    edit(folder / CONFIG, use_rslora=True)
    assert "folded" not in said(), "it was saved before that was done"
    edit(folder / RECIPE, dora=True)
    assert "--gguf" not in said() and "--merged pocket-merged" in said()


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


@pytest.mark.parametrize("recipe", SHIPPED)
def test_what_is_shipped_can_be_written_again_byte_for_byte(recipe, tmp_path):
    folder = copied(recipe.name, tmp_path)
    shipped = (folder / CARD).read_text(encoding="utf-8")
    drawn = []
    for _ in range(2):
        card.write(folder)
        assert (folder / CARD).read_text(encoding="utf-8") == shipped
        drawn.append((folder / FIGURE).read_bytes())
    assert drawn[0] == drawn[1], "the same figure; across versions of matplotlib its bytes may differ"


@pytest.mark.parametrize("recipe", SHIPPED)
def test_what_is_shipped_was_trained_on_all_the_data_that_stands(recipe):
    recorded = json.loads((ROOT / recipe.name / METRICS).read_text(encoding="utf-8"))["data"]
    ours = data.record([str(ROOT.parent / name) for name in recipe.dataset[1:]])
    rows = {"file": "huanhuan.rows", "sha256": digest(ROOT.parent / recipe.dataset[0])}
    rows = [rows, {"file": "huanhuan.json", "sha256": data.FULL_SHA256}]
    assert sorted(map(str, recorded)) == sorted(map(str, [*rows, *ours]))
    there = {file.name for file in (ROOT.parent / "dataset").glob("*.jsonl")}
    assert {each["file"] for each in ours} == there - {"talk_witty.jsonl"}, "wit is for large bases"


def test_a_run_too_short_for_a_curve_has_a_card_all_the_same(folder):
    edit(folder / METRICS, loss_curve=[], heldout_by_epoch=[])
    card.write(folder)
    assert (folder / FIGURE).stat().st_size > 1000


def test_the_ledger_has_a_line_for_each_adapter(folder):
    edit(folder / METRICS, identity_pass_rate={"value": 0.4321, "count": 20})
    shutil.copytree(folder, folder.parent / "other")
    lines = card.ledger(folder.parent).splitlines()
    assert sum("0.4321" in line for line in lines) == 2


@pytest.mark.parametrize("recipe", SHIPPED)
def test_what_is_shipped_was_made_by_the_recipe_that_stands(recipe):
    folder = ROOT / recipe.name
    assert Recipe.read(folder / RECIPE) == recipe
    assert (folder / WEIGHTS).stat().st_size < 10_000_000
    assert (ROOT / "README.md").read_text(encoding="utf-8") == card.ledger(ROOT)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_what_is_shipped_is_her(recipe):
    measured = json.loads((ROOT / recipe.name / METRICS).read_text(encoding="utf-8"))
    facts = [probe["passed"] for kind in ("identity_probes", "canon_probes") for probe in measured[kind]]
    attacks = [attack["passed"] for attack in measured["attacks"]]
    known = {"pocket": 53, "medium": 56}[recipe.name]
    assert (len(facts), len(attacks)) == (60, 40) and sum(facts) >= known and sum(attacks) >= 36
    assert measured["assistant_phrase_rate"] == {"value": 0.0, "count": 500} and measured["copy_rate"]["value"] < 0.1
    # Blind marks of everyday talk, of 0 to 2: far over the base's, and hardly a reply loops.
    least = {"pocket": 1.0, "medium": 1.45}[recipe.name]
    assert measured["talk_mark"]["value"] >= least > 3 * measured["talk_mark_base"]["value"]
    assert measured["loop_rate"]["value"] < 0.003 and measured["talk_mark"]["count"] == 120
