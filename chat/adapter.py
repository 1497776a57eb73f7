"""The adapter folder and its gate: `Adapter.open` returns a folder that can be served, or says why not."""

import contextlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from chat.base import Located, from_modelscope
from chat.engine import BASE_ONLY
from chat.fetch import Unavailable
from chat.persona import SYSTEM_PROMPT

ROOT = Path(__file__).parent.parent / "adapters"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "recipe.json"
METRICS = "metrics.json"
CARD = "README.md"
FIGURE, RADAR, MARKERS = "loss.png", "radar.png", "markers.png"
REPORT = "report.md"
FILES = (CONFIG, WEIGHTS, RECIPE, METRICS, CARD, FIGURE, RADAR, MARKERS, REPORT)
NEEDED = (CONFIG, WEIGHTS, RECIPE)
PART = ".part"  # ends the name of a folder that a run is still writing
NAME = re.compile(r"[\w-]{1,60}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
MODELSCOPE = "modelscope:"  # begins a place that is on ModelScope; without it, USER/NAME is on the Hub

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What PEFT may have set of an adapter that can be served. Any other option means more than LoRA's two products.
OPTIONS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "init_lora_weights", "bias",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
DRAWN = (None, True, False, "gaussian", "orthogonal")  # beginnings that leave the base's weights alone
MAX_RANK = 64
MIN_ALPHA = 1e-3  # none, or 0, is strength 1 to llama.cpp, and 0 to PEFT
MAX_ALPHA = 4096 * 8  # 4096 of an rsLoRA of rank 64, as it is saved
MAX_BYTES = 1 << 30
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
EXPONENT = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


@dataclass(frozen=True)
class Adapter:
    """A checked folder: a LoRA or DoRA that fits its base and was trained under today's system prompt."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, located: Located, name: str | None = None) -> "Adapter":
        """Check a folder against the base it is to serve on; it is called as the folder is, or `name`.

        Raises FileNotFoundError or ValueError: one sentence with the remedy. That it changes the logits is checked
        by the engine, which has the base in memory.
        """
        name = check_name(name or folder.resolve().name)
        _check_files(folder)
        config = _read(folder / CONFIG)
        _check_config(folder, config, located)
        _check_weights(folder, config, located.config())
        recipe = _read(folder / RECIPE)
        if recipe.get("system_prompt") != SYSTEM_PROMPT:
            raise ValueError(
                f"{folder} was trained under the prompt {recipe.get('system_prompt')!r}, but the character is now "
                f"{SYSTEM_PROMPT!r}. Train it again, or restore the prompt."
            )
        metrics = _read(folder / METRICS) if (folder / METRICS).exists() else {}
        return cls(name, folder, recipe, metrics)

    @property
    def dora(self) -> bool:
        """Whether it scales each output, too (DoRA, Liu et al. 2024)."""
        return bool(_read(self.folder / CONFIG).get("use_dora"))


def find(located: Located, root: Path = ROOT) -> tuple[list[Adapter], list[str]]:
    """Open the adapters that ADAPTERS names, then every folder under `root` that was trained on this base.

    Returns them, and a sentence for each one refused: what is there is served.
    """
    opened: dict[str, Adapter] = {}
    refused = []
    for name, place in [*_named(os.environ.get("ADAPTERS", "")), *_shipped(located, root)]:
        try:
            if name in opened:
                raise ValueError(f"Two adapters are called {name}; {place} is left out. Rename one.")
            opened[name] = Adapter.open(_folder(place), located, name)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    return list(opened.values()), refused


def _named(setting: str) -> list[tuple[str, str]]:
    """`name=place, name=place` as pairs; a place is a folder, USER/NAME[@REVISION], or that after `modelscope:`."""
    entries = [entry.strip() for entry in setting.split(",") if entry.strip()]
    pairs = [entry.partition("=") if "=" in entry else ("", "", entry) for entry in entries]
    return [(name.strip() or place.partition("@")[0].rsplit("/", 1)[-1], place.strip()) for name, _, place in pairs]


def _shipped(located: Located, root: Path) -> list[tuple[str, str]]:
    folders = sorted(path.parent for path in root.glob(f"*/{CONFIG}") if path.parent.suffix != PART)
    return [(folder.name, str(folder)) for folder in folders if _fits(folder / CONFIG, located)]


def _fits(config: Path, located: Located) -> bool:
    try:
        return bool(_read(config).get("base_model_name_or_path") == located.base.name)
    except ValueError:
        return True  # unreadable: let the gate say so


def _folder(place: str) -> Path:
    """The folder itself, or the cached copy of a repository: only the contract's files are fetched.

    Raises ValueError when the repository cannot be had.
    """
    fetch = _from_modelscope if place.startswith(MODELSCOPE) else _from_hub
    if fetch is _from_hub and (Path(place).is_dir() or not HUB_ID.fullmatch(place)):
        return Path(place)
    repo, _, revision = place.removeprefix(MODELSCOPE).partition("@")
    try:
        return fetch(repo, revision or None)
    except Exception as error:  # each site's client fails in its own way
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{place} cannot be had ({reason}). Check its name, your access, the network.") from error


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))


def _from_modelscope(repo: str, revision: str | None) -> Path:
    """As the Hub's client does by itself: while the site is silent, what was fetched before."""
    from modelscope_hub import CacheNotFound, NetworkError, ServerError

    try:
        return from_modelscope(repo, list(FILES), revision)
    except (Unavailable, NetworkError, ServerError):
        with contextlib.suppress(CacheNotFound):
            return from_modelscope(repo, list(FILES), revision, cached=True)
        raise


def check_name(name: str) -> str:
    """The name, when a visitor can choose it and PEFT can hold it. Raises ValueError."""
    if name == BASE_ONLY or not NAME.fullmatch(name):
        raise ValueError(f"An adapter cannot be called {name!r}. Use letters, digits, - and _, and not {BASE_ONLY!r}.")
    return name


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Train an adapter with `python -m training.run`.")
    if pickled := [path.name for path in folder.iterdir() if path.suffix in PICKLES]:
        raise ValueError(f"{folder} holds {pickled[0]}, which can run code. Keep safetensors only: delete it.")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no adapter: {name} is missing. Copy the whole folder, or train again."
            )
    if (size := (folder / WEIGHTS).stat().st_size) > MAX_BYTES:
        raise ValueError(
            f"{folder / WEIGHTS} has {size:,} bytes, more than any LoRA here needs. Check where it is from."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy the folder again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object. Copy the folder again.")
    return value


def _check_config(folder: Path, config: dict[str, Any], located: Located) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is not a LoRA. Train one with `python -m training.run`.")
    if (base := config.get("base_model_name_or_path")) != located.base.name:
        raise ValueError(f"{folder} was trained on {base}, this base is {located.base.name}. Choose that base.")
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{folder} has rank {rank!r}; 1 to {MAX_RANK} can be served. Train with a smaller --rank.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder} has a rank per layer; one rank for all can be served. Train with one --rank.")
    _check_options(folder, config)
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not modules or set(modules) - set(LAYERS):
        raise ValueError(f"{folder} adapts {modules}; only {', '.join(LAYERS)} can be served. Train with those.")


