"""What the code in qwen2/ can compute: one guard for decoder, training step and their callers."""

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MAX_TRAINING_RANK = 32  # tiles of more do not fit a GPU's shared memory
CAN_TRAIN = f"all seven layers of a base in 16 bits, up to rank {MAX_TRAINING_RANK}, without DoRA"


def gpu_supported() -> bool:
    """Whether this machine's GPU runs the kernels: they need Triton, which multiplies bf16 from Ampere on."""
    import torch

    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ampere and find_spec("triton") is not None


def can_train(target_modules: Collection[str], rank: int, use_dora: bool, bits: int) -> bool:
    """Whether the training step computes such a LoRA; CAN_TRAIN says it in words."""
    return set(target_modules) == LAYERS and rank <= MAX_TRAINING_RANK and not use_dora and bits == 16


def unsupported(config: Any) -> str:
    """What in a base's config is computed in another way here, as a clause; empty when nothing is.

    These are all the fields of transformers' Qwen2Config that decide what its model computes and may be set otherwise.
    """
    if config.model_type != "qwen2":
        return f"our Qwen2 is no {config.model_type}"
    known = {
        "hidden_act": config.hidden_act == "silu",
        "layer_types": set(config.layer_types) == {"full_attention"},  # no sliding windows
        "rope_parameters": config.rope_parameters["rope_type"] == "default",  # no scaling
        "attention_dropout": not config.attention_dropout,
    }
    others = [f"{name} {getattr(config, name)!r:.80}" for name, same in known.items() if not same]
    return f"our Qwen2 computes it otherwise than this base's {', '.join(others)} says" if others else ""


def require_supported(config: Any, adapters: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a base (its config) or an adapter (PEFT's LoraConfig, by name) computed wrongly here."""
    if getattr(config, "quantization_config", None):
        raise RuntimeError("our Qwen2 multiplies weights of 16 bits, and this base has fewer")
    if reason := unsupported(config):
        raise RuntimeError(reason)
    for name, lora in adapters.items():
        if lora.use_dora:
            raise RuntimeError(f"our Qwen2 knows no DoRA, and {name} is one")
