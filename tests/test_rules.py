"""The architecture: who imports whom, what is written once, and a file tree that stays true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chat.persona import SYSTEM_PROMPT
from tests.conftest import ROOT

ALLOWED = {  # what the files of a room may import of the others: only downhill
    "app": {"page", "chat"},
    "page": {"chat"},
    "chat": {"qwen2"},
    "qwen2": set(),
    "training": {"chat", "qwen2"},
}
TOOLS = {"benchmarks", "dataset", "findings", "notebooks", "tests"}  # for developers; the product does without
PRODUCT = [ROOT / "app.py", *(path for room in ALLOWED for path in sorted((ROOT / room).rglob("*.py")))]
FILES = [*PRODUCT, *(path for room in TOOLS for path in sorted((ROOT / room).rglob("*.py")))]
RUNS_MODELS = {
    "chat/base_model.py",
    "chat/convert.py",
    "chat/local.py",
    "chat/scheduler.py",
    "qwen2/decoder.py",
    "qwen2/decode_kernels.py",
    "qwen2/graphs.py",
    "qwen2/kernels.py",
    "qwen2/rope.py",
    "qwen2/training_kernels.py",
    "qwen2/training_step.py",
    "training/adapter_files.py",
    "training/evaluate/losses.py",
    "training/evaluate/replies.py",
    "training/fast_trainer.py",
    "training/preflight.py",
    "training/trainer.py",
}


def module(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, in functions too; a name taken from a module stands for it as module.name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def edges() -> dict[str, set[str]]:
    """Which of our modules each of our modules imports."""
    ours = {module(path) for path in FILES}
    return {
        module(path): {name if name in ours else name.rpartition(".")[0] for name in imported(path)} & ours
        for path in FILES
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; none if there is no such."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := walk(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


@pytest.mark.parametrize("path", PRODUCT, ids=module)
def test_imports_between_rooms_run_downhill(path):
    room = module(path).split(".")[0]
    assert rooms(path) & (ALLOWED.keys() | TOOLS) <= ALLOWED[room] | {room}
    assert room != "training" or "gradio" not in rooms(path)


def test_no_modules_import_one_another_in_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(edges()) == []


def test_torch_is_imported_at_the_start_only_where_models_run():
    heavy = {path for path in PRODUCT if "torch" in {name.split(".")[0] for name in imported(path, True)}}
    assert {str(path.relative_to(ROOT)) for path in heavy} == RUNS_MODELS


@pytest.mark.parametrize("name", ["engine", "persona", "sampling"])
def test_the_protocol_the_persona_and_the_sampling_need_the_standard_library_only(name):
    assert rooms(ROOT / "chat" / f"{name}.py") <= {*sys.stdlib_module_names, "chat"}


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


@pytest.mark.parametrize("page", ["architecture.md", "architecture_zh.md"])
def test_the_file_tree_names_every_file_and_no_other(page):
    blocks = (ROOT / "docs" / page).read_text(encoding="utf-8").split("```")[1::2]
    tree = next(block for block in blocks if "\nchat/" in block)
    named, folders = set(), [""]
    for indent, name in re.findall(r"^( *)([\w./]+)(?:  |$)", tree, re.M):
        depth = len(indent) // 2
        if name.endswith("/"):
            folders = [*folders[: depth + 1], name]
        else:
            named.add("".join(folders[: depth + 1]) + name)
    files = {str(path.relative_to(ROOT)) for path in PRODUCT if path.name != "__init__.py"}
    assert not files - named, f"the tree of {page} lacks these"
    gone = {name for name in named if not (ROOT / name).exists()}
    assert not gone, f"the tree of {page} names these, which do not exist"


def test_the_space_gets_the_gradio_that_is_pinned():
    front = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    version = re.search(r"sdk_version: (\S+)", front).group(1)
    assert f"gradio=={version}" in (ROOT / "requirements.txt").read_text()


def test_she_is_measured_by_so_many_lines_none_of_them_twice():
    from dataset.check import bare, measured

    assert len({bare(line) for line in measured()}) == len(measured()) == 20 + 40 + 40 + 20 * 10 + 120 + 12 * 6
