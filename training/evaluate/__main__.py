"""Measure an adapter beside its base again: losses, probes, attacks, long chats, and how replies end and sound."""

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

from chat.adapter import METRICS
from chat.machine import allow_any_terminal
from training.evaluate import card


def main() -> None:
    """Measure adapter folders as their own runs did; print the numbers, and write them with report, plots and card."""
    allow_any_terminal()
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="adapters/NAME")
    parser.add_argument("--base", help="by default the one its recipe names")
    parser.add_argument("--replies", type=int, help="to draw for stop rate, chrF, copies; by default as its recipe")
    arguments = parser.parse_args()
    # here: --help needs no torch
    from training.adapter_files import device_name, reopen, write_json
    from training.evaluate.measures import measure

    for folder in arguments.folders:
        try:
            model, tokenizer, recipe, learned, validation = reopen(folder, arguments.base)
            if arguments.replies is not None:
                recipe = replace(recipe, probe_replies=arguments.replies)
            metrics = measure(model, tokenizer, recipe, learned, validation)
            metrics["evaluation"] |= {"date": date.today().isoformat(), "device": device_name()}
            # What the run alone knows (its curve, data, seconds) is kept.
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8")) | metrics
            write_json(folder / METRICS, metrics)
            card.write(folder)
            card.update_ledger(folder)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(str(error))
        numbers = {name: n for name, n in metrics.items() if isinstance(n, dict) and "count" in n}
        print(json.dumps({folder.name: numbers}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
