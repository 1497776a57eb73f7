"""The adapter folder and its gate: `Adapter.open` returns a folder that can be served, or says why not."""

import logging
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from chat.bases import BASES
from chat.checkpoints import Checkpoint, read_json
from chat.download import from_modelscope
from chat.engine import BASE_ONLY
from chat.persona import SYSTEM_PROMPT

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent / "adapters"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "recipe.json"
METRICS = "metrics.json"
CARD = "README.md"
FIGURE, RADAR, MARKERS = "loss.png", "radar.png", "markers.png"
REPORT = "report.md"
FILES = (CONFIG, WEIGHTS, RECIPE, METRICS, CARD, FIGURE, RADAR, MARKERS, REPORT)
PART = ".part"  # the suffix of a folder that a run is still writing
MAX_NAME = 60  # characters
NAME = re.compile(rf"[\w-]{{1,{MAX_NAME}}}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
MODELSCOPE = "modelscope:"  # the prefix of a repository on ModelScope; without it, USER/NAME is on the Hub
SETTING = re.compile(r"(?:(?P<name>[^/\\=]*)=)?(?P<source>.*?)(?:[,;\s]\s*prompt=(?P<prompt>.*))?", re.S)

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The fields of PEFT that a served adapter may set, with their types in JSON; null is allowed too. Any other one changes
# more than lora_a and lora_b do.
NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "peft_type": (str,), "peft_version": (str,), "task_type": (str,), "auto_mapping": (dict,), "revision": (str,),
    "base_model_name_or_path": (str,), "inference_mode": (bool,), "r": (int,), "lora_alpha": NUMBER,
    "lora_dropout": NUMBER, "use_rslora": (bool,), "use_dora": (bool,), "target_modules": (list,),
    "init_lora_weights": (bool, str), "bias": (str,), "megatron_core": (str,), "qalora_group_size": (int,),
}  # fmt: skip
TYPES = {(bool,): "true or false", (int,): "a whole number", NUMBER: "a number", (list,): "a list", (str,): "text"}
SAFE_INIT = (None, True, False, "gaussian", "orthogonal")  # values of init_lora_weights that keep the base as it is
MAX_RANK = 64
MIN_ALPHA = 1e-3  # llama.cpp takes a missing alpha, or 0, for scale 1; PEFT takes it for 0
MAX_ALPHA = 4096 * 8  # alpha 4096 of an rsLoRA of rank 64, once sqrt(rank) is folded in
MAX_BYTES = 1 << 30
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# What Trainer leaves in a checkpoint beside the adapter, and nothing here opens.
TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state\w*)\.(bin|pt|pth)")
LFS_POINTER = b"version https://git-lfs"
DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # numpy knows no bf16, the upper half of an fp32
# How quantised copies of a model are called, and GGUF files of it; an adapter of one is an adapter of the model.
COPY = re.compile(r"(-unsloth)?-(gguf|awq|bnb-[48]bit|gptq-int[48])$")


