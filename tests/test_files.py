"""What is written is there as it was or as it is to be, whatever moment the program ends at."""

import errno
import os
import shutil

import pytest
from safetensors import SafetensorError

from chat import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folders(tmp_path):
    """An old folder of two files, and a new one to take its name."""
    for name in ("her", "her.part"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / file).write_text("new" if name.endswith(files.PART) else "old")
    return tmp_path / "her.part", tmp_path / "her"


class Killed(BaseException):
    """The program ends here."""


def write_half(path, error):
    with files.whole(path) as part:
        part.write_text("half")
        raise error


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}


def test_a_kill_while_the_old_folder_is_deleted_leaves_the_new_one_whole(folders, monkeypatch):
    def half(path, **_):
        (path / "a").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Killed):
        files.replace(*folders)
    assert content(folders[1]) == NEW


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_name_of_another(folders, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    files.replace(*folders)
    assert content(folders[1]) == NEW and names(folders[1].parent) == ["her"]


@pytest.mark.parametrize("killed", [1, 2])
def test_where_names_cannot_be_swapped_the_old_folder_is_set_aside_whole(folders, monkeypatch, killed):
    renames = []

    def rename(*pair, rename=os.replace):
        renames.append(pair)
        if len(renames) == killed:
            raise Killed
        rename(*pair)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(Killed):
        files.replace(*folders)
    assert sorted(folder.name for folder in folders[1].parent.iterdir() if content(folder) == OLD) == (
        ["her"] if killed == 1 else ["her.old.part"]
    )
    assert content(folders[0]) == NEW


def test_a_file_is_its_old_self_until_the_new_one_is_written(tmp_path):
    path = tmp_path / "deeper" / "a.json"
    files.write_text(path, "old")
    with pytest.raises(Killed):
        write_half(path, Killed())
    assert path.read_text() == "old" and names(path.parent) == ["a.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and names(path.parent) == ["a.json"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, error):
    with pytest.raises(OSError, match=r"a\.bin cannot be written \(.*No space left .*\)\. Free some disk, or"):
        write_half(tmp_path / "a.bin", error)
    assert not names(tmp_path)


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a cannot be written \(.*\)\. Free some disk, or name another folder"):
        files.write_text(tmp_path / "file" / "a", "")


def test_what_is_no_fault_of_the_disk_keeps_its_own_words(tmp_path):
    with pytest.raises(ValueError, match=r"^no such layer$"):
        write_half(tmp_path / "a", ValueError("no such layer"))
