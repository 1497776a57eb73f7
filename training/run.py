"""Train an adapter: `python -m training.run [RECIPE] [--field value]`. The story is told in pipeline.py."""

import logging
import sys

import tyro

from chat.machine import allow_any_terminal
from training import distributed
from training.recipe import HUANHUAN, RECIPES, RENAMED, Run

log = logging.getLogger(__name__)

MEMORY_FULL = (
    "The GPU's memory is full. --profile faithful needs less for the same steps, and in still less with "
    "--batch-size 1 and as many times more --gradient-accumulation-steps; --bits 4 shrinks the base to a third. "
    "nvidia-smi shows who else is at work there. If a checkpoint was written, --resume goes on from it under another "
    "profile, too."
)


def main() -> None:
    """Parse the command line, run, and say in a sentence what went wrong."""
    allow_any_terminal()
    logging.basicConfig(level=logging.INFO if distributed.is_main_process() else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = [current_flag(argument) for argument in sys.argv[1:]]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [HUANHUAN.name, *arguments]
    try:
        job = tyro.extras.overridable_config_cli(
            {name: (recipe.base, Run(recipe=recipe)) for name, recipe in RECIPES.items()},
            args=arguments, prog="python -m training.run", config=(tyro.conf.OmitArgPrefixes,),
        )  # fmt: skip
        from chat.proxies import check_proxies
        from training import pipeline  # here: --help needs no torch

        check_proxies()
        if adapter := pipeline.run(job):
            log.info("%s is ready: python app.py --base %s", adapter.folder, job.recipe.base)
    except (ValueError, RuntimeError, OSError) as error:
        full = type(error).__name__ == "OutOfMemoryError"  # torch's own message names no remedy
        sys.exit(MEMORY_FULL if full else str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped at once. If a checkpoint was written, --resume goes on from it.")


def current_flag(argument: str) -> str:
    """A flag under the present name of its field, with a notice if it was given under an older one."""
    flag, equals, value = argument.partition("=")
    new = RENAMED.get(flag.removeprefix("--").replace("-", "_")) if flag.startswith("--") else None
    if not new:
        return argument
    renamed = f"--{new.replace('_', '-')}"
    log.warning("%s is now called %s.", flag, renamed)
    return f"{renamed}{equals}{value}"


if __name__ == "__main__":
    main()
