"""The architecture: who imports whom, what is written once, and a README that stays true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chat.persona import SYSTEM_PROMPT
from tests.conftest import ROOT

PACKAGES = ("chat", "page", "training")
PRODUCT = [ROOT / "app.py", *(path for name in PACKAGES for path in sorted((ROOT / name).glob("*.py")))]
HEAVY = {
    "chat/local.py",
    "chat/batch.py",
    "chat/decoder.py",
    "chat/kernels.py",
    "training/trainer.py",
    "training/shards.py",
    "training/fast.py",
    "training/kernels.py",
    "training/proof.py",
    "training/evaluate.py",
}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, as written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_chat_imports_neither_the_page_nor_training():
    for path in PRODUCT:
        if path.parent.name == "chat":
            assert not packages(path) & {"app", "page", "training"}, path


def test_the_page_and_training_do_not_know_each_other():
    for path in PRODUCT:
        if path.parent.name == "page" or path.name == "app.py":
            assert not packages(path) & {"training"} and (path.name == "app.py" or "app" not in packages(path)), path
        if path.parent.name == "training":
            assert not packages(path) & {"app", "page", "gradio"}, path


def test_torch_is_imported_in_the_heavy_files_only():
    heavy = {
        str(path.relative_to(ROOT)) for path in PRODUCT if "torch" in {n.split(".")[0] for n in imported(path, True)}
    }
    assert heavy == HEAVY


def test_the_engine_protocol_and_the_persona_need_the_standard_library_only():
    for name in ("engine", "persona"):
        assert packages(ROOT / "chat" / f"{name}.py") <= {*sys.stdlib_module_names, "chat"}


@pytest.mark.parametrize(
    "command", [["app.py"], ["-m", "chat"], ["-m", "training.run"], ["-m", "training.run", "pocket"]]
)
def test_help_answers_without_torch(command):
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert not re.search(r"\| +torch$", asked.stderr, re.M)


def test_the_system_prompt_is_written_once():
    holders = [path for path in PRODUCT if SYSTEM_PROMPT in path.read_text(encoding="utf-8")]
    assert holders == [ROOT / "chat" / "persona.py"]


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_tree_names_every_file(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    for path in PRODUCT:
        if path.name != "__init__.py":
            assert path.name in text, f"{path} is not in the tree of {readme}"
    for name in re.findall(r"^(?:[│├└─ ]*)([\w/]+\.(?:py|md|txt|toml))  ", text, re.M):
        found = (ROOT / name).exists() or any(ROOT.glob(f"[!.]*/**/{name}"))  # not in environments, which are large
        assert found, f"{readme} names {name}, which does not exist"


def test_the_space_gets_the_gradio_that_is_pinned():
    front = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    version = re.search(r"sdk_version: (\S+)", front).group(1)
    assert f"gradio=={version}" in (ROOT / "requirements.txt").read_text()


def test_no_function_of_the_product_is_long():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_she_is_measured_by_so_many_lines_none_of_them_twice():
    from training.dialogues import bare, measured

    assert len({bare(line) for line in measured()}) == len(measured()) == 20 + 40 + 40 + 20 * 10