@dataclass(frozen=True)
class Adapter:
    """A checked folder: a LoRA or DoRA that fits its base and, as far as it is known, was trained under our prompt."""

    name: str
    folder: Path
    recipe: dict[str, Any]  # empty where another program trained it
    metrics: dict[str, Any]
    lora: dict[str, Any] = field(default_factory=dict)  # arguments of PEFT's LoraConfig: what it computes
    unstated: tuple[str, ...] = ()  # what the folder does not tell, and is assumed: "prompt", "base"

    @classmethod
    def open(
        cls, folder: Path, checkpoint: Checkpoint, name: str | None = None, prompt: str | None = None
    ) -> "Adapter":
        """Check a folder, or the last checkpoint in it, against a base. The engine tries its logits.

        The adapter gets the folder's name, or `name`. `prompt` is the system prompt it was trained under, for a folder
        without a recipe. Raises FileNotFoundError or ValueError: one sentence with the remedy.
        """
        name = check_name(name or name_of(folder.resolve().name))
        folder = last_checkpoint(folder)
        _check_files(folder)
        config = _read_config(folder)
        base_stated = _check_base(folder, config, checkpoint)
        _check_weights(folder / WEIGHTS, config, checkpoint.config())
        recipe, metrics = (read_json(path) if (path := folder / each).exists() else {} for each in (RECIPE, METRICS))
        prompts = [each for each in (recipe.get("system_prompt"), prompt) if each is not None]
        for each in prompts:
            if not isinstance(each, str):
                raise ValueError(f"{folder / RECIPE} has system_prompt {each!r:.60}; it must be text. Correct it.")
            if each != SYSTEM_PROMPT:
                raise ValueError(
                    f"{folder} was trained under the prompt {each!r}, but the character is now {SYSTEM_PROMPT!r}. "
                    "Train it again, or restore the prompt."
                )
        lora = {key: config[key] for key in ("r", "lora_alpha", "target_modules")}
        lora |= {key: bool(config.get(key)) for key in ("use_rslora", "use_dora")}
        unstated = [what for what, known in (("prompt", prompts), ("base", base_stated)) if not known]
        return cls(name, folder, recipe, metrics, lora, tuple(unstated))

    @property
    def dora(self) -> bool:
        """Whether it has DoRA's magnitudes, too (Liu et al. 2024)."""
        return bool(self.lora["use_dora"])

    @property
    def alpha(self) -> float:
        """The alpha that, over the rank, is its scale: rsLoRA's (Kalajdzievski 2023) is alpha over the rank's root."""
        return float(self.lora["lora_alpha"] * (math.sqrt(self.lora["r"]) if self.lora["use_rslora"] else 1))


def find(checkpoint: Checkpoint, root: Path = ROOT) -> tuple[list[Adapter], list[str]]:
    """Open the adapters that ADAPTERS names, then every folder under `root` that was trained on this base.

    ADAPTERS is `name=source, name=source`: a source is a folder, USER/NAME[@REVISION], or that after `modelscope:`. The
    name may be left out. `;prompt=TEXT` after a source says under which system prompt it was trained.
    Returns the adapters, and a sentence for each one refused: one bad adapter does not keep the others from serving.
    """
    entries = [_read_setting(entry) for entry in re.split(r",(?!\s*prompt=)", os.environ.get("ADAPTERS", ""))]
    sources = [entry for entry in entries if entry[1]]
    folders = [folder for folder in sorted(root.glob("*")) if folder.suffix != PART and _is_for(checkpoint, folder)]
    sources += [(name_of(folder.name), str(folder), None) for folder in folders]
    opened: dict[str, Adapter] = {}
    refused = []
    for name, source, prompt in sources:
        try:
            if name in opened:
                raise ValueError(f"Two adapters are called {name}; {source} is left out. Rename one.")
            opened[name] = adapter = Adapter.open(_folder(source), checkpoint, name, prompt)
        except (ValueError, OSError) as error:
            refused.append(_sentence(error))
            continue
        if "prompt" in adapter.unstated:
            log.info("%s does not state the prompt it was trained under; it is taken to be ours. If you know it, write "
                     "%s=%s;prompt=TEXT in ADAPTERS.", name, name, source)  # fmt: skip
        if "base" in adapter.unstated:
            stated = read_json(adapter.folder / CONFIG).get("base_model_name_or_path")
            log.info("%s states %s as its base; by its dimensions it is for %s.", name, stated, checkpoint.base.name)
    return list(opened.values()), refused


def _read_setting(entry: str) -> tuple[str, str, str | None]:
    """An entry of ADAPTERS as name, source and prompt; the source is empty in an empty entry."""
    parts = SETTING.fullmatch(entry.strip())
    assert parts  # each of its groups may be empty
    name, source, prompt = parts.group("name", "source", "prompt")
    if name and Path(f"{name}={source}").is_dir():
        name, source = "", f"{name}={source}"  # a folder with = in its name
    source = source.strip()
    return (name or "").strip() or name_of(source.partition("@")[0]), source, prompt


