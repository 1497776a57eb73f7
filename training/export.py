"""An adapter for other programs: as GGUF LoRA with a Modelfile for Ollama, or merged with its base into one model.

python -m training.export adapters/pocket --gguf pocket.gguf
python -m training.export adapters/pocket --merged pocket-merged
"""

import argparse
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chat import gguf_lora
from chat.adapter import CONFIG, PART, Adapter, fitting_bases, last_checkpoint
from chat.bases import BASES, Base
from chat.checkpoints import Checkpoint, locate, read_json
from chat.download import require_room
from chat.persona import SYSTEM_PROMPT
from chat.sampling import Sampling

MODELFILE = "Modelfile"
# ChatML as Qwen2.5's own template writes it, in Go's template language.
TEMPLATE = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
NEXT_STEPS = """{file} and {modelfile} are written. BASE.gguf is {base}

llama.cpp   llama-server -m BASE.gguf --lora {file} --cache-ram 0
            Its prompt cache in RAM does not tell LoRAs apart, and would answer one with the keys and values of
            another: hence --cache-ram 0. Send the system prompt with each chat: {system}
Ollama      ollama create zhenhuan -f {modelfile}
            Let FROM in it point to BASE.gguf first; system prompt and sampling stand in it.
LM Studio   opens whole models only: llama-export-lora -m BASE.gguf --lora {file} -o zhenhuan.gguf
            and lms import zhenhuan.gguf. Set the system prompt there.
"""


def main() -> None:
    """Write an adapter for other programs, and say what to do next."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="adapters/NAME")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF LoRA; a Modelfile is written beside it")
    kind.add_argument("--merged", type=Path, metavar="FOLDER", help="base and adapter as one model, in safetensors")
    parser.add_argument("--base", help="the base's name or folder; by default the one that the adapter names")
    arguments = parser.parse_args()
    try:
        base = arguments.base or base_of(arguments.folder)
        for path in [arguments.merged] if arguments.merged else [arguments.gguf, arguments.gguf.with_name(MODELFILE)]:
            if path.exists():
                raise FileExistsError(f"{path} exists already. Delete it, or name another path.")
        if arguments.merged:
            write_merged(arguments.folder, base, arguments.merged)
            print(f"{arguments.merged} is a whole model: serve it under the system prompt {SYSTEM_PROMPT}")
        else:
            print(write_gguf(arguments.folder, base, arguments.gguf))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


def base_of(folder: Path) -> str:
    """Our name of the base that an adapter's config names. Raises FileNotFoundError or ValueError."""
    folder = last_checkpoint(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter: {CONFIG} is missing. Name a folder that training.run wrote.")
    name = read_json(path).get("base_model_name_or_path")
    if choice := next((choice for choice, base in BASES.items() if base.name == name), ""):
        return choice
    if not (choice := next(iter(fitting_bases(folder)), "")):
        raise ValueError(f"{folder} was trained on {name}, a base of your own. Give its folder with --base.")
    return choice


def write_gguf(folder: Path, choice: str, path: Path) -> str:
    """Write an adapter as GGUF LoRA, and a Modelfile beside it; return what to do with them.

    No weight of a named base is needed, as its dimensions are known. Raises ValueError for a DoRA or a name that
    does not end in .gguf.
    """
    base = BASES.get(choice)
    checkpoint = Checkpoint(base, Path(base.gguf.files[0].name), "") if base else locate(choice)
    adapter = Adapter.open(folder, checkpoint)
    if adapter.dora:
        raise ValueError(f"{adapter.name} is a DoRA, which llama.cpp does not know. Merge it by --merged FOLDER.")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf. Name such a file.")
    gguf_lora.write(adapter, path)
    beside = path.with_name(MODELFILE)
    part = beside.with_name(MODELFILE + PART)
    part.write_text(modelfile(path.name, checkpoint.base), encoding="utf-8")
    os.replace(part, beside)
    return NEXT_STEPS.format(file=path, modelfile=beside, base=_gguf_of(checkpoint.base)[1], system=SYSTEM_PROMPT)


def modelfile(lora: str, base: Base) -> str:
    """Ollama's Modelfile: a base and its LoRA with her system prompt, the template, our sampling."""
    (file, origin), sampling = _gguf_of(base), Sampling(temperature=base.temperature)
    return f'''# FROM must point to the base's GGUF on your disk: {origin}
FROM ./{file}
ADAPTER ./{lora}
SYSTEM """{SYSTEM_PROMPT}"""
TEMPLATE """{TEMPLATE}"""
PARAMETER temperature {sampling.temperature}
PARAMETER top_k {sampling.top_k}
PARAMETER top_p {sampling.top_p}
PARAMETER min_p 0
PARAMETER repeat_penalty {sampling.repetition_penalty}
PARAMETER repeat_last_n -1
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
'''


def _gguf_of(base: Base) -> tuple[str, str]:
    """The name of a base's GGUF as one file, and in words where it comes from."""
    if not base.gguf.files:
        return "BASE.gguf", f"what llama.cpp's convert_hf_to_gguf.py makes of {base.name}."
    first, *more = (file.name for file in base.gguf.files)
    name = re.sub(r"-00001-of-\d+", "", first)
    join = f" `llama-gguf-split --merge {first} {name}` joins its {len(more) + 1} parts." if more else ""
    return name, f"{first} of https://huggingface.co/{base.gguf.repo}.{join}"


def write_merged(folder: Path, choice: str, merged: Path) -> None:
    """Write base and adapter as one model in bf16, for transformers from 4.45 on; only a whole folder gets the name.

    They are added up in fp32, four bytes a parameter, and rounded once. Raises OSError, ValueError or Unavailable.
    """
    if not find_spec("torch"):
        raise ValueError(
            "--merged adds tensors up with torch, which is not installed here. Install it, "
            "`.venv/bin/pip install -c constraints.txt -r requirements.txt`, and start again."
        )
    import torch

    from chat import base_model, convert

    checkpoint = convert.ensure_converted(locate(choice))
    adapter = Adapter.open(folder, checkpoint)
    adapted: Any = base_model.add_adapter(base_model.load_base(checkpoint, "cpu").float(), adapter, in_fp32=True)
    model: Any = adapted.merge_and_unload().to(torch.bfloat16)
    merged.parent.mkdir(parents=True, exist_ok=True)
    require_room(merged.parent, 2 * model.num_parameters())
    with tempfile.TemporaryDirectory(dir=merged.parent, prefix=f"{merged.name}.", ignore_cleanup_errors=True) as part:
        convert.save_base(model, base_model.load_tokenizer(checkpoint), Path(part) / "whole")
        os.replace(Path(part) / "whole", merged)


if __name__ == "__main__":
    main()
