"""A GGUF base as a folder that transformers opens: converted once, under a lock, and checked at each opening."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from chat.base_model import ends
from chat.bases import SAMPLING
from chat.checkpoints import CONFIG, Checkpoint, converted_folder, read_json, verified_source, write_manifest
from chat.files import whole

log = logging.getLogger(__name__)


def ensure_converted(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a folder: a GGUF, which takes a minute to read, is converted to dense bf16 in our cache, once.

    Raises Unavailable when the GGUF is damaged.
    """
    if checkpoint.path.is_dir():
        return checkpoint
    folder = converted_folder(checkpoint.base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not verified_source(folder):
            checkpoint.verify()
            _convert(checkpoint, folder)
    return replace(checkpoint, path=folder)


def _convert(checkpoint: Checkpoint, folder: Path) -> None:
    """The file holds the tied embedding twice: `output.weight` is the finer one (8 bits), so it is kept for both."""
    log.info("Converting %s once; about a minute.", checkpoint.path.name)
    source, file = str(checkpoint.path.parent), checkpoint.path.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.tie_word_embeddings = True
    model.model.embed_tokens.weight = model.lm_head.weight
    with whole(folder) as part:
        save_base(model, tokenizer, part)
        write_manifest(part, checkpoint.source)


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model, its tokenizer and our sampling as a folder that transformers opens, from 4.45 on."""
    model.generation_config = GenerationConfig(
        **SAMPLING, do_sample=True, eos_token_id=ends(tokenizer), pad_token_id=ends(tokenizer)[1]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # older programs look for the template in the JSON
    config = read_json(folder / CONFIG)
    # transformers 4 reads rope_theta here alone, and silently takes 10,000 where it is missing.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