def _sentence(error: ValueError | OSError) -> str:
    """What an error says, in one line; an OSError of the system's own has a file and a reason instead."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be read ({error.strerror}). Check what it is and who may read it."
    return " ".join(str(error).split())  # names in a file of others may hold line breaks


def _is_for(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether a folder is an adapter for this base, or for none, or cannot be read: the gate says why."""
    folder = last_checkpoint(folder)
    try:
        if not (folder / CONFIG).exists():
            return False
        stated = read_json(folder / CONFIG).get("base_model_name_or_path")
        if isinstance(stated, str) and (same_model(stated, checkpoint.base.name) or _names_model(stated, folder)):
            return same_model(stated, checkpoint.base.name)
        misfit = _misfits(_shapes(folder / WEIGHTS), _read_config(folder), checkpoint.config())
        return not misfit or not fitting_bases(folder)
    except (ValueError, OSError):
        return True


def last_checkpoint(folder: Path) -> Path:
    """The folder itself, or the last of Trainer's checkpoints in it where it holds no adapter of its own."""
    if (folder / CONFIG).exists():
        return folder
    steps = [path.parent for path in folder.glob(f"checkpoint-*/{CONFIG}") if path.parent.name[11:].isdecimal()]
    return max(steps, key=lambda step: int(step.name[11:]), default=folder)


def same_model(stated: str, base: str) -> bool:
    """Whether two ids or paths of a model end in the same name, as far as ModelScope and quantised copies write it."""
    return _model_name(stated) == _model_name(base)


def _model_name(stated: str) -> str:
    name = re.split(r"[/\\]", stated.rstrip("/\\"))[-1].lower().replace("___", ".")  # ModelScope's folders have no dot
    return COPY.sub("", name)


def _names_model(stated: str, folder: Path) -> bool:
    """Whether what a config states as its base is an id, USER/NAME or the name our training gives, and not a path."""
    ours = "/" not in stated and (folder / RECIPE).exists()
    return bool(stated) and (ours or bool(HUB_ID.fullmatch(stated) and not stated.startswith((".", "~"))))


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
        raise ValueError(
            f"An adapter cannot be called {name!r}. Use letters, digits, - and _, and not {BASE_ONLY!r}; in ADAPTERS, "
            "NAME=SOURCE gives it another name."
        )
    return name


def name_of(source: str) -> str:
    """The name that an adapter gets from a folder or repository: its last part; what no name may hold becomes -."""
    return re.sub(r"[^\w-]", "-", Path(source).name)[:MAX_NAME]


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Train an adapter with `python -m training.run`.")
    names = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
    if pickled := [name for name in names if not TRAINER_STATE.fullmatch(name)]:
        raise ValueError(f"{folder} holds {pickled[0]}, which can run code. Keep safetensors only: delete it.")
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no adapter: {path.name} is missing. Copy it whole, or train again.")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path} is a pointer of git-lfs, not the file. Run `git lfs pull` in {folder}.")
    if (size := (folder / WEIGHTS).stat().st_size) > MAX_BYTES:
        raise ValueError(f"{folder / WEIGHTS} has {size:,} bytes, more than a LoRA needs. Check where it is from.")


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA that can be served. Raises ValueError, naming file and field."""
    path = folder / CONFIG
    config = read_json(path)
    for name, types in FIELDS.items():
        if (value := config.get(name)) is not None and type(value) not in types:
            wanted = TYPES.get(types, "an object")
            raise ValueError(f"{path} has {name} {value!r:.60}; it must be {wanted}. Copy the folder again.")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: the peft_type {config.get('peft_type')} is not a LoRA. Train a LoRA.")
    rank = config.get("r")
    if rank is None or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{path} has rank {rank!r}; 1 to {MAX_RANK} can be served. Train with a smaller --rank.")
    if pattern := [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]:
        raise ValueError(f"{path} has a rank per layer ({pattern[0]}); only one can be served. Train with one --rank.")
    # Each PEFT writes the options that it knows; None, False and what is empty leave one off.
    more = [name for name, value in config.items() if name not in FIELDS and not _is_off(value)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += ["init_lora_weights"] if config.get("init_lora_weights") not in SAFE_INIT else []
    if more:
        raise ValueError(f"{path} is not a LoRA alone: it sets {more[0]:.60}. Train one with `python -m training.run`.")
    for name, low, high in (("lora_alpha", MIN_ALPHA, MAX_ALPHA), ("lora_dropout", 0, 1)):
        if not low <= (value := config.get(name) or 0) <= high:
            raise ValueError(f"{path} has {name} {value!r}; it may be {low} to {high}. Copy the folder again.")
    modules = config.get("target_modules")
    if not modules or not all(isinstance(name, str) and name.rpartition(".")[2] in LAYERS for name in modules):
        raise ValueError(f"{path} adapts {modules!r:.200}, its target_modules; {', '.join(LAYERS)} can be served. "
                         "Train with those.")  # fmt: skip
    return config


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _check_base(folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether a config names this base; a path tells nothing, then the dimensions do. Raises ValueError for another."""
    stated, base = config.get("base_model_name_or_path") or "", checkpoint.base.name
    if same := same_model(stated, base):
        return same
    if _names_model(stated, folder):
        raise ValueError(
            f"{folder} was trained on {stated}, this base is {base}. Choose that base; if it is a copy of this one, "
            f"write {base} as base_model_name_or_path in {CONFIG}."
        )
    return False


