"""What serving and training share: the character, the prompt, the bases, the adapters, the engines."""

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chat.engine import ChatEngine

log = logging.getLogger(__name__)
ENGINES = ("llama", "transformers")  # that run in this process
INSTALL = (
    ", or install it, `.venv/bin/pip install -c constraints.txt xllamacpp`: it has wheels for Linux (glibc), macOS 13 "
    "and later, and Windows on x86-64"
)

# Before torch or llama.cpp is imported: OpenMP's threads wait for one another by spinning for milliseconds, and where
# another program has a core, the one that is waited for cannot run meanwhile; ten times slower replies. After 1,000
# messages they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(base: str | None = None, bits: int = 16, engine: str | None = None) -> "ChatEngine":
    """The engine that ENGINE_URL names, else the one of this machine. Raises Unavailable or ValueError."""
    if not os.environ.get("ENGINE_URL"):
        return load_here(base, bits, engine)
    if bits != 16:
        raise ValueError("ENGINE_URL names an engine that chose the bits of its weights itself. Leave --bits out.")
    if engine:
        raise ValueError(f"ENGINE_URL names an engine on another machine. Unset it, or leave --engine {engine} out.")
    from chat.remote import connect

    return connect(load_here)


def load_here(base: str | None = None, bits: int = 16, engine: str | None = None) -> "ChatEngine":
    """The engine of this machine: transformers with a GPU or for what llama.cpp cannot, else llama.cpp, or as named.

    Raises Unavailable or ValueError, with what to do.
    """
    from chat.checkpoints import is_folder
    from chat.machine import has_gpu

    why = (
        "--base or MODEL_FOLDER names a folder, which llama.cpp cannot open" if is_folder(base)
        else f"--bits {bits} is done by bitsandbytes" if bits != 16
        else "xllamacpp, which brings llama.cpp, is not installed" if not find_spec("xllamacpp")
        else ""
    )  # fmt: skip
    install = INSTALL if "xllamacpp" in why else ""
    if engine == "llama" and why:
        raise ValueError(f"{why}. Leave --engine llama out{install}.")
    if engine == "llama" or not (engine or why or has_gpu()):
        from chat import llama

        return llama.load(base)
    if not find_spec("torch"):
        raise ValueError(
            f"{why or 'You named it'}: this takes transformers and torch, which are not installed here. "
            "Install them, `.venv/bin/pip install -c constraints.txt -r requirements.txt`, and start again."
        )
    if why and not (engine or has_gpu()):
        log.warning("transformers answers: %s%s.", why, install)
    from chat import local  # here, so that --help and the page's tests need no torch

    return local.load(base, bits)
