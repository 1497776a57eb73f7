"""Publishing, with the real huggingface_hub client against a server on loopback."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard

from chat.adapter import CARD, CONFIG, FILES, WEIGHTS, Adapter, find
from chat.local import LocalEngine
from tests.conftest import ROOT
from tests.servers import COMMIT, CUT, LARGE
from training.pipeline import run
from training.publish import hub
from training.publish.checks import require_no_secret, version_tag

TOKEN = "hf_" + "secret" * 5
BINARIES = [name for name in FILES if name.endswith(LARGE)]


def test_only_the_contract_goes_up_and_the_card_is_valid(trained, hub_server, tmp_path):
    (trained.folder / "training_args.bin").write_bytes(b"pickle")
    try:
        hub.push(trained, "fan/pocket", HfApi(hub_server.address, token=TOKEN))
    finally:
        (trained.folder / "training_args.bin").unlink()
    assert set(hub_server.uploaded) == set(FILES)
    assert hub_server.uploaded[WEIGHTS] == (trained.folder / WEIGHTS).read_bytes()
    card = ModelCard(hub_server.uploaded["README.md"].decode())
    assert card.data.base_model == "tiny" and card.data.library_name == "peft"


def test_a_run_asks_for_permission_first_and_pushes_last(tiny_run, hub_server, modelscope_server, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    job = tiny_run(epochs=1, probe_replies=0, push="fan/pocket", push_modelscope="fan/pocket")
    run(job, api=HfApi(hub_server.address, token=TOKEN))
    for server in (hub_server, modelscope_server):
        assert set(server.uploaded) == set(FILES) and f"Bearer {TOKEN}" in server.tokens
    written = [path for folder in (job.output, job.work) for path in folder.rglob("*") if path.is_file()]
    assert written and not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_a_token_that_may_not_write_stops_the_run_before_it_starts(tiny_run, hub_server):
    hub_server.may_write = False
    job = tiny_run(push="fan/pocket")
    with pytest.raises(PermissionError, match="hf auth login") as refused:
        run(job, api=HfApi(hub_server.address, token=TOKEN))
    assert TOKEN not in str(refused.value) and not list(job.work.glob("checkpoint-*")) and not job.output.exists()


def test_a_name_that_is_none_is_refused(tiny_run, hub_server):
    with pytest.raises(PermissionError, match="check the name"):
        run(tiny_run(push="no/such/name"), api=HfApi(hub_server.address, token=TOKEN))


@pytest.fixture
def api(hub_server):
    return HfApi(hub_server.address, token=TOKEN)


@pytest.fixture
def waits(monkeypatch):
    """The seconds the client would have waited before trying again; it does not wait here."""
    asked = []
    clock = SimpleNamespace(**{**vars(time), "sleep": asked.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return asked


def test_a_publish_has_a_tag_of_its_own_and_a_second_one_sends_nothing(trained, hub_server, api):
    hub.push(trained, "fan/pocket", api)
    address = hub.push(trained, "fan/pocket", api)
    assert hub_server.tags == {version_tag(trained): COMMIT} and address.endswith(COMMIT)
    assert sorted(hub_server.stored) == sorted({hub_server.oid(name) for name in BINARIES})


def test_another_adapter_has_another_tag(trained, tmp_path):
    changed = shutil.copytree(trained.folder, tmp_path / "tiny")
    (changed / WEIGHTS).write_bytes((changed / WEIGHTS).read_bytes()[:-1] + b"?")
    assert version_tag(Adapter("tiny", changed, {}, {})) != version_tag(trained)


# The client tries each request six times in all.
@pytest.mark.parametrize(
    ("part", "status", "times"),
    [
        pytest.param("/preupload/", 500, 6, id="the Hub fails"),
        pytest.param("/preupload/", CUT, 6, id="the network is gone"),
        pytest.param("/preupload/", 401, 1, id="the token ran out"),
        pytest.param("/objects/batch", 503, 6, id="storage is down"),
        pytest.param("/store/", CUT, 6 * len(BINARIES), id="the line breaks while the binaries go up"),
        pytest.param("/store/", 507, 1, id="no room left"),
        pytest.param("/commit/", 403, 1, id="over the quota"),
        pytest.param("/tag/", 500, 6, id="the tag fails"),
    ],
)
def test_a_push_that_breaks_off_says_how_to_go_on_and_goes_on(part, status, times, trained, hub_server, api, waits):
    hub_server.fault(part, status, times)
    with pytest.raises(ConnectionError) as broken:
        hub.push(trained, "fan/pocket", api)
    said = str(broken.value)
    assert f"python -m training.publish {trained.folder} fan/pocket" in said and "\n" not in said and TOKEN not in said
    hub_server.faults.clear()
    hub.push(trained, "fan/pocket", api)
    assert set(hub_server.uploaded) == set(FILES) and version_tag(trained) in hub_server.tags
    assert sorted(hub_server.stored) == sorted({hub_server.oid(name) for name in BINARIES}), "each was sent once"


@pytest.mark.parametrize(
    ("status", "headers", "waited"),
    [(429, {"Retry_After": "30"}, 31), (500, {}, 1), (CUT, {}, 1)],
    ids=["too many requests", "a hiccup", "a broken line"],
)
def test_a_passing_trouble_is_waited_out(status, headers, waited, trained, hub_server, api, waits):
    hub_server.fault("/store/", status, **headers)
    hub.push(trained, "fan/pocket", api)
    assert waited in waits and set(hub_server.uploaded) == set(FILES)


def test_a_wrong_token_is_refused_before_training(tiny_run, hub_server):
    hub_server.known = TOKEN
    job = tiny_run(push="fan/pocket")
    with pytest.raises(PermissionError, match="hf auth login") as refused:
        run(job, api=HfApi(hub_server.address, token="hf_" + "wrong" * 6))
    assert "wrongwrong" not in str(refused.value) and not job.output.exists()


def test_a_hub_that_does_not_answer_is_not_called_a_refusal(hub_server):
    with pytest.raises(ConnectionError, match="Check the network"):
        hub.require_permission("fan/pocket", HfApi("http://127.0.0.1:9", token=TOKEN))


def test_a_name_that_is_anothers_is_refused_before_training(tiny_run, hub_server, api):
    hub_server.fault("/api/repos/create", 403)
    with pytest.raises(PermissionError, match="check the name"):
        run(tiny_run(push="someone/else"), api=api)


def test_private_is_asked_for_when_the_repository_is_made(hub_server, api):
    hub.require_permission("fan/pocket", api, private=True)
    assert hub_server.created[0]["visibility"] == "private"


def test_a_pull_request_needs_no_right_to_write(trained, hub_server, api):
    hub_server.may_write = False
    hub.require_permission("fan/pocket", api, pr=True)
    assert hub.push(trained, "fan/pocket", api, pr=True).endswith("/discussions/1")
    assert not hub_server.created and not hub_server.tags


@pytest.mark.parametrize("secret", [TOKEN, "/home/someone/models", "-----BEGIN RSA PRIVATE KEY", "ghp_" + "a1" * 15])
def test_a_secret_in_the_folder_is_found_before_anything_goes_up(secret, trained, hub_server, api, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "tiny")
    with (folder / CARD).open("a", encoding="utf-8") as file:
        file.write(f"\nsee {secret}\n")
    with pytest.raises(ValueError, match=r"README.md, line \d+, holds") as refused:
        hub.push(Adapter("tiny", folder, {}, {}), "fan/pocket", api)
    assert secret not in str(refused.value) and not hub_server.uploaded


def test_a_home_folder_in_the_recipe_is_named_before_training(tiny_run, hub_server, api, monkeypatch):
    monkeypatch.setattr("training.data.record", lambda names: [])  # the file is not here
    job = tiny_run(push="fan/pocket")
    job = replace(job, recipe=replace(job.recipe, dataset=("/home/someone/mine.jsonl",)))
    with pytest.raises(ValueError, match=r"recipe\.json, line"):
        run(job, api=api)
    assert not hub_server.created


def test_what_is_shipped_holds_no_secret():
    require_no_secret(*(ROOT / "adapters" / "pocket").iterdir())


def publish(hub_server, *arguments, token=TOKEN):
    """`python -m training.publish` as a user types it, with the Hub's address and the token in the environment."""
    own = {"HF_ENDPOINT": hub_server.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "training.publish", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=60)