def _check_weights(path: Path, lora: dict[str, Any], base: dict[str, Any]) -> None:
    if misfit := _misfits(_shapes(path), lora, base):
        fitting = fitting_bases(path.parent)
        advice = f"Choose its own base, {' or '.join(fitting)}." if fitting else "Choose its own base."
        raise ValueError(f"{path}{misfit}. {advice}")
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    for name, tensor in tensors.items():
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is {tensor['dtype']}; it must be one of {', '.join(DTYPES)}. Save it so.")
        if not np.isfinite(to_numpy(tensor)).all():
            raise ValueError(f"{path}: {name} is not finite. Train it again with a lower --learning-rate.")
    expected = _expected_shapes(lora["r"], base, bool(lora.get("use_dora")), lora["target_modules"])
    if left_out := sorted(tensors.keys() - expected):
        raise ValueError(f"{path} holds {left_out[0]}, but target_modules in {CONFIG} lacks it. Copy the folder again.")
    if lacking := sorted(expected.keys() - tensors):
        raise ValueError(f"{path} lacks {lacking[0]}, of a layer that it adapts. Copy the folder again.")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its head alone. Raises ValueError for another file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy the folder again.") from error
    if not shapes:
        raise ValueError(f"{path} holds no tensor. Train it again.")
    return shapes


def _misfits(shapes: dict[str, tuple[int, ...]], lora: dict[str, Any], base: dict[str, Any]) -> str:
    """What keeps tensors of such shapes off a base, as the end of a sentence; empty when nothing does."""
    expected = _expected_shapes(lora["r"], base, bool(lora.get("use_dora")))
    for name, shape in shapes.items():
        if name not in expected:
            return f" holds {name}, a layer that this base does not have"
        if shape != (fit := expected[name]):
            return f": {name} has shape {shape}, a rank (r) of {lora['r']} on this base needs {fit}"
    return ""


def fitting_bases(folder: Path) -> list[str]:
    """Our names of the bases that an adapter has the dimensions of. Raises OSError or ValueError."""
    shapes, config = _shapes(folder / WEIGHTS), _read_config(folder)
    return [name for name, base in BASES.items() if not _misfits(shapes, config, base.dimensions)]


def to_numpy(tensor: dict[str, Any]) -> np.ndarray:
    """A tensor as safetensors reads it, of one of DTYPES, as an array; bf16 becomes fp32."""
    array: np.ndarray = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return (array.astype(np.uint32) << 16).view(np.float32) if tensor["dtype"] == "BF16" else array


def _expected_shapes(
    rank: int, config: dict[str, Any], dora: bool, targets: Collection[str] = LAYERS
) -> dict[str, tuple[int, ...]]:
    """The tensors of a LoRA on those layers of a Qwen2: lora_A (rank, in), lora_B (out, rank), DoRA's magnitude (out,).

    A target is the name of a layer, or its last parts, as PEFT takes it.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    q, kv = head * heads, head * config.get("num_key_value_heads", heads)
    sizes = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (into, out) in sizes.items():
            name = f"model.layers.{layer}.{module}"
            parts = name.split(".")
            if not any(".".join(parts[n:]) in targets for n in range(len(parts))):
                continue
            stem = f"base_model.model.{name}"
            shapes[f"{stem}.lora_A.weight"] = (rank, into)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
            shapes |= {f"{stem}.lora_magnitude_vector": (out,)} if dora else {}
    return shapes
