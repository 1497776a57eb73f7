"""Publishing to ModelScope and serving from it, with the real client against a server on loopback."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from chat.adapter import CARD, CONFIG, FILES, METRICS, WEIGHTS, Adapter, find
from tests.conftest import ROOT
from tests.servers import CUT
from training.pipeline import publish as publish_all
from training.pipeline import run
from training.publish import modelscope
from training.publish.checks import version_tag

TOKEN = "ms-12345678-1234-1234-1234-" + "a" * 12
OFTEN = 99  # more often than the client tries
CLOCKS = ("modelscope_hub._upload", "modelscope_hub._legacy_api", "modelscope_hub._openapi", "urllib3.util.retry")


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds the client would have waited before trying again; it does not wait here."""
    asked = []
    clock = SimpleNamespace(**{**vars(time), "sleep": asked.append})
    for module in CLOCKS:
        monkeypatch.setattr(f"{module}.time", clock)
    pause = "modelscope_hub._download_control._DownloadControl.sleep"
    monkeypatch.setattr(pause, lambda self, seconds: asked.append(seconds))
    return asked


@pytest.fixture
def site(modelscope_server, monkeypatch):
    """ModelScope, where fan's token is known and the repository is not made yet."""
    modelscope_server.known = TOKEN
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    return modelscope_server


def test_only_the_contract_goes_up_and_the_client_leaves_no_note(trained, site):
    before = {path.name for path in trained.folder.iterdir()}
    (trained.folder / "training_args.bin").write_bytes(b"pickle")
    try:
        address = modelscope.push(trained, "fan/pocket", private=True)
    finally:
        (trained.folder / "training_args.bin").unlink()
    assert address == f"{site.address}/models/fan/pocket" and site.tokens == {f"Bearer {TOKEN}"}
    assert site.uploaded == {name: (trained.folder / name).read_bytes() for name in FILES}
    assert site.created[0]["Visibility"] == 1, "private"
    assert {path.name for path in trained.folder.iterdir()} == before


def test_a_second_push_sends_nothing_and_one_adapter_has_one_tag(trained, site):
    modelscope.push(trained, "fan/pocket")
    modelscope.push(trained, "fan/pocket")
    assert site.stored and len(site.stored) == len(set(site.stored)), "each was sent once"
    assert len(site.commits) == 1 and list(site.tags) == [version_tag(trained)]


def test_what_somebody_deleted_there_is_sent_again(trained, site):
    modelscope.push(trained, "fan/pocket")
    del site.uploaded[CARD]
    modelscope.push(trained, "fan/pocket")
    assert set(site.uploaded) == set(FILES) and len(site.stored) == len(set(site.stored))


@pytest.mark.parametrize(
    ("part", "status"),
    [
        pytest.param("/api/v1/models", 401, id="the token ran out"),
        pytest.param("/repo/files", 500, id="ModelScope fails"),
        pytest.param("/repo/files", CUT, id="the network is gone"),
        pytest.param("/objects/batch", 503, id="storage is down"),
        pytest.param("/store/", CUT, id="the line breaks while the weights go up"),
        pytest.param("/store/", 507, id="no room left"),
        pytest.param("/commit/", 403, id="over the quota"),
        pytest.param("/commit/", 500, id="the commit fails"),
        pytest.param("/revisions", 500, id="the tags cannot be read"),
        pytest.param("/repo/tag", CUT, id="the tag fails"),
    ],
)
def test_a_push_that_breaks_off_says_how_to_go_on_and_goes_on(part, status, trained, site, capfd):
    site.fault(part, status, OFTEN)
    with pytest.raises(ConnectionError) as broken:
        modelscope.push(trained, "fan/pocket")
    said = str(broken.value)
    assert f"`python -m training.publish {trained.folder} fan/pocket --modelscope` goes on" in said and "\n" not in said
    assert TOKEN not in said + "".join(capfd.readouterr())
    site.faults.clear()
    modelscope.push(trained, "fan/pocket")
    assert set(site.uploaded) == set(FILES) and version_tag(trained) in site.tags
    assert len(site.stored) == len(set(site.stored)), "each was sent once"