def test_a_trained_folder_is_published_by_a_command(trained, hub_server):
    hub_server.known = TOKEN
    done = publish(hub_server, trained.folder, "fan/pocket")
    assert done.returncode == 0 and done.stdout.strip().endswith(COMMIT), done.stderr
    assert set(hub_server.uploaded) == set(FILES) and TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("wrong", ["token", "folder"])
def test_the_command_says_in_a_sentence_what_is_wrong(wrong, trained, hub_server, tmp_path):
    hub_server.known = TOKEN
    folder = tmp_path if wrong == "folder" else trained.folder
    done = publish(hub_server, folder, "fan/pocket", token="hf_" + "wrong" * 6)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.strip().endswith(".")


@pytest.fixture
def published(trained, hub_server, tmp_path, monkeypatch):
    """The Hub's server, holding the trained adapter as fan/pocket; and an empty cache."""
    from huggingface_hub import constants

    hub_server.uploaded = {name: (trained.folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    template = f"{hub_server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # as HF_ENDPOINT would set both
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub_server


def test_the_page_serves_an_adapter_by_its_hub_id(published, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"甄嬛=fan/pocket@{COMMIT}")
    published.uploaded["notes.bin"] = b"pickle"
    opened, refused = find(checkpoint, tmp_path / "none")
    assert [adapter.name for adapter in opened] == ["甄嬛"] and not refused
    assert {path.name for path in opened[0].folder.iterdir()} == set(FILES)
    assert LocalEngine(checkpoint, opened).adapters == ["甄嬛", "base"]


def test_what_was_fetched_is_served_when_the_hub_is_silent(published, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "fan/pocket")
    assert find(checkpoint, tmp_path)[0]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert [adapter.name for adapter in find(checkpoint, tmp_path)[0]] == ["pocket"]


@pytest.mark.parametrize("setting", ["fan/gone", "no/such/thing", "a.b=fan/pocket", "base=fan/pocket", "../../etc"])
def test_a_setting_that_cannot_be_served_is_a_sentence_and_the_rest_is_served(
    published, trained, checkpoint, setting, monkeypatch
):
    monkeypatch.setenv("ADAPTERS", setting)
    opened, refused = find(checkpoint, trained.folder.parent)
    assert [adapter.name for adapter in opened] == ["tiny"]
    assert len(refused) == 1 and "\n" not in refused[0] and refused[0].endswith(".")


def test_a_private_adapter_needs_the_token(published, checkpoint, tmp_path, monkeypatch):
    published.known = TOKEN
    monkeypatch.setenv("ADAPTERS", "fan/pocket")
    assert "cannot be had" in find(checkpoint, tmp_path)[1][0]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    opened, refused = find(checkpoint, tmp_path)
    assert [adapter.name for adapter in opened] == ["pocket"] and not refused


def test_a_foreign_adapter_from_the_hub_is_refused(published, checkpoint, tmp_path, monkeypatch):
    config = json.loads(published.uploaded[CONFIG])
    published.uploaded[CONFIG] = json.dumps({**config, "base_model_name_or_path": "other/base"}).encode()
    monkeypatch.setenv("ADAPTERS", "fan/pocket")
    assert "other/base" in find(checkpoint, tmp_path)[1][0]


def test_two_adapters_of_one_name_are_not_mixed_up(published, trained, checkpoint, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "tiny=fan/pocket")
    opened, refused = find(checkpoint, trained.folder.parent)
    assert [adapter.folder for adapter in opened] != [trained.folder] and "Two adapters are called tiny" in refused[0]
