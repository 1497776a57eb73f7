"""Publish an adapter to the Hub: the permission is asked for first, and only the contract's files go up.

python -m training.hub adapters/pocket USER/NAME [--private] [--pr] [--modelscope]
"""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat.adapter import FILES, RECIPE, WEIGHTS, Adapter
from chat.base import locate
from chat.fetch import digest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Tokens of the Hub, ModelScope and other services, private keys, and paths that name a person's home.
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|ms-[0-9a-f]{8}-[0-9a-f]{4}-|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|(?:/home|/Users|/root|C:\\Users)[/\\][\w.-]+"
)

BINARY = (".safetensors", ".png")


def require_permission(repo: str, api: "HfApi", pr: bool = False, repo_type: str = "model", **creation: Any) -> None:
    """Make sure, before a run spends its hours, that the repository exists and may be written.

    A pull request needs a repository that is there and can be read; else it is created, if it is missing, with what
    `creation` says. The token is the one `hf auth login` or HF_TOKEN gives to huggingface_hub; it passes through no
    variable of ours. Raises PermissionError, or ConnectionError when the Hub does not answer.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        if not pr:
            api.create_repo(repo, repo_type=repo_type, exist_ok=True, **creation)
        api.auth_check(repo, repo_type=repo_type, write=not pr)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise PermissionError(
            f"{repo} cannot be written ({reason(error)}). Log in with `hf auth login` and a token that may write, "
            "and check the name."
        ) from error
    except httpx2.HTTPError as error:
        raise ConnectionError(
            f"The Hub does not say whether {repo} may be written ({reason(error)}). Check the network, and try again."
        ) from error


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


def push(adapter: Adapter, repo: str, api: "HfApi", pr: bool = False) -> str:
    """Upload the contract's files, tag the commit, and return its address.

    Safe to repeat: what lies there already is not sent again, and one adapter has one tag. Raises ValueError for a
    secret, ConnectionError when the Hub does not take it all.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    require_no_secret(*(adapter.folder / name for name in FILES))
    try:
        done = api.upload_folder(
            repo_id=repo,
            folder_path=adapter.folder,
            allow_patterns=list(FILES),
            commit_message=f"{adapter.name}: {adapter.metrics.get('steps')} steps",
            create_pr=pr,
        )
        if not pr:
            api.create_tag(repo, tag=tag(adapter), revision=done.oid, exist_ok=True)
    except (HfHubHTTPError, httpx2.HTTPError, RuntimeError) as error:
        raise ConnectionError(
            f"{repo} did not take the whole of {adapter.name} ({reason(error)}). Nothing is lost: "
            f"{adapter.folder} is whole, and `python -m training.hub {adapter.folder} {repo}` goes on from here."
        ) from error
    return (pr and done.pr_url) or done.commit_url


def tag(adapter: Adapter) -> str:
    """The name this adapter is published under for good: its own, and the head of its weights' sha256."""
    return f"{adapter.name}-{digest(adapter.folder / WEIGHTS)[:8]}"


def reason(error: BaseException) -> str:
    """What went wrong in a line, from the deepest cause: the client wraps what the server said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


def main() -> None:
    """Publish a trained folder: by itself, or again after a push that broke off."""
    import argparse

    from huggingface_hub import HfApi

    from training import modelscope

    parser = argparse.ArgumentParser(prog="python -m training.hub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="if the repository is created, only you see it")
    parser.add_argument("--pr", action="store_true", help="as a pull request on a repository that is there")
    parser.add_argument("--modelscope", action="store_true", help="to ModelScope, not to the Hub")
    chosen = parser.parse_args()
    if chosen.modelscope and chosen.pr:
        parser.error("--pr is for the Hub only: ModelScope's client makes no pull requests. Leave one of the two out.")
    try:
        adapter = _open(chosen.folder)
        if chosen.modelscope:
            modelscope.require_permission(chosen.repo, chosen.private)
            print(modelscope.push(adapter, chosen.repo, chosen.private))
        else:
            require_permission(chosen.repo, HfApi(), chosen.pr, private=chosen.private)
            print(push(adapter, chosen.repo, HfApi(), chosen.pr))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def _open(folder: Path) -> Adapter:
    """Through the gate, on the base that its recipe names: the machine that trained it has that base."""
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"{folder} is no adapter: {RECIPE} is missing. Name a folder that training.run wrote.")
    return Adapter.open(folder, locate(json.loads((folder / RECIPE).read_text(encoding="utf-8"))["base"]))


if __name__ == "__main__":
    main()