@pytest.mark.parametrize(
    ("part", "status", "headers", "waited"),
    [
        pytest.param("/commit/", 429, {"Retry_After": "30"}, 30, id="too many requests"),
        pytest.param("/commit/", 500, {}, 1, id="a hiccup"),
        pytest.param("/store/", CUT, {}, 1, id="a broken line"),
    ],
)
def test_a_passing_trouble_is_waited_out(part, status, headers, waited, trained, site, waits):
    site.fault(part, status, **headers)
    modelscope.push(trained, "fan/pocket")
    assert waited in waits and set(site.uploaded) == set(FILES)


def test_a_repository_that_vanished_while_it_trained_is_private_again(trained, site):
    modelscope.require_permission("fan/pocket", private=True)
    site.exists = False
    modelscope.push(trained, "fan/pocket", private=True)
    assert [made["Visibility"] for made in site.created] == [1, 1]


@pytest.mark.parametrize("token", ["ms-" + "wrong" * 6, ""], ids=["wrong", "none"])
def test_a_token_that_is_not_known_stops_the_run_before_it_starts(token, tiny_run, site, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    job = tiny_run(push_modelscope="fan/pocket")
    with pytest.raises(PermissionError, match="modelscope login") as refused:
        run(job)
    assert "wrongwrong" not in str(refused.value) and not site.created and not job.output.exists()


def test_a_token_that_may_not_write_stops_the_run_before_it_starts(tiny_run, site):
    site.exists, site.may_write = True, False
    job = tiny_run(push_modelscope="fan/pocket")
    with pytest.raises(PermissionError, match="modelscope login") as refused:
        run(job)
    assert TOKEN not in str(refused.value) and not list(job.work.glob("checkpoint-*")) and not site.stored


@pytest.mark.parametrize("name", ["someone/else", "nonsense"])
def test_a_name_that_is_not_ones_own_is_refused_before_training(name, tiny_run, site):
    with pytest.raises(PermissionError, match="check the name"):
        run(tiny_run(push_modelscope=name))


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "failing"])
def test_a_modelscope_that_does_not_answer_is_not_called_a_refusal(silent, site, monkeypatch):
    if silent:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    site.fault("/users/me", 500, OFTEN)
    with pytest.raises(ConnectionError, match="Check the network") as failed:
        modelscope.require_permission("fan/pocket")
    assert "\n" not in str(failed.value)


def test_a_secret_in_the_folder_is_found_before_anything_goes_up(trained, site, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "tiny")
    (folder / CARD).write_text(f"see {TOKEN}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md, line 1, holds"):
        modelscope.push(Adapter("tiny", folder, {}, {}), "fan/pocket")
    assert not site.created and not site.uploaded


def test_one_place_that_fails_does_not_keep_the_adapter_from_the_other(trained, tiny_run, site, hub_server):
    hub_server.fault("/preupload/", 403)
    job = tiny_run(push="fan/pocket", push_modelscope="fan/pocket")
    with pytest.raises(ConnectionError, match="fan/pocket` goes on"):
        publish_all(job, trained, HfApi(hub_server.address, token="hf_" + "secret" * 5))
    assert set(site.uploaded) == set(FILES) and not hub_server.uploaded


def publish(*arguments, token=TOKEN):
    """`python -m training.publish` as a user types it; the address of ModelScope is in the environment already."""
    command = [sys.executable, "-m", "training.publish", *map(str, arguments), "--modelscope"]
    own = {**os.environ, "MODELSCOPE_API_TOKEN": token}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=60)


def test_a_trained_folder_is_published_by_a_command(trained, site):
    done = publish(trained.folder, "fan/pocket")
    assert done.returncode == 0 and done.stdout == f"{site.address}/models/fan/pocket\n", done.stderr
    assert set(site.uploaded) == set(FILES) and TOKEN not in done.stderr


def test_the_command_says_in_a_sentence_that_the_token_is_wrong(trained, site):
    done = publish(trained.folder, "fan/pocket", token="ms-" + "wrong" * 6)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.strip().endswith("name.")


def test_a_pull_request_to_modelscope_is_refused_at_once(trained):
    done = publish(trained.folder, "fan/pocket", "--pr")
    assert done.returncode == 2 and done.stderr.strip().endswith("Leave one of the two out.")


@pytest.fixture
def published(trained, modelscope_server):
    """ModelScope, holding the trained adapter as fan/pocket, for all to read."""
    modelscope_server.exists = True
    modelscope_server.uploaded = {name: (trained.folder / name).read_bytes() for name in FILES}
    return modelscope_server


