"""Publish an adapter to the Hub: the permission is asked for first, and only the contract's files go up."""

from typing import TYPE_CHECKING

from chat.adapter import FILES, Adapter

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def require_permission(repo: str, api: "HfApi") -> None:
    """Make sure, before a run spends its hours, that the repository exists and may be written.

    The token is the one `hf auth login` or HF_TOKEN gives to huggingface_hub; it passes through no variable of
    ours. Raises PermissionError.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api.create_repo(repo, exist_ok=True)
        api.auth_check(repo, write=True)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PermissionError(
            f"{repo} cannot be written ({reason}). Log in with `hf auth login` and a token that may write, "
            "and check the name."
        ) from error


def push(adapter: Adapter, repo: str, api: "HfApi") -> str:
    """Upload the contract's files and return the commit's address. Safe to repeat."""
    done = api.upload_folder(
        repo_id=repo,
        folder_path=adapter.folder,
        allow_patterns=list(FILES),
        commit_message=f"{adapter.name}: {adapter.metrics.get('steps')} steps",
    )
    return done.commit_url
