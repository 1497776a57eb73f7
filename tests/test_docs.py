"""What the documents tell people to type exists: each make target, each module, each flag."""

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

DOCUMENTS = ("README.md", "README_zh.md", "CONTRIBUTING.md", "dataset/README.md", "benchmarks/README.md")
OTHERS = {"apt", "hf", "accelerate", "jupyter", "pip", "llama-server", "ollama"}  # programs that are not ours to test


def commands(document):
    """Every command of a document: lines of its bash blocks, and what stands in backticks and begins like one."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(r"`((?:make |python |\.venv/bin/)[^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@cache
def help_of(*program):
    """What a program says of itself. Ours run in here: another interpreter would need seconds to import torch."""
    if program[0] == "-m" and program[1].startswith(("training.", "benchmarks.", "chat")):
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
    for words in commands(document):
        program, *arguments = words
        if program == "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        elif program in ("python", ".venv/bin/python") and arguments[:2] != ["-m", "venv"]:
            check_python(arguments)
        else:
            assert program.split("/")[-1] in OTHERS | {"python", "sudo"}, words


def test_a_command_that_does_not_exist_is_noticed():
    with pytest.raises(AssertionError, match="knows no --nonsense"):
        check_python(["-m", "training.hub", "adapters/pocket", "me/x", "--nonsense"])


def test_both_readmes_tell_the_same_commands():
    def told(document):
        """Program, module and flags; the names people put in differ by language."""
        return sorted([*words[:1], *(word for word in words[1:] if word[0] == "-")] for words in commands(document))

    assert told("README.md") == told("README_zh.md")


@pytest.mark.parametrize("document", ["README.md", "README_zh.md"])
def test_the_sample_of_the_api_runs_as_it_stands(document):
    import app
    from chat.engine import ScriptedEngine

    engine = ScriptedEngine("山里清静。")
    page = app.build_page(engine)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    try:
        (sample,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)
        said = {}
        exec(sample.replace("http://127.0.0.1:7860", url), said)
        assert said["text"] == "山里清静。" and said["status"].startswith("scripted")
        assert engine.heard[0][0] == [{"role": "user", "content": "（甘露寺·果郡王）近来可好？"}]
        assert engine.heard[0][2].seed == 7
    finally:
        page.close(verbose=False)


def test_a_space_preloads_the_base_that_is_pinned():
    from chat.base import SEVEN_B

    head = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    (line,) = re.findall(r"preload_from_hub:\n  - (.*)", head)
    name, files, revision = line.split()
    assert (name, revision) == (SEVEN_B.name, SEVEN_B.revision) and "model.safetensors.index.json" in files
