"""Measure an adapter beside its base again: losses, probes, attacks, long chats, and how replies end and sound."""

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from chat.adapter import METRICS
from training.evaluate import card


def evaluate(folder: Path, base: str | None = None, probe_replies: int | None = None) -> dict[str, Any]:
    """Measure an adapter folder as its own run did, and write numbers, report, plots and card.

    What the run alone knows (its curve, data, seconds) is kept. `base` and `probe_replies` replace what its recipe
    says. Raises ValueError, OSError or Unavailable.
    """
    # here: --help needs no torch
    from training.adapter_files import device_name, reopen, write_json
    from training.evaluate.measures import measure

    model, tokenizer, recipe, train_examples, validation_examples = reopen(folder, base)
    recipe = recipe if probe_replies is None else replace(recipe, probe_replies=probe_replies)
    metrics = measure(model, tokenizer, recipe, train_examples, validation_examples)
    metrics["evaluation"] |= {"date": date.today().isoformat(), "device": device_name()}
    write_json(folder / METRICS, json.loads((folder / METRICS).read_text(encoding="utf-8")) | metrics)
    card.write(folder)
    card.update_ledger(folder)
    return metrics


def main() -> None:
    """Evaluate adapter folders again; print their numbers and write their files."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="adapters/NAME")
    parser.add_argument("--base", help="by default the one its recipe names")
    parser.add_argument("--replies", type=int, help="to draw for stop rate, chrF, copies; by default as its recipe")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        try:
            metrics = evaluate(folder, arguments.base, arguments.replies)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(str(error))
        numbers = {name: n for name, n in metrics.items() if isinstance(n, dict) and "count" in n}
        print(json.dumps({folder.name: numbers}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
