"""What the documents tell people exists: each command, module and flag, each link, each file of the product.

Each English page has a Chinese twin, which is compared with it by commands, links and headings.
"""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from functools import cache
from unittest import mock

import pytest

from tests.conftest import ROOT
from training.recipe import HUANHUAN

TWINS = {"README.md": "README_zh.md"} | {
    f"docs/{name}.md": f"docs/{name}_zh.md"
    for name in ("chat", "training", "publishing", "deploy", "architecture", "reliability")
}
DOCUMENTS = (
    *TWINS, *TWINS.values(), "CONTRIBUTING.md", "SECURITY.md", "dataset/README.md", "deploy/README.md",
    "qwen2/README.md", "benchmarks/README.md", "benchmarks/tuning-log.md", "benchmarks/peers/README.md",
)  # fmt: skip
TREES = ("docs/architecture.md", "docs/architecture_zh.md")
OTHERS = {"apt", "hf", "accelerate", "jupyter", "pip", "llama-server", "ollama"}  # programs that are not ours to test
PYTHONS = ("python", ".venv/bin/python")


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def commands(document):
    """Every command of a document: lines of its bash blocks, and what stands in backticks and begins like one."""
    text = read(document)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"`((?:make |python |\.venv/bin/|benchmarks/peers/run)[^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@cache
def help_of(*program):
    """What a program says of itself. Ours run in here: another interpreter would need seconds to import torch."""
    if program[0] == "-m" and program[1].startswith(("training.", "benchmarks.", "dataset.", "chat")):
        return help_in_here(*program[1:])
    asked = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def help_in_here(module, *arguments):
    asked = mock.patch.object(sys, "argv", ["", *arguments, "--help"])
    with asked, contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module may have been imported before
        with pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__")
    assert not left.value.code, left.value.code
    return said.getvalue()


def check_python(arguments):
    program = arguments[:2] if arguments[0] == "-m" else arguments[:1]
    rest = arguments[len(program) :]
    if program == ["-m", "training.run"] and rest:
        program.append(HUANHUAN.name if rest[0].startswith("-") else rest[0])
    said = help_of(*program)
    for flag in (word for word in rest if word.startswith("--")):
        assert flag in said, f"{' '.join(program)} knows no {flag}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_can_be_typed(document):
    for program, *arguments in commands(document):
        if program == "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        elif program in PYTHONS and arguments[:2] != ["-m", "venv"]:
            check_python(arguments)
        elif program == "benchmarks/peers/run.sh":
            assert (ROOT / program).stat().st_mode & 0o100 and arguments[0] in ("train", "serve", "make")
        else:
            assert program.split("/")[-1] in OTHERS | {"python", "sudo"}, program


def test_a_command_that_does_not_exist_is_noticed():
    with pytest.raises(AssertionError, match="knows no --nonsense"):
        check_python(["-m", "training.publish", "adapters/pocket", "me/x", "--nonsense"])


def links(document):
    """Targets of its links and pictures within this repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", read(document)) if "://" not in target]


def anchors(text):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, "adapters/README.md"])
def test_every_link_of_a_document_leads_somewhere(document):
    for target in links(document):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{document} links to {target}"


@pytest.mark.parametrize(("english", "chinese"), TWINS.items())
def test_a_page_and_its_twin_tell_the_same(english, chinese):
    def told(document):
        """Commands (program and flags: names differ), links without anchors, headings, how many rows tables have."""
        typed = sorted([*words[:1], *(word for word in words[1:] if word[0] == "-")] for words in commands(document))
        linked = sorted(target.partition("#")[0].replace("_zh", "") for target in links(document))
        prose = re.sub(r"```.*?```", "", read(document), flags=re.S)
        headings = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)]
        return typed, linked, headings, len(re.findall(r"^\|", prose, re.M))

    assert told(english) == told(chinese)


@pytest.mark.parametrize("document", TREES)
def test_the_tree_names_every_file_and_no_other(document):
    """The last block of the page: a folder's files are indented below it by two spaces."""
    block = re.findall(r"```\n(.*?)```", read(document), re.S)[-1]
    told, folders = set(), []
    for indent, name in re.findall(r"^( *)(\S+)  +\S", block, re.M):
        folders = folders[: len(indent) // 2]
        told.add("".join([*folders, name]))
        folders.append(name)
    for path in told:
        assert (ROOT / path).exists(), f"{document} names {path}, which does not exist"
    product = [path for name in ("chat", "page", "qwen2", "training") for path in ROOT.glob(f"{name}/**/*.py")]
    files = {"app.py", *(path.relative_to(ROOT).as_posix() for path in product if path.name != "__init__.py")}
    assert files <= told, f"{document} does not name {sorted(files - told)}"


@pytest.mark.parametrize("document", ["docs/chat.md", "docs/chat_zh.md"])
def test_the_sample_of_the_api_runs_as_it_stands(document):
    import app
    from tests.fake_engine import FakeEngine

    engine = FakeEngine("山里清静。")
    page = app.build_page(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    try:
        (sample,) = re.findall(r"```python\n(.*?)```", read(document), re.S)
        said = {}
        exec(sample.replace("http://127.0.0.1:7860", url), said)
        assert said["text"] == "山里清静。" and said["status"].startswith("scripted")
        assert engine.asked[0][0] == [{"role": "user", "content": "（甘露寺·果郡王）近来可好？"}]
        assert engine.asked[0][2].seed == 7
    finally:
        page.close(verbose=False)


def test_a_space_preloads_the_base_that_is_pinned():
    from chat.bases import SEVEN_B

    head = read("README.md").split("---")[1]
    (line,) = re.findall(r"preload_from_hub:\n  - (.*)", head)
    name, files, revision = line.split()
    assert (name, revision) == (SEVEN_B.name, SEVEN_B.revision) and "model.safetensors.index.json" in files
