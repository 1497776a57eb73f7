"""A PEFT LoRA as a GGUF LoRA: what llama.cpp, and with it Ollama, opens beside the base's GGUF."""

import logging
import os
from pathlib import Path

import numpy as np
import safetensors

from chat.adapter import CONFIG, WEIGHTS, Adapter, to_numpy
from chat.download import cache, digest

# llama.cpp's names of the layers that PEFT adapts (gguf-py, tensor_mapping.py).
LAYERS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
NO_DORA = "{name} is a DoRA, which llama.cpp does not know. Serve it with --engine transformers."
FORMAT = 2  # raised whenever the same weights are written in another way, so that no older file in a cache is used


def cached(adapter: Adapter) -> Path:
    """The path of the adapter's GGUF LoRA in our cache, named by the digest of its weights and config; written once."""
    source = f"{digest(adapter.folder / WEIGHTS)[:16]}-{digest(adapter.folder / CONFIG)[:8]}"
    path = cache() / "gguf" / f"lora-{source}-{FORMAT}.gguf"
    if not path.exists():
        write(adapter, path)
    return path


def write(adapter: Adapter, path: Path) -> None:
    """Write a checked adapter as a GGUF LoRA; only a whole file gets the name `path`.

    lora_a has shape (rank, in), lora_b (out, rank), both in fp16: it keeps every digit of a bf16 above 6e-5, and fp32
    costs 4 % of the speed. llama.cpp scales by alpha / rank and knows no rsLoRA, so `Adapter.alpha` is written. Raises
    ValueError for a DoRA.
    """
    import gguf

    if adapter.dora:
        raise ValueError(NO_DORA.format(name=adapter.name))
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it reports each file that it writes
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_name(adapter.name)
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    try:
        for name, tensor in safetensors.deserialize((adapter.folder / WEIGHTS).read_bytes()):
            # base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight
            *_, layer, _, module, matrix, _ = name.split(".")
            with np.errstate(over="ignore"):  # the engine refuses an adapter whose logits are not finite
                half = to_numpy(tensor).astype(np.float16)
            writer.add_tensor(f"blk.{layer}.{LAYERS[module]}.weight.{matrix.lower()}", half)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
