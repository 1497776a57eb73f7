"""A PEFT LoRA as a GGUF LoRA: what llama.cpp, and with it Ollama, opens beside the base's GGUF."""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import safetensors

from chat.adapter import CONFIG, WEIGHTS, Adapter
from chat.base import cache
from chat.fetch import digest

# llama.cpp's names of the layers that PEFT adapts (gguf-py, tensor_mapping.py).
LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
NO_DORA = "{name} is a DoRA, which llama.cpp does not know. Serve it with --engine transformers."
FORMAT = 2  # counted up when the same weights would be written otherwise, so that no old file is taken


def cached(adapter: Adapter) -> Path:
    """The adapter's GGUF LoRA in our cache, written at first; its name is the digest of what it was made from."""
    known = f"{digest(adapter.folder / WEIGHTS)[:16]}-{digest(adapter.folder / CONFIG)[:8]}"
    path = cache() / "gguf" / f"lora-{known}-{FORMAT}.gguf"
    if not path.exists():
        write(adapter, path)
    return path


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter that the gate let through; the file is there when it is whole.

    A of shape (rank, in) and B (out, rank), in fp16, which has all digits of bf16 but below 6e-5; fp32 costs 4 % of the
    speed. llama.cpp scales by alpha over rank and knows no rsLoRA: the root of the rank is folded into alpha. Raises
    ValueError for a DoRA.
    """
    import gguf

    if adapter.dora:
        raise ValueError(NO_DORA.format(name=adapter.name))
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of each file that it writes
    config = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_name(adapter.name)
    writer.add_float32(
        "adapter.lora.alpha", config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    )
    try:
        for name, tensor in safetensors.deserialize((adapter.folder / WEIGHTS).read_bytes()):
            # base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight
            *_, layer, block, module, half, _ = name.split(".")
            writer.add_tensor(f"blk.{layer}.{LAYERS[f'{block}.{module}']}.weight.{half.lower()}", _fp16(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fp16(tensor: dict[str, object]) -> np.ndarray:
    """A safetensors tensor as numpy, infinite where fp16 ends. numpy knows no bfloat16, the upper half of an fp32."""
    data, shape = tensor["data"], tensor["shape"]
    if tensor["dtype"] == "BF16":
        flat = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)  # type: ignore[call-overload]
    else:
        flat = np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[str(tensor["dtype"])])  # type: ignore[call-overload]
    with np.errstate(over="ignore"):  # the engine refuses an adapter whose logits are not finite
        return flat.astype(np.float16).reshape(shape)  # type: ignore[arg-type,no-any-return]
