"""Publishing, with the real huggingface_hub client against a server on loopback."""

import pytest
from huggingface_hub import HfApi, ModelCard

from chat.adapter import FILES, WEIGHTS
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
