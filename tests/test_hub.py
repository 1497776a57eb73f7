"""Publishing, with the real huggingface_hub client against a server on loopback."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard

from chat.adapter import CONFIG, FILES, WEIGHTS, find
from chat.local import LocalEngine
from tests.servers import COMMIT
from training import hub
from training.run import run

TOKEN = "hf_" + "secret" * 5


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


def test_a_run_asks_for_permission_first_and_pushes_last(tiny_run, hub_server):
    job = tiny_run(epochs=1, probe_replies=0, push="fan/pocket")
    run(job, api=HfApi(hub_server.address, token=TOKEN))
    assert set(hub_server.uploaded) == set(FILES) and f"Bearer {TOKEN}" in hub_server.tokens
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
def published(trained, hub_server, tmp_path, monkeypatch):
    """The Hub's server, holding the trained adapter as fan/pocket; and an empty cache."""
    from huggingface_hub import constants

    hub_server.uploaded = {name: (trained.folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    template = f"{hub_server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # as HF_ENDPOINT would set both
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub_server


def test_the_page_serves_an_adapter_by_its_hub_id(published, located, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", f"甄嬛=fan/pocket@{COMMIT}")
    published.uploaded["notes.bin"] = b"pickle"
    opened, refused = find(located, tmp_path / "none")
    assert [adapter.name for adapter in opened] == ["甄嬛"] and not refused
    assert {path.name for path in opened[0].folder.iterdir()} == set(FILES)
    assert LocalEngine(located, opened).adapters == ["甄嬛", "base"]


def test_what_was_fetched_is_served_when_the_hub_is_silent(published, located, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "fan/pocket")
    assert find(located, tmp_path)[0]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert [adapter.name for adapter in find(located, tmp_path)[0]] == ["pocket"]


@pytest.mark.parametrize("setting", ["fan/gone", "no/such/thing", "a.b=fan/pocket", "base=fan/pocket", "../../etc"])
def test_a_setting_that_cannot_be_served_is_a_sentence_and_the_rest_is_served(
    published, trained, located, setting, monkeypatch
):
    monkeypatch.setenv("ADAPTERS", setting)
    opened, refused = find(located, trained.folder.parent)
    assert [adapter.name for adapter in opened] == ["tiny"]
    assert len(refused) == 1 and "\n" not in refused[0] and refused[0].endswith(".")


def test_a_foreign_adapter_from_the_hub_is_refused(published, located, tmp_path, monkeypatch):
    config = json.loads(published.uploaded[CONFIG])
    published.uploaded[CONFIG] = json.dumps({**config, "base_model_name_or_path": "other/base"}).encode()
    monkeypatch.setenv("ADAPTERS", "fan/pocket")
    assert "other/base" in find(located, tmp_path)[1][0]


def test_two_adapters_of_one_name_are_not_mixed_up(published, trained, located, monkeypatch):
    monkeypatch.setenv("ADAPTERS", "tiny=fan/pocket")
    opened, refused = find(located, trained.folder.parent)
    assert [adapter.folder for adapter in opened] != [trained.folder] and "Two adapters are called tiny" in refused[0]
