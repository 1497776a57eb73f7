"""An adapter for other programs: as GGUF LoRA with a Modelfile for Ollama, or merged with its base into one model.

python -m training.export adapters/pocket --gguf pocket.gguf
python -m training.export adapters/pocket --merged pocket-merged
"""

import json
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chat import gguf_lora
from chat.adapter import CONFIG, PART, Adapter
from chat.base import BASES, Base, Located, locate
from chat.engine import Sampling
from chat.persona import SYSTEM_PROMPT

MODELFILE = "Modelfile"
STOPS = ("<|im_end|>", "<|endoftext|>")
# ChatML as Qwen2.5's own template writes it, in Go's template language.
TEMPLATE = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
NEXT = """{file} and {modelfile} are written. BASE.gguf is {base}

llama.cpp   llama-server -m BASE.gguf --lora {file} --cache-ram 0
            Its prompt cache in RAM does not tell LoRAs apart, and would answer one with the keys and values of
            another: hence --cache-ram 0. Send the system prompt with each chat: {system}
Ollama      ollama create zhenhuan -f {modelfile}
            Let FROM in it point to BASE.gguf first; system prompt and sampling stand in it.
LM Studio   opens whole models only: llama-export-lora -m BASE.gguf --lora {file} -o zhenhuan.gguf
            and lms import zhenhuan.gguf. Set the system prompt there.
"""


def write_gguf(adapter: Adapter, base: Base, path: Path) -> Path:
    """Write an adapter as GGUF LoRA, and a Modelfile beside it, whose path is returned.

    Raises FileExistsError, or ValueError for a DoRA or a name that does not end in .gguf.
    """
    if adapter.dora:
        raise ValueError(
            f"{adapter.name} is a DoRA, which llama.cpp does not know. Merge it with its base by --merged FOLDER."
        )
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf. Name such a file.")
    recipe = path.with_name(MODELFILE)
    _require_free(path, recipe)
    gguf_lora.write(adapter, path)
    part = recipe.with_name(MODELFILE + PART)
    part.write_text(modelfile(path.name, base), encoding="utf-8")
    os.replace(part, recipe)
    return recipe


def _require_free(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists already. Delete it, or name another place.")


def modelfile(lora: str, base: Base) -> str:
    """The text of a Modelfile: a base and its LoRA with her system prompt, the template, our sampling."""
    usual = Sampling()
    drawn = {
        "temperature": usual.temperature, "top_k": usual.top_k, "top_p": usual.top_p, "min_p": 0,
        "repeat_penalty": usual.repetition_penalty, "repeat_last_n": -1,
    }  # fmt: skip
    lines = [
        f"# FROM must point to the base's GGUF on your disk: {origin(base)}",
        f"FROM ./{gguf_name(base)}",
        f"ADAPTER ./{lora}",
        f'SYSTEM """{SYSTEM_PROMPT}"""',
        f'TEMPLATE """{TEMPLATE}"""',
        *(f"PARAMETER {name} {value}" for name, value in drawn.items()),
        *(f'PARAMETER stop "{token}"' for token in STOPS),
    ]
    return "\n".join(lines) + "\n"


def origin(base: Base) -> str:
    """Where the GGUF of a base comes from, in words."""
    if not base.gguf.files:
        return f"what llama.cpp's convert_hf_to_gguf.py makes of {base.name}."
    first, *more = (file.name for file in base.gguf.files)
    join = f" `llama-gguf-split --merge {first} {gguf_name(base)}` joins its {len(more) + 1} parts." if more else ""
    return f"{first} of https://huggingface.co/{base.gguf.repo}.{join}"


def gguf_name(base: Base) -> str:
    """The name of a base's GGUF as one file."""
    return re.sub(r"-00001-of-\d+", "", base.gguf.files[0].name) if base.gguf.files else "BASE.gguf"


def write_merged(adapter: Adapter, located: Located, folder: Path) -> None:
    """Write base and adapter as one model in bf16, for transformers from 4.45 on: the folder is there when it is whole.

    They are added up in fp32, four bytes a parameter, and rounded once. Raises OSError or Unavailable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", ignore_cleanup_errors=True) as part:
        _save_merged(adapter, located, whole := Path(part) / "whole")
        os.replace(whole, folder)


def _save_merged(adapter: Adapter, located: Located, folder: Path) -> None:
    import torch
    from peft import PeftModel

    from chat import local
    from chat.fetch import require_room

    tokenizer = local.load_tokenizer(located)
    adapted = PeftModel.from_pretrained(local.load_base(located, "cpu").float(), str(adapter.folder))
    model: Any = adapted.merge_and_unload().to(torch.bfloat16)
    folder.mkdir()
    require_room(folder, 2 * model.num_parameters())
    local.save_base(model, tokenizer, folder)


def main() -> None:
    """Write an adapter for other programs, and say what to do next."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m training.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="adapters/NAME")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF LoRA; a Modelfile is written beside it")
    kind.add_argument("--merged", type=Path, metavar="FOLDER", help="base and adapter as one model, in safetensors")
    parser.add_argument("--base", help="the base's name or folder; by default the one that the adapter names")
    chosen = parser.parse_args()
    try:
        choice = chosen.base or _named(chosen.folder)
        if chosen.merged:
            _merge(chosen.folder, choice, chosen.merged)
        else:
            _convert(chosen.folder, choice, chosen.gguf)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


def _convert(folder: Path, choice: str, path: Path) -> None:
    """No weight of a named base is needed: its dimensions are known."""
    base = BASES.get(choice)
    located = Located(base, Path(base.gguf.files[0].name), "") if base else locate(choice)
    written = write_gguf(Adapter.open(folder, located), located.base, path)
    print(NEXT.format(file=path, modelfile=written, base=origin(located.base), system=SYSTEM_PROMPT))


def _merge(folder: Path, choice: str, merged: Path) -> None:
    if not find_spec("torch"):
        raise ValueError(
            "--merged adds tensors up with torch, which is not installed here. Install it, "
            "`.venv/bin/pip install -c constraints.txt -r requirements.txt`, and start again."
        )
    from chat import local

    _require_free(merged)  # before a base is fetched
    located = local.dense(locate(choice))
    write_merged(Adapter.open(folder, located), located, merged)
    print(f"{merged} is a whole model: serve it under the system prompt {SYSTEM_PROMPT}")


def _named(folder: Path) -> str:
    """The base that an adapter's config names, by our name of it. Raises FileNotFoundError or ValueError."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter: {CONFIG} is missing. Name a folder that training.run wrote.")
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} names no base ({error}). Copy the folder again.") from error
    for choice, base in BASES.items():
        if base.name == name:
            return choice
    raise ValueError(f"{folder} was trained on {name}, a base of your own. Give its folder with --base.")


if __name__ == "__main__":
    main()
