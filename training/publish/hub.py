"""Publish an adapter to the Hub: the permission is asked for first, and only the contract's files go up.

The token is the one `hf auth login` or HF_TOKEN gives to huggingface_hub; it passes through no variable of ours.
"""

from typing import Any

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from chat.adapter import FILES, Adapter
from training.publish.checks import reason, require_no_secret, version_tag


def require_permission(repo: str, api: HfApi, pr: bool = False, repo_type: str = "model", **creation: Any) -> None:
    """Make sure, before a run spends its hours, that the repository exists and may be written.

    A pull request needs a repository that is there and can be read; else it is created, if it is missing, with what
    `creation` says. Raises PermissionError, or ConnectionError when the Hub does not answer.
    """
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


def push(adapter: Adapter, repo: str, api: HfApi, pr: bool = False) -> str:
    """Upload the contract's files, tag the commit, and return its address.

    Safe to repeat: what lies there already is not sent again, and one adapter has one tag. Raises ValueError for a
    secret, ConnectionError when the Hub does not take it all.
    """
    require_no_secret(*(adapter.folder / name for name in FILES))
    message = f"{adapter.name}: {adapter.metrics.get('steps')} steps"
    try:
        done = api.upload_folder(
            repo_id=repo, folder_path=adapter.folder, allow_patterns=list(FILES), commit_message=message, create_pr=pr
        )
        if not pr:
            api.create_tag(repo, tag=version_tag(adapter), revision=done.oid, exist_ok=True)
    except (HfHubHTTPError, httpx2.HTTPError, RuntimeError) as error:
        raise ConnectionError(
            f"{repo} did not take the whole of {adapter.name} ({reason(error)}). Nothing is lost: "
            f"{adapter.folder} is whole, and `python -m training.publish {adapter.folder} {repo}` goes on from here."
        ) from error
    return (pr and done.pr_url) or done.commit_url