def _check_options(folder: Path, config: dict[str, Any]) -> None:
    more = [name for name, value in config.items() if value and name not in OPTIONS]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += ["init_lora_weights"] if config.get("init_lora_weights") not in DRAWN else []
    if more:
        raise ValueError(f"{folder} is not a LoRA alone: it sets {more[0]}. Train one with `python -m training.run`.")
    for name, least, most in (("lora_alpha", MIN_ALPHA, MAX_ALPHA), ("lora_dropout", 0, 1)):
        value = config.get(name, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{folder} has {name} {value!r}; it may be {least} to {most}. Copy the folder again.")


def _check_weights(folder: Path, lora: dict[str, Any], base: dict[str, Any]) -> None:
    path = folder / WEIGHTS
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy the folder again.") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor. Train it again.")
    expected = _expected_shapes(lora["r"], base, bool(lora.get("use_dora")))
    for name, tensor in tensors:
        if name not in expected:
            raise ValueError(
                f"{path} holds {name}, a layer that this base does not have. Choose the base it was made for."
            )
        if tuple(tensor["shape"]) != expected[name]:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor['shape'])}, this base needs {expected[name]}. "
                "Choose the base it was made for."
            )
        if not _finite(tensor):
            raise ValueError(
                f"{path}: {name} holds a value that is not finite. Train it again with a lower --learning-rate."
            )
    names = {name for name, _ in tensors}
    stems = {name.rpartition(".lora_")[0] for name in names}
    if lone := sorted(name for name in expected if name not in names and name.rpartition(".lora_")[0] in stems):
        raise ValueError(f"{path} lacks {lone[0]}, of a layer that it adapts. Copy the folder again.")


def _finite(tensor: dict[str, Any]) -> bool:
    """Whether no value has all exponent bits set; numpy knows no bfloat16, so the bits are read."""
    if tensor["dtype"] not in EXPONENT:
        return False
    kind, mask = EXPONENT[tensor["dtype"]]
    bits = np.frombuffer(tensor["data"], dtype=kind)
    return not bool(((bits & mask) == mask).any())


def _expected_shapes(rank: int, config: dict[str, Any], dora: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of every LoRA tensor a Qwen2 base can take: A is (rank, in), B is (out, rank), DoRA's magnitude (out,)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = hidden // heads * config.get("num_key_value_heads", heads)
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (into, out) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (rank, into)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
            shapes |= {f"{stem}.lora_magnitude_vector": (out,)} if dora else {}
    return shapes


def trainable(rank: int, config: dict[str, Any]) -> int:
    """Parameters of a LoRA of this rank over the seven layers."""
    return sum(math.prod(shape) for shape in _expected_shapes(rank, config).values())
