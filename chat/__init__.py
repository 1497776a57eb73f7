"""What serving and training share: the character, the prompt, the bases, the adapters, the engines."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chat.engine import ChatEngine


# Before torch is imported: its threads wait for one another by spinning for milliseconds, and where another program
# has a core, the one that is waited for cannot run meanwhile; ten times slower replies. After 1,000 turns they sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load(base: str | None = None, bits: int = 16) -> "ChatEngine":
    """The engine that ENGINE_URL names, else the one of this machine. Raises what `connect` or `load` raises there."""
    if os.environ.get("ENGINE_URL"):
        if bits != 16:
            raise ValueError("ENGINE_URL names an engine that chose the bits of its weights itself. Leave --bits out.")
        from chat.remote import connect

        return connect()
    from chat import local  # here, so that --help and the page's tests need no torch

    return local.load(base, bits)
