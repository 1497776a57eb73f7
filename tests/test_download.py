"""A file comes whole and right, or not at all: against a real server that breaks off, lies or is gone."""

import multiprocessing
import shutil
from collections import namedtuple

import pytest

from chat import download
from chat.download import Unavailable, fetch, require_room

BODY = bytes(range(256)) * 4000


def test_a_file_arrives_and_is_not_fetched_twice(tmp_path, file_server):
    url, sha = file_server.serve("a.bin", BODY), file_server.sha256(BODY)
    for _ in range(2):
        assert fetch(url, tmp_path / "a.bin", sha256=sha).read_bytes() == BODY
    assert len(file_server.asked) == 1


def test_a_broken_transfer_is_tried_again(tmp_path, file_server):
    url, file_server.break_after = file_server.serve("a.bin", BODY), 300_000
    assert fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY)).read_bytes() == BODY
    assert len(file_server.asked) == 2


def test_a_transfer_that_stays_broken_is_a_sentence_and_leaves_nothing(tmp_path, file_server, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    url, file_server.break_after = file_server.serve("a.bin", BODY), 300_000
    with pytest.raises(Unavailable, match=r"a\.bin does not answer"):
        fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.lock"]


def test_damaged_bytes_are_refused_and_leave_nothing(tmp_path, file_server):
    url = file_server.serve("a.bin", BODY[:-1] + b"!")
    with pytest.raises(Unavailable, match="damaged"):
        fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.lock"]


def test_a_damaged_file_under_the_final_name_is_fetched_again(tmp_path, file_server):
    (tmp_path / "a.bin").write_bytes(b"cut off")
    url = file_server.serve("a.bin", BODY)
    assert fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY)).read_bytes() == BODY


def test_a_missing_file_is_a_sentence(tmp_path, file_server):
    with pytest.raises(Unavailable, match=r"gone\.bin does not answer.*404"):
        fetch(f"{file_server.address}/gone.bin", tmp_path / "a.bin", sha256="0" * 64)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    require_room(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(Unavailable, match=r"0\.0 GB free.*CHAT_CACHE"):
        require_room(tmp_path, 2)


def test_two_processes_at_once_take_turns(tmp_path, file_server):
    url, sha = file_server.serve("a.bin", BODY), file_server.sha256(BODY)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=fetch, args=(url, tmp_path / "a.bin"), kwargs={"sha256": sha}) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "a.bin").read_bytes() == BODY and len(file_server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_status_that_passes_is_asked_again_as_late_as_the_site_says(tmp_path, file_server, monkeypatch, status):
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    url = file_server.serve("a.bin", BODY)
    file_server.refusals = [(status, {"Retry-After": "7"}), (status, {"Retry-After": "9000"}), (status, {})]
    assert fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY)).read_bytes() == BODY
    assert slept == [7, download.LONGEST_RETRY_AFTER, 2]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_status_that_stays_is_a_sentence_at_once(tmp_path, file_server, status):
    url, file_server.refusals = file_server.serve("a.bin", BODY), [(status, {})]
    with pytest.raises(Unavailable, match=f"a.bin does not answer .*{status}"):
        fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY))
    assert len(file_server.asked) == 1


def test_a_login_page_in_place_of_a_file_is_named_and_leaves_nothing(tmp_path, file_server):
    url = file_server.serve("login/", b"<html>Welcome to our network</html>")
    with pytest.raises(Unavailable, match=r"login/ sent a web page, as networks do that want a login .*Try again"):
        fetch(url, tmp_path / "a.bin", sha256=file_server.sha256(BODY))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.lock"]


def test_a_cache_that_cannot_be_a_folder_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"file is a file\. Set CHAT_CACHE to a folder, or unset it"):
        download.cache()
    with pytest.raises(Unavailable, match=r"file/deeper cannot be made \(Not a directory\)\. Set CHAT_CACHE"):
        require_room(tmp_path / "file" / "deeper", 1)
