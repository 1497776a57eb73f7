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


def require_supported(config: Any, adapters: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a base (its config) or an adapter (PEFT's LoraConfig, by name) computed wrongly here."""
    if getattr(config, "quantization_config", None):
        raise RuntimeError("our Qwen2 multiplies weights of 16 bits, and this base has fewer")
    plain = config.model_type == "qwen2" and config.hidden_act == "silu"
    plain = plain and set(config.layer_types) == {"full_attention"}
    if not plain or config.rope_parameters["rope_type"] != "default":
        raise RuntimeError(f"our Qwen2 has full attention and plain rotary positions, not as this {config.model_type}")
    for name, lora in adapters.items():
        if lora.use_dora:
            raise RuntimeError(f"our Qwen2 knows no DoRA, and {name} is one")
