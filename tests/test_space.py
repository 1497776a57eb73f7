"""Opening a Space: the real client against a Hub on loopback, and a real page as what the Space runs."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import HfApi

import app
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.servers import COMMIT
from training.publish import space
from training.publish.space import Deployment

TOKEN = "hf_" + "secret" * 5
OLD = {"stage": "RUNNING", "sha": "0" * 40, "hardware": {"current": "zero-a10g", "requested": "zero-a10g"}}
BUILDING = {**OLD, "stage": "BUILDING", "sha": COMMIT}
RUNNING = {**OLD, "sha": COMMIT}


@pytest.fixture
def deploy(hub_server, monkeypatch):
    """A function that deploys to a Hub whose Space passes through these states, with her page at the end."""
    monkeypatch.setattr(space, "POLL", 0)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    page = app.build_page(FakeEngine("本宫是甄嬛。"))
    _, hub_server.host, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)

    def start(*states, **settings):
        hub_server.runtimes = list(states)
        return space.deploy(Deployment(space="fan/page", **settings), HfApi(hub_server.address, token=TOKEN))

    yield start
    page.close()


def test_a_space_gets_what_the_page_needs_and_she_is_asked(deploy, hub_server, caplog):
    caplog.set_level("INFO")
    hub_server.uploaded = {"old.py": b"gone", ".gitattributes": b"the Hub's own"}
    assert deploy(OLD, OLD, BUILDING, RUNNING) == hub_server.host
    held = set(hub_server.uploaded)
    assert held == {path.as_posix() for path in space.files()} | {".gitattributes"}
    assert {
        "app.py",
        "chat/local.py",
        "qwen2/decoder.py",
        "requirements.txt",
        "adapters/pocket/adapter_model.safetensors",
    } <= held
    assert not [name for name in held if name.startswith(("training/", "tests/", "dataset/", "runs/"))]
    assert "你是谁？ 本宫是甄嬛。" in caplog.text and "BUILDING" in caplog.text
    assert hub_server.created[0]["sdk"] == "gradio" and hub_server.created[0]["hardware"] == "zero-a10g"


def test_the_page_runs_from_what_goes_up_alone(tmp_path):
    for path in space.files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    asked = subprocess.run(
        [sys.executable, "-c", "import app, chat.local, chat.adapter; print(chat.adapter.ROOT)"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert asked.stdout.strip() == str(tmp_path / "adapters"), asked.stderr


def test_settings_reach_the_space_and_a_secret_is_said_by_name_only(deploy, hub_server, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    settings = {"variables": (("ADAPTERS", "fan/pocket"),), "secrets": ("HF_TOKEN",), "hardware": "l4x1"}
    deploy(OLD, RUNNING, **settings)
    assert hub_server.settings == [
        ("variables", {"key": "ADAPTERS", "value": "fan/pocket"}),
        ("secrets", {"key": "HF_TOKEN", "value": TOKEN}),
        ("hardware", {"flavor": "l4x1"}),
    ]
    planned = space.plan(Deployment(space="fan/page", **settings))
    assert "variable ADAPTERS=fan/pocket" in planned and "HF_TOKEN" in planned and TOKEN not in planned + caplog.text


def test_a_build_that_fails_says_where_to_read_why(deploy):
    with pytest.raises(RuntimeError, match="came to BUILD_ERROR: no such package") as broken:
        deploy(OLD, BUILDING, {**BUILDING, "stage": "BUILD_ERROR", "errorMessage": "no such package"})
    assert "fan/page?logs=build" in str(broken.value)


def test_a_failure_of_the_version_before_is_none_of_ours(deploy, hub_server):
    assert deploy(OLD, {**OLD, "stage": "RUNTIME_ERROR"}, RUNNING) == hub_server.host


def test_a_build_without_end_is_given_up(deploy, monkeypatch):
    monkeypatch.setattr(space, "TIMEOUT", 0.3)
    with pytest.raises(RuntimeError, match="still BUILDING"):
        deploy(OLD, BUILDING)


def test_a_page_that_does_not_answer_is_not_called_done(deploy, hub_server, file_server):
    hub_server.host = file_server.address
    with pytest.raises(RuntimeError, match="does not answer"):
        deploy(OLD, RUNNING)


def test_the_hub_failing_midway_is_a_sentence(deploy, hub_server):
    hub_server.fault("/variables", 403)
    with pytest.raises(ConnectionError, match="Run the same command again"):
        deploy(OLD, RUNNING, variables=(("A", "b"),))


def test_one_who_may_not_write_is_told_before_anything_goes_up(deploy, hub_server):
    hub_server.may_write = False
    with pytest.raises(PermissionError, match="hf auth login"):
        deploy(OLD, RUNNING)
    assert not hub_server.uploaded


def make_space(*arguments):
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    command = [sys.executable, "-m", "training.publish.space", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_a_dry_run_names_every_file_and_needs_no_token():
    said = make_space("fan/page", "--dry-run")
    assert said.returncode == 0 and all(path.as_posix() in said.stderr for path in space.files())


@pytest.mark.parametrize("wrong", [["--variable", "no-pair"], ["--secret", "NOT_SET_HERE"]])
def test_a_wrong_setting_is_a_sentence(wrong):
    said = make_space("fan/page", "--dry-run", *wrong)
    assert said.returncode == 1 and "Traceback" not in said.stderr and said.stderr.strip().endswith(".")


def test_the_workflow_calls_what_the_makefile_has():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "space.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text(), re.M)
    assert [step.split()[1] for step in steps] == ["check", "space"] and {"check", "space"} <= set(targets)
    assert workflow["jobs"]["deploy"]["needs"] == "check"