def test_the_page_serves_an_adapter_by_its_id(published, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "甄嬛=modelscope:fan/pocket")
    published.uploaded["notes.bin"] = b"pickle"
    opened, refused = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == ["甄嬛"] and not refused
    assert {path.name for path in opened[0].folder.iterdir()} == set(FILES)


def test_the_page_serves_an_adapter_by_its_revision(published, trained, checkpoint, tmp_path, monkeypatch):
    published.tags["v1"] = dict(published.uploaded)
    published.uploaded[WEIGHTS] = b"another"
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket@v1")
    opened, refused = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == ["pocket"] and not refused
    assert (opened[0].folder / WEIGHTS).read_bytes() == (trained.folder / WEIGHTS).read_bytes()


def test_what_was_pushed_is_served_by_its_tag(trained, site, checkpoint, tmp_path, monkeypatch):
    modelscope.push(trained, "fan/pocket", private=True)
    site.private = True
    monkeypatch.setenv("ADAPTERS", f"modelscope:fan/pocket@{version_tag(trained)}")
    assert [adapter.name for adapter in find(checkpoint, tmp_path)[0]] == ["pocket"]


def test_what_is_new_there_is_fetched_and_what_is_not_is_left(published, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    folder = find(checkpoint, tmp_path)[0][0].folder
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    published.uploaded[METRICS] = b'{"steps": 7}'
    assert find(checkpoint, tmp_path)[0][0].metrics == {"steps": 7}
    assert [path.name for path in folder.iterdir() if path.stat().st_mtime_ns != times[path.name]] == [METRICS]


@pytest.mark.parametrize("fault", ["silent", "failing"])
def test_what_was_fetched_is_served_when_modelscope_is_silent(fault, published, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    assert find(checkpoint, tmp_path)[0]
    published.fault("/repo/files", 500, OFTEN)
    if fault == "silent":
        monkeypatch.setattr("modelscope_hub.config._default_config", None)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert [adapter.name for adapter in find(checkpoint, tmp_path)[0]] == ["pocket"]


@pytest.mark.parametrize(
    "place", ["modelscope:fan/gone", "modelscope:fan/pocket@none", "modelscope:no/such/thing", "modelscope:"]
)
def test_a_setting_that_cannot_be_served_is_a_sentence_and_the_rest_is_served(
    place, published, trained, checkpoint, monkeypatch
):
    monkeypatch.setenv("ADAPTERS", f"甄嬛={place}")
    opened, refused = find(checkpoint, trained.folder.parent)
    assert [adapter.name for adapter in opened] == ["tiny"]
    assert len(refused) == 1 and "\n" not in refused[0] and refused[0].endswith(".")


def test_an_adapter_whose_line_breaks_is_a_sentence_and_comes_the_next_time(
    published, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    published.fault(WEIGHTS, CUT, OFTEN)
    opened, refused = find(checkpoint, tmp_path)
    assert not opened and "cannot be had" in refused[0] and refused[0].endswith(".")
    published.faults.clear()
    assert [adapter.name for adapter in find(checkpoint, tmp_path)[0]] == ["pocket"]


def test_a_private_adapter_needs_the_token(published, checkpoint, tmp_path, monkeypatch):
    published.private, published.known = True, TOKEN
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    assert "cannot be had" in find(checkpoint, tmp_path)[1][0]
    monkeypatch.setattr("modelscope_hub.config._default_config", None)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    opened, refused = find(checkpoint, tmp_path)
    assert [adapter.name for adapter in opened] == ["pocket"] and not refused


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"], ids=["under a good name", "under its own"])
def test_a_pickle_is_refused_and_never_loaded(name, published, checkpoint, tmp_path, monkeypatch):
    del published.uploaded[WEIGHTS]
    published.uploaded[name] = pickle.dumps({"weights": [1.0]})
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    opened, refused = find(checkpoint, tmp_path)
    assert not opened and WEIGHTS in refused[0]


def test_a_foreign_adapter_is_refused(published, checkpoint, tmp_path, monkeypatch):
    config = json.loads(published.uploaded[CONFIG])
    published.uploaded[CONFIG] = json.dumps({**config, "base_model_name_or_path": "other/base"}).encode()
    monkeypatch.setenv("ADAPTERS", "modelscope:fan/pocket")
    assert "other/base" in find(checkpoint, tmp_path)[1][0]
