"""What publishing to the Hub, to ModelScope and as a Space share: the search for secrets, a tag, a cause in a line."""

import re
from pathlib import Path

from chat.adapter import WEIGHTS, Adapter
from chat.download import digest

# Tokens of the Hub, ModelScope and other services, private keys, and paths that name a person's home.
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|ms-[0-9a-f]{8}-[0-9a-f]{4}-|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|(?:/home|/Users|/root|C:\\Users)[/\\][\w.-]+"
)
BINARY = (".safetensors", ".png")


def require_no_secret(*paths: Path) -> None:
    """Refuse texts that hold a token, a key or somebody's home path. Raises ValueError naming file and line.

    The find itself is not repeated: the message may end in a log.
    """
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix not in BINARY and path.exists() else []
        for number, line in enumerate(lines, start=1):
            if SECRETS.search(line):
                raise ValueError(
                    f"{path}, line {number}, holds what looks like a token, a key or a home folder. Nothing was "
                    "uploaded. Remove it there (give paths relative to where you are), and push again."
                )


def version_tag(adapter: Adapter) -> str:
    """The tag of a published adapter: its name, and the first digits of its weights' sha256."""
    return f"{adapter.name}-{digest(adapter.folder / WEIGHTS)[:8]}"


def reason(error: BaseException) -> str:
    """What went wrong in a line, from the deepest cause: the client wraps what the server said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__
