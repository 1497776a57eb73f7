"""Fetch one file over HTTP: resumed, checked, and put under its name only when whole."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import httpx
from filelock import FileLock
from tqdm import tqdm

ATTEMPTS = 5
CHUNK = 1 << 20  # bytes


class Unavailable(RuntimeError):
    """Something the user needs cannot be had; the message says what was tried and what to do."""


def fetch(url: str, path: Path, *, sha256: str, size: int | None = None) -> Path:
    """Download `url` to `path`; return at once when it is there already.

    A broken transfer goes on where it stopped, in this call or the next. Two processes take turns. Bytes whose
    size or sha256 differ are deleted. Raises Unavailable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists() and digest(path) == sha256:
            return path
        if size:
            require_room(path.parent, size)
        part = path.with_name(path.name + ".part")
        _download_persistently(url, part, size)
        found = digest(part)
        if found != sha256:
            part.unlink()
            raise Unavailable(f"{url} came damaged (sha256 {found[:12]}…, expected {sha256[:12]}…). Try again.")
        os.replace(part, path)
    return path


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            total.update(block)
    return total.hexdigest()


def require_room(folder: Path, size: int) -> None:
    """Raise Unavailable when the disk under `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise Unavailable(
            f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed. "
            "Free some disk, or set CHAT_CACHE to a folder on a larger one."
        )


def _download_persistently(url: str, part: Path, size: int | None) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(url, part, size)
            return
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if refused or isinstance(error, httpx.ConnectError) or attempt == ATTEMPTS:
                raise Unavailable(f"{url} does not answer ({type(error).__name__}: {error})") from error
            time.sleep(2**attempt / 4)


def _download(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what it lacks; start anew when the server cannot continue."""
    start = part.stat().st_size if part.exists() else 0
    if size and start >= size:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # already whole; the hash decides
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            start = 0
        total = size or start + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, mininterval=1)
        with bar, part.open("ab" if start else "wb") as file:
            for block in answer.iter_raw():
                bar.update(file.write(block))
                if size and file.tell() > size:
                    break  # longer than announced: stop here, the hash refuses it
    if size and part.stat().st_size < size:
        raise httpx.ReadError("the transfer ended early")
