"""Files and folders that are written whole or not at all: beside their name first, then renamed in one step."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"  # the suffix of what is still being written


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The place to write a file or folder to. It is renamed to `path` when the block ends, deleted when that raises.

    Raises OSError with a sentence when the disk is full or cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        _delete(part)
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        replace(part, path)
    except Exception as error:
        if isinstance(error, OSError) or "os error" in str(error):  # as safetensors says it, in a class of its own
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{path} cannot be written ({reason}). Free some disk, or name another folder.") from error
        raise
    finally:
        with suppress(OSError):
            _delete(part)


def replace(part: Path, path: Path) -> None:
    """Give a file or folder the name `path`. What had that name stays whole until then, and is deleted after."""
    if not path.is_dir():
        os.replace(part, path)
        return
    if not _exchange(part, path):
        old = path.with_name(f"{path.name}.old{PART}")
        _delete(old)
        os.replace(path, old)
        os.replace(part, path)
        part = old
    _delete(part)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system can: Python has no call for it. False where it cannot."""
    libc = ctypes.CDLL(None) if sys.platform != "win32" else None
    here, names = -100, (os.fsencode(one), os.fsencode(other))  # AT_FDCWD
    if rename := getattr(libc, "renameat2", None):  # Linux
        return bool(rename(here, names[0], here, names[1], 2) == 0)  # RENAME_EXCHANGE
    if rename := getattr(libc, "renamex_np", None):  # macOS
        return bool(rename(*names, 2) == 0)  # RENAME_SWAP
    return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises as `whole` does."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
