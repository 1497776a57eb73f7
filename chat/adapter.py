"""The adapter folder and its gate: `Adapter.open` returns a folder that can be served, or says why not."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from chat.checkpoints import Checkpoint, read_json
from chat.download import from_modelscope
from chat.engine import BASE_ONLY
from chat.files import PART
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
NAME = re.compile(r"[\w-]{1,60}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
MODELSCOPE = "modelscope:"  # the prefix of a repository on ModelScope; without it, USER/NAME is on the Hub

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The options of PEFT that a served adapter may set. Any other one changes more than lora_a and lora_b do.
OPTIONS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "init_lora_weights", "bias",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
SAFE_INIT = (None, True, False, "gaussian", "orthogonal")  # values of init_lora_weights that keep the base as it is
MAX_RANK = 64
MIN_ALPHA = 1e-3  # llama.cpp takes a missing alpha, or 0, for scale 1; PEFT takes it for 0
MAX_ALPHA = 4096 * 8  # alpha 4096 of an rsLoRA of rank 64, once sqrt(rank) is folded in
MAX_BYTES = 1 << 30
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # numpy knows no bf16, the upper half of an fp32


@dataclass(frozen=True)
class Adapter:
    """A checked folder: a LoRA or DoRA that fits its base and was trained under today's system prompt."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, checkpoint: Checkpoint, name: str | None = None) -> "Adapter":
        """Check a folder against its base; the adapter gets the folder's name, or `name`. The engine tries its logits.

        Raises FileNotFoundError or ValueError: one sentence with the remedy.
        """
        name = check_name(name or folder.resolve().name)
        _check_files(folder)
        config = read_json(folder / CONFIG)
        _check_config(folder, config, checkpoint)
        _check_weights(folder / WEIGHTS, config, checkpoint.config())
        recipe = read_json(folder / RECIPE)
        if (prompt := recipe.get("system_prompt")) != SYSTEM_PROMPT:
            raise ValueError(
                f"{folder} was trained under the prompt {prompt!r}, but the character is now {SYSTEM_PROMPT!r}. "
                "Train it again, or restore the prompt."
            )
        metrics = read_json(folder / METRICS) if (folder / METRICS).exists() else {}
        return cls(name, folder, recipe, metrics)

    @property
    def dora(self) -> bool:
        """Whether it has DoRA's magnitudes, too (Liu et al. 2024)."""
        return bool(read_json(self.folder / CONFIG).get("use_dora"))


def find(checkpoint: Checkpoint, root: Path = ROOT) -> tuple[list[Adapter], list[str]]:
    """Open the adapters that ADAPTERS names, then every folder under `root` that was trained on this base.

    ADAPTERS is `name=source, name=source`: a source is a folder, USER/NAME[@REVISION], or that after `modelscope:`.
    Returns the adapters, and a sentence for each one refused: one bad adapter does not keep the others from serving.
    """
    sources = []
    for entry in filter(None, map(str.strip, os.environ.get("ADAPTERS", "").split(","))):
        name, _, source = entry.partition("=") if "=" in entry else ("", "", entry)
        sources.append((name.strip() or source.partition("@")[0].rsplit("/", 1)[-1], source.strip()))
    folders = [path.parent for path in sorted(root.glob(f"*/{CONFIG}")) if _is_for(checkpoint, path)]
    sources += [(folder.name, str(folder)) for folder in folders if folder.suffix != PART]
    opened: dict[str, Adapter] = {}
    refused = []
    for name, source in sources:
        try:
            if name in opened:
                raise ValueError(f"Two adapters are called {name}; {source} is left out. Rename one.")
            opened[name] = Adapter.open(_folder(source), checkpoint, name)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    return list(opened.values()), refused


def _is_for(checkpoint: Checkpoint, config: Path) -> bool:
    """Whether a config names this base, or cannot be read: the gate says why."""
    try:
        return bool(read_json(config).get("base_model_name_or_path") == checkpoint.base.name)
    except ValueError:
        return True


