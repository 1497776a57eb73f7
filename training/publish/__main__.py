"""Publish a trained folder to the Hub or to ModelScope: by itself, or again after a push that broke off."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi

from chat.adapter import RECIPE, Adapter
from chat.checkpoints import locate
from training.publish import hub, modelscope
from training.recipe import Recipe


def main() -> None:
    """Open the folder, ask for permission, push, and print the repository's address."""
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="if the repository is created, only you see it")
    parser.add_argument("--pr", action="store_true", help="as a pull request on a repository that is there")
    parser.add_argument("--modelscope", action="store_true", help="to ModelScope, not to the Hub")
    arguments = parser.parse_args()
    folder, repo, private, pr = arguments.folder, arguments.repo, arguments.private, arguments.pr
    if arguments.modelscope and pr:
        parser.error("--pr is for the Hub only: ModelScope's client makes no pull requests. Leave one of the two out.")
    try:
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is no adapter: {RECIPE} is missing. Name a folder that training.run wrote.")
        # Through the gate, on the base that its recipe names: the machine that trained it has that base.
        adapter = Adapter.open(folder, locate(Recipe.read(folder / RECIPE).base))
        if arguments.modelscope:
            modelscope.require_permission(repo, private)
            print(modelscope.push(adapter, repo, private))
        else:
            hub.require_permission(repo, HfApi(), pr, private=private)
            print(hub.push(adapter, repo, HfApi(), pr))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
