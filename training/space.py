"""Open the page as a Hugging Face Space, or bring it up to date: `python -m training.space USER/NAME [--dry-run]`.

Only what the page needs goes up; then the build is awaited, she is asked one question, and the address is printed.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat.adapter import FILES
from training import hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
NEEDED = (
    "README.md",
    "LICENSE",
    "requirements.txt",
    "pre-requirements.txt",
    "app.py",
    "chat/*.py",
    "page/*.py",
    "page/static/*",
)
QUESTION = "你是谁？"
PATIENCE = 30 * 60  # seconds for a build; the packages alone take ten minutes
PAUSE = 5  # seconds between two looks at the build
SETTLED = 60  # seconds after which a state that names no commit is taken for this one's
FAILED = ("CONFIG_ERROR", "BUILD_ERROR", "RUNTIME_ERROR", "DELETING", "STOPPED", "PAUSED")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A Space and its settings. Secrets are named; their values are read from the environment of the same name."""

    space: str
    hardware: str = "zero-a10g"
    variables: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    private: bool = False

    def __post_init__(self) -> None:
        if missing := [name for name in self.secrets if not os.environ.get(name)]:
            raise ValueError(f"The secret {missing[0]} has no value here. Set {missing[0]} in the environment first.")


def files(root: Path = ROOT) -> list[Path]:
    """What a Space needs of this project, as paths relative to `root`."""
    wanted = [*NEEDED, *(f"adapters/*/{name}" for name in FILES)]
    return sorted(path.relative_to(root) for pattern in wanted for path in root.glob(pattern))


def plan(deployment: Deployment, root: Path = ROOT) -> str:
    """Exactly what `deploy` would do, file by file, in words. Nobody is asked and no token is read."""
    sizes = [(path, (root / path).stat().st_size) for path in files(root)]
    return "\n".join(
        [
            f"Space {deployment.space} ({'private' if deployment.private else 'public'}, gradio) on "
            f"{deployment.hardware}: created if it is missing",
            *(f"variable {name}={value}" for name, value in deployment.variables),
            *(f"secret   {name} (its value from the environment)" for name in deployment.secrets),
            *(f"upload   {size:>11,} bytes  {path.as_posix()}" for path, size in sizes),
            f"in all   {sum(size for _, size in sizes):>11,} bytes  in {len(sizes)} files",
            "delete   whatever else lies there",
            f"then wait for the build, and ask {QUESTION}",
        ]
    )


def deploy(deployment: Deployment, api: "HfApi", root: Path = ROOT) -> str:
    """Create or update the Space, wait until it runs this very commit, ask her, and return the address.

    Raises PermissionError, ValueError, ConnectionError or RuntimeError, each a sentence with the remedy.
    """
    from huggingface_hub.errors import HfHubHTTPError

    space = deployment.space
    hub.require_no_secret(*(root / path for path in files(root)))
    hub.require_permission(space, api, repo_type="space", private=deployment.private, space_sdk="gradio",
                           space_hardware=deployment.hardware)  # fmt: skip
    try:
        _configure(deployment, api)
        commit = _upload(space, api, root)
        _wait(space, api, commit)
        address = str(api.space_info(space).host)
    except HfHubHTTPError as error:
        raise ConnectionError(
            f"{space} is not up to date ({hub.reason(error)}). Run the same command again."
        ) from error
    log.info("%s %s", QUESTION, ask(address))
    return address


def _configure(deployment: Deployment, api: "HfApi") -> None:
    for name, value in deployment.variables:
        api.add_space_variable(deployment.space, name, value)
    for name in deployment.secrets:
        api.add_space_secret(deployment.space, name, os.environ[name])
    if api.get_space_runtime(deployment.space).requested_hardware != deployment.hardware:
        api.request_space_hardware(deployment.space, deployment.hardware)  # type: ignore[arg-type]


def _upload(space: str, api: "HfApi", root: Path) -> str:
    """One commit that makes the Space hold these files and no others; returns its id."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    wanted = {path.as_posix(): root / path for path in files(root)}
    there = set(api.list_repo_files(space, repo_type="space")) - {".gitattributes"}  # the Hub's own
    changes: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in wanted.items()]
    changes += [CommitOperationDelete(path_in_repo=name) for name in sorted(there - set(wanted))]
    done = api.create_commit(space, changes, repo_type="space", commit_message="The page and its adapters")
    return done.oid


def _wait(space: str, api: "HfApi", commit: str) -> None:
    """Until the Space runs the commit. Raises RuntimeError when its build fails or takes too long."""
    began, seen = time.monotonic(), ""
    while (waited := time.monotonic() - began) < PATIENCE:
        runtime = api.get_space_runtime(space)
        sha = runtime.raw.get("sha")
        current = sha == commit or (sha is None and waited > SETTLED)  # else it still shows the version before
        if current and runtime.stage == "RUNNING":
            return
        if current and runtime.stage in FAILED:
            raise RuntimeError(
                f"{space} came to {runtime.stage}: {runtime.raw.get('errorMessage', 'no reason was given')}. "
                f"Read the log at {api.endpoint}/spaces/{space}?logs=build, correct it, and run the same command."
            )
        if runtime.stage != seen:
            seen = runtime.stage
            log.info("%4.0f s  %s", waited, seen)
        time.sleep(PAUSE)
    raise RuntimeError(
        f"{space} is still {seen} after {PATIENCE // 60} minutes. Look at {api.endpoint}/spaces/{space}."
    )


def ask(address: str) -> str:
    """Her answer through the page's own API. Raises RuntimeError when there is none."""
    from gradio_client import Client
    from huggingface_hub import get_token

    try:
        text, _ = Client(address, token=get_token(), verbose=False).predict(QUESTION, api_name="/chat")
    except Exception as error:  # the client raises whatever its transport does
        raise RuntimeError(
            f"The page at {address} runs, but does not answer ({hub.reason(error)}). Read its log."
        ) from error
    return str(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, deploy or print the plan, and say in a sentence what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m training.space", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("space", metavar="USER/NAME")
    parser.add_argument("--hardware", default=Deployment.hardware, help="zero-a10g (ZeroGPU) by default")
    parser.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="ADAPTERS, for example")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME", help="its value: the environment's")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen; needs no token")
    chosen = parser.parse_args(arguments)
    try:
        variables = tuple(_pair(each) for each in chosen.variable)
        deployment = Deployment(space=chosen.space, hardware=chosen.hardware, variables=variables,
                                secrets=tuple(chosen.secret), private=chosen.private)  # fmt: skip
        if chosen.dry_run:
            log.info(plan(deployment))
            return
        from huggingface_hub import HfApi

        log.info(deploy(deployment, HfApi()))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


def _pair(setting: str) -> tuple[str, str]:
    name, separator, value = setting.partition("=")
    if not separator or not name.isidentifier():
        raise ValueError(f"{setting!r} is no variable. Write NAME=VALUE.")
    return name, value


if __name__ == "__main__":
    main()