def _folder(source: str) -> Path:
    """The folder itself, or the copy of a repository, the last one while its site is silent. Raises ValueError."""
    on_modelscope = source.startswith(MODELSCOPE)
    if not on_modelscope and (Path(source).is_dir() or not HUB_ID.fullmatch(source)):
        return Path(source)
    repo, _, revision = source.removeprefix(MODELSCOPE).partition("@")
    try:
        if on_modelscope:
            return from_modelscope(repo, list(FILES), revision or None, cached=True)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # each site's client fails in its own way
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source} cannot be had ({reason}). Check its name, your access, the network.") from error


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
            raise FileNotFoundError(f"{folder} is no adapter: {name} is missing. Copy it whole, or train again.")
    if (size := (folder / WEIGHTS).stat().st_size) > MAX_BYTES:
        raise ValueError(f"{folder / WEIGHTS} has {size:,} bytes, more than a LoRA needs. Check where it is from.")


def _check_config(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is not a LoRA. Train one with `python -m training.run`.")
    if (base := config.get("base_model_name_or_path")) != checkpoint.base.name:
        raise ValueError(f"{folder} was trained on {base}, this base is {checkpoint.base.name}. Choose that base.")
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{folder} has rank {rank!r}; 1 to {MAX_RANK} can be served. Train with a smaller --rank.")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder} has a rank per layer; one rank for all can be served. Train with one --rank.")
    more = [name for name, value in config.items() if value and name not in OPTIONS]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += ["init_lora_weights"] if config.get("init_lora_weights") not in SAFE_INIT else []
    if more:
        raise ValueError(f"{folder} is not a LoRA alone: it sets {more[0]}. Train one with `python -m training.run`.")
    for name, low, high in (("lora_alpha", MIN_ALPHA, MAX_ALPHA), ("lora_dropout", 0, 1)):
        value = config.get(name, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{folder} has {name} {value!r}; it may be {low} to {high}. Copy the folder again.")
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not modules or set(modules) - set(LAYERS):
        raise ValueError(f"{folder} adapts {modules}; only {', '.join(LAYERS)} can be served. Train with those.")


def _check_weights(path: Path, lora: dict[str, Any], base: dict[str, Any]) -> None:
    try:
        tensors = dict(safetensors.deserialize(path.read_bytes()))
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy the folder again.") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor. Train it again.")
    expected = _expected_shapes(lora["r"], base, bool(lora.get("use_dora")))
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{path} holds {name}, a layer that this base does not have. Choose its own base.")
        if (shape := tuple(tensor["shape"])) != (fit := expected[name]):
            raise ValueError(f"{path}: {name} has shape {shape}, this base needs {fit}. Choose its own base.")
        if tensor["dtype"] not in DTYPES or not np.isfinite(to_numpy(tensor)).all():
            raise ValueError(f"{path}: {name} is not finite. Train it again with a lower --learning-rate.")
    stems = {name.rpartition(".lora_")[0] for name in tensors}
    if lone := sorted(name for name in expected.keys() - tensors if name.rpartition(".lora_")[0] in stems):
        raise ValueError(f"{path} lacks {lone[0]}, of a layer that it adapts. Copy the folder again.")


def to_numpy(tensor: dict[str, Any]) -> np.ndarray:
    """A tensor as safetensors reads it, of one of DTYPES, as an array; bf16 becomes fp32."""
    array: np.ndarray = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor["dtype"] == "BF16" else array


def _expected_shapes(rank: int, config: dict[str, Any], dora: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that a LoRA of Qwen2 may hold: lora_A (rank, in), lora_B (out, rank), DoRA's magnitude (out,)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = hidden // heads * config.get("num_key_value_heads", heads)
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (into, out) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (rank, into)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
            shapes |= {f"{stem}.lora_magnitude_vector": (out,)} if dora else {}
    return shapes
