"""What operators start: well-formed, of one version, and saying what the page and the engines take."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from packaging.markers import Marker

from chat.bases import SEVEN_B
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
RAY = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text(encoding="utf-8"))
(LLM,) = RAY["applications"][0]["args"]["llm_configs"]


def engine_flags():
    """The flags of the compose file's engine: name to value."""
    pairs = [flag.removeprefix("--").partition("=") for flag in COMPOSE["services"]["engine"]["command"]]
    return {name.replace("-", "_"): value for name, _, value in pairs}


def test_both_serve_the_base_that_is_pinned():
    flags = engine_flags()
    assert (flags["model"], flags["revision"]) == (SEVEN_B.name, SEVEN_B.revision)
    assert LLM["model_loading_config"]["model_source"] == SEVEN_B.name
    assert LLM["engine_kwargs"]["revision"] == SEVEN_B.revision


def test_both_start_the_engine_alike():
    flags = engine_flags()
    for name in ("dtype", "max_model_len", "max_num_seqs", "max_loras", "max_lora_rank"):
        assert str(LLM["engine_kwargs"][name]) == flags[name], name


def test_images_are_pinned_and_no_key_is_written_down():
    assert re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+", COMPOSE["services"]["engine"]["image"])
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            assert "KEY" not in name or value.startswith("${ENGINE_KEY"), name
    assert "ports" not in COMPOSE["services"]["engine"]


def test_every_setting_of_the_page_is_one_that_it_reads_and_the_document_tells_each():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "chat").glob("*.py"))
    code += (ROOT / "page" / "metrics.py").read_text(encoding="utf-8")
    for name in COMPOSE["services"]["page"]["environment"]:
        assert f'"{name}"' in code, name
    told = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for name in {*re.findall(r'"(ENGINE_\w+)"', code), "METRICS"}:
        assert f"| `{name}` |" in told, name


def test_the_container_gets_every_file_it_is_told_to_copy():
    recipe = COMPOSE["services"]["page"]["build"]["dockerfile_inline"]
    for line in re.findall(r"^COPY (.*) \S+$", recipe, re.M):
        for name in line.split():
            assert (ROOT / name).exists(), name


def names(*parts):
    """The packages that a list under the project names, as the index writes them: lower case, dashes."""
    lines = ROOT.joinpath(*parts).read_text(encoding="utf-8").splitlines()
    found = [re.match(r"[\w.-]+", line)[0] for line in lines if line and line[0] not in "#-"]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}


def test_the_list_without_torch_is_a_part_of_the_whole_one():
    assert not names("deploy", "requirements.txt") & HEAVY
    assert names("deploy", "requirements.txt") <= names("requirements.txt") | names("constraints.txt")
    assert names("requirements.txt") >= HEAVY


# As Python names processors: Linux, macOS, Windows; then Windows on Arm, 32 bits, an old Raspberry Pi, RISC-V.
MACHINES = dict.fromkeys(("x86_64", "aarch64", "arm64", "AMD64"), True)
MACHINES |= dict.fromkeys(("ARM64", "i686", "armv7l", "riscv64"), False)


def test_llama_cpp_comes_only_where_it_has_a_wheel():
    lists = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "deploy/requirements.txt")]
    (marker,) = {re.search(r"^xllamacpp.*?; (.*)$", text, re.M)[1] for text in lists}
    taken = {machine: Marker(marker).evaluate({"platform_machine": machine}) for machine in MACHINES}
    assert taken == MACHINES


NOT_COPIED = {"qwen2", "training"}  # into the container
BLOCK = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY | {"modelscope"} | NOT_COPIED}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import app, chat.remote, chat.llama
"""


def test_the_page_beside_an_engine_or_with_llama_cpp_needs_no_torch():
    asked = subprocess.run([sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr[-2000:]


@pytest.mark.parametrize(("gpu", "list_"), [("GPU=", "deploy/requirements.txt"), (None, "requirements.txt")])
def test_make_demo_installs_torch_only_beside_a_gpu(tmp_path, gpu, list_):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "--dry-run", "--always-make", "demo", "FLAGS=--base small", *([gpu] if gpu else [])]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"pip install .*-r (\S+)", said) == [list_] and "app.py --base small" in said
