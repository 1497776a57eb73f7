"""The tutorial runs from top to bottom, as a student runs it: one cell after the other in one namespace."""

import json
import re

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"


def test_the_tutorial_runs_from_top_to_bottom(tiny_base, tmp_path, monkeypatch, capsys):
    own = {
        "TUTORIAL_BASE": str(tiny_base),
        "TUTORIAL_ROWS": "48",
        "TUTORIAL_OUTPUT": str(tmp_path / "mine"),
        "TUTORIAL_RUNS": str(tmp_path / "runs"),
        "CHAT_CACHE": str(tmp_path / "cache"),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(NOTEBOOK.parent)
    space = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, source.splitlines()[0], "exec"), space)
    said = capsys.readouterr().out
    base, adapter = map(float, re.search(r"held-out loss (\S+) → (\S+)", said).groups())
    assert adapter < base
    assert "adapter_model.safetensors" in said and (tmp_path / "mine" / "README.md").exists()


def test_the_tutorial_is_kept_without_outputs_and_says_what_it_does_before_it_does_it():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    kinds = [cell["cell_type"] for cell in cells]
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code")
