"""Open the page as a Hugging Face Space, or bring it up to date.

Only what the page needs goes up. Once the Space has built it, she is asked one question, and the address is printed.
"""

import argparse
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio_client import Client
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from chat.adapter import FILES
from training.publish import hub
from training.publish.checks import reason, require_no_secret

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
NEEDED = (
    "README.md", "LICENSE", "requirements.txt", "pre-requirements.txt", "app.py",
    "chat/*.py", "qwen2/*.py", "page/*.py", "page/static/*", *(f"adapters/*/{name}" for name in FILES),
)  # fmt: skip
QUESTION = "你是谁？"
TIMEOUT = 30 * 60  # seconds for a build; the packages alone take ten minutes
POLL = 5  # seconds between two requests for the build's state
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


def files() -> list[Path]:
    """What a Space needs of this project, as paths relative to ROOT."""
    return sorted(path.relative_to(ROOT) for pattern in NEEDED for path in ROOT.glob(pattern))


def plan(deployment: Deployment) -> str:
    """Exactly what `deploy` would do, file by file, in words. Nobody is asked and no token is read."""
    sizes = {path: (ROOT / path).stat().st_size for path in files()}
    kind = "private" if deployment.private else "public"
    lines = [
        f"Space {deployment.space} ({kind}, gradio) on {deployment.hardware}: created if it is missing",
        *(f"variable {name}={value}" for name, value in deployment.variables),
        *(f"secret   {name} (its value from the environment)" for name in deployment.secrets),
        *(f"upload   {size:>11,} bytes  {path.as_posix()}" for path, size in sizes.items()),
        f"in all   {sum(sizes.values()):>11,} bytes  in {len(sizes)} files",
        "delete   whatever else lies there",
        f"then wait for the build, and ask {QUESTION}",
    ]
    return "\n".join(lines)


def deploy(deployment: Deployment, api: HfApi) -> str:
    """Create or update the Space, wait until it runs this very commit, ask her, and return the address.

    Raises PermissionError, ValueError, ConnectionError or RuntimeError, each a sentence with the remedy.
    """
    space = deployment.space
    wanted = {path.as_posix(): ROOT / path for path in files()}
    require_no_secret(*wanted.values())
    hub.require_permission(space, api, repo_type="space", private=deployment.private, space_sdk="gradio",
                           space_hardware=deployment.hardware)  # fmt: skip
    try:
        for name, value in deployment.variables:
            api.add_space_variable(space, name, value)
        for name in deployment.secrets:
            api.add_space_secret(space, name, os.environ[name])
        if api.get_space_runtime(space).requested_hardware != deployment.hardware:
            api.request_space_hardware(space, deployment.hardware)  # type: ignore[arg-type]
        # One commit that makes the Space hold these files and no others.
        there = set(api.list_repo_files(space, repo_type="space")) - {".gitattributes"}  # the Hub's own
        changes: list[Any] = [CommitOperationAdd(name, path) for name, path in wanted.items()]
        changes += map(CommitOperationDelete, sorted(there - set(wanted)))
        done = api.create_commit(space, changes, repo_type="space", commit_message="The page and its adapters")
        _wait(space, api, done.oid)
        address = str(api.space_info(space).host)
    except HfHubHTTPError as error:
        raise ConnectionError(f"{space} is not up to date ({reason(error)}). Run the same command again.") from error
    log.info("%s %s", QUESTION, ask(address))
    return address


def _wait(space: str, api: HfApi, commit: str) -> None:
    """Return once the Space runs the commit. Raises RuntimeError when its build fails or takes too long.

    The client's wait_for_space would return while the version before still runs.
    """
    began, seen = time.monotonic(), ""
    while (waited := time.monotonic() - began) < TIMEOUT:
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
        time.sleep(POLL)
    raise RuntimeError(f"{space} is still {seen} after {TIMEOUT // 60} minutes. Look at {api.endpoint}/spaces/{space}.")


def ask(address: str) -> str:
    """Her answer through the page's own API. Raises RuntimeError when there is none."""
    try:
        text, _ = Client(address, token=get_token(), verbose=False).predict(QUESTION, api_name="/chat")
        return str(text)
    except Exception as error:  # the client raises whatever its transport does
        said = f"The page at {address} runs, but does not answer ({reason(error)}). Read its log."
        raise RuntimeError(said) from error


def main() -> None:
    """Parse the command line, deploy or print the plan, and say in a sentence what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m training.publish.space", description=__doc__)
    parser.add_argument("space", metavar="USER/NAME")
    parser.add_argument("--hardware", default=Deployment.hardware, help="zero-a10g (ZeroGPU) by default")
    parser.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="ADAPTERS, for example")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME", help="its value: the environment's")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen; needs no token")
    arguments = parser.parse_args()
    try:
        if wrong := [each for each in arguments.variable if not re.match(r"[^\W\d]\w*=", each)]:
            raise ValueError(f"{wrong[0]!r} is no variable. Write NAME=VALUE.")
        pairs = (each.partition("=") for each in arguments.variable)
        deployment = Deployment(
            space=arguments.space, hardware=arguments.hardware, secrets=tuple(arguments.secret),
            variables=tuple((name, value) for name, _, value in pairs), private=arguments.private,
        )  # fmt: skip
        log.info(plan(deployment) if arguments.dry_run else deploy(deployment, HfApi()))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
