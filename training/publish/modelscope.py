"""Publish an adapter to ModelScope: the permission is asked for first, and only the contract's files go up.

The token is the one that MODELSCOPE_API_TOKEN or `modelscope login` gives to ModelScope's client; it passes through no
variable of ours. MODELSCOPE_ENDPOINT names another site than modelscope.cn.
"""

import contextlib
import hashlib
import sys

from modelscope_hub import HubApi, HubError, NotExistError, StorageError
from modelscope_hub.errors import AlreadyExistsError

from chat.adapter import FILES, Adapter
from chat.download import digest
from training.publish.checks import reason, require_no_secret, version_tag

QUESTION = b"May this token write?"  # a file that is announced and never sent


def require_permission(repo: str, private: bool = False) -> None:
    """Make sure, before a run spends its hours, that the repository exists and may be written.

    It is created if it is missing. ModelScope tells nobody what a token may do, so we do as a push begins: we announce
    a file, and are refused or told where to send it. Raises PermissionError, or ConnectionError when there is no
    answer.
    """
    api = HubApi()
    try:
        api.whoami()
        _create(repo, private, api)
        announced = {"oid": hashlib.sha256(QUESTION).hexdigest(), "size": len(QUESTION)}
        api.legacy.validate_blobs(repo, "model", [announced])
    except HubError as error:
        if error.retryable:
            said = f"ModelScope does not say whether {repo} may be written ({_why(error)})."
            raise ConnectionError(f"{said} Check the network, and try again.") from error
        raise PermissionError(
            f"{repo} cannot be written on ModelScope ({_why(error)}). Log in with `modelscope login`, or set "
            "MODELSCOPE_API_TOKEN, with a token that may write, and check the name."
        ) from error


def push(adapter: Adapter, repo: str, private: bool = False) -> str:
    """Upload the contract's files, tag them as on the Hub, and return the repository's address.

    Safe to repeat: what lies there already is not sent again, and one adapter has one tag. Raises ValueError for a
    secret, ConnectionError when ModelScope does not take it all.
    """
    files = [adapter.folder / name for name in FILES if (adapter.folder / name).is_file()]
    require_no_secret(*files)
    api, tag, there = HubApi(), version_tag(adapter), dict[str, str | None]()
    try:
        _create(repo, private, api)  # again: the client makes a repository that is gone, and makes it public
        with contextlib.suppress(NotExistError):  # a repository without a commit has no list
            there = {file.path: file.sha256 for file in api.list_repo_files(repo, "model")}
        if missing := [file.name for file in files if there.get(file.name) != digest(file)]:
            message = f"{adapter.name}: {adapter.metrics.get('steps')} steps"
            # The client prints a report; what we print is the address. Its cache would lie in the adapter's folder,
            # and would count files as sent that somebody has since deleted.
            with contextlib.redirect_stdout(sys.stderr):
                api.upload_folder(
                    repo, "model", adapter.folder, allow_patterns=missing, use_cache=False, commit_message=message
                )
        if tag not in {each["Revision"] for each in api.list_repo_revisions(repo, "model")}:
            api.create_repo_tag(repo, "model", tag)
    except (HubError, RuntimeError) as error:
        again = f"python -m training.publish {adapter.folder} {repo} --modelscope{' --private' if private else ''}"
        raise ConnectionError(
            f"{repo} on ModelScope did not take the whole of {adapter.name} ({_why(error)}). Nothing is lost: "
            f"{adapter.folder} is whole, and `{again}` goes on from here."
        ) from error
    return f"{api.legacy.endpoint}/models/{repo}"


def _why(error: Exception) -> str:
    """What went wrong, in a line. The client writes the reason why a single file failed to its log only."""
    said = reason(error).split(". ")[0].rstrip(".")
    return f"{said}, for the reasons above" if isinstance(error, StorageError) else said


def _create(repo: str, private: bool, api: HubApi) -> None:
    """Create the repository. One that exists stays as it is, private or public."""
    with contextlib.suppress(AlreadyExistsError):
        api.create_repo(repo, "model", visibility="private" if private else "public")
