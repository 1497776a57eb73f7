"""Adapter folder to model card and ledger: every number is read from the folder's files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from chat.adapter import CARD, CONFIG, FIGURE, MARKERS, METRICS, RADAR, RECIPE, REPORT, ROOT
from chat.bases import BASES, SAMPLING
from chat.files import PART, write_text
from training.evaluate import plots, report
from training.evaluate.scores import BASE

# metric in metrics.json → what people call it; with `_base` at its end it is the base's
TITLES = {
    "heldout_loss": "held-out loss per text token",
    "heldout_loss_script": "held-out loss, rows of the script",
    "heldout_loss_ours": "held-out loss, rows of our own",
    "heldout_terminator": "held-out loss of the terminator",
    "swap_margin": "swap margin, nats per token",
    "identity_pass_rate": "identity probes passed",
    "canon_pass_rate": "canon probes passed",
    "attack_pass_rate": "attacks withstood",
    "long_chat_pass_rate": "long chats in which the voice is kept",
    "sign_test_p": "sign test over probes and attacks, p",
    "talk_mark": "everyday talk, mean blind mark of 0 to 2",
    "talk_zero_rate": "everyday talk, replies marked 0",
    "six_turn_mark": "talks of six turns, mean blind mark of 0 to 2",
    "talk_agreement": "equal marks of the two readers",
    "talk_pmi": "everyday talk, how much better its line explains a reply than others, nats per token",
    "talk_cut_rate": "everyday talk, replies cut at the limit",
    "talk_repeat_rate": "everyday talk, replies given to two lines",
    "talk_stock_rate": "everyday talk, stock lines of the script",
    "loop_rate": "replies that loop",
    "stop_rate": "replies she ended herself",
    "chrf": "chrF against the replies held out",
    "length_ratio": "length of the replies, to those held out",
    "distinct_1": "distinct-1 of the replies, by character",
    "distinct_2": "distinct-2 of the replies, by character",
    "copy_rate": "replies that stand in the training data",
    "assistant_phrase_rate": "replies with an assistant's phrase",
    "neutral_loss": "loss of neutral text per token",
    "forgetting": "forgetting: rise of that loss",
}
LEDGER = (
    "talk_mark", "talk_zero_rate", "six_turn_mark", "identity_pass_rate", "canon_pass_rate", "attack_pass_rate",
    "long_chat_pass_rate",
)  # fmt: skip
# Shown of recipe.json, where `held_out` and `accumulation` are older names of the fields after them.
RECIPE_FIELDS = (
    "bits", "dataset", "max_length", "terminator", "held_out", "validation_rows", "rank", "alpha", "rslora", "dora",
    "dropout", "layers", "epochs", "batch_size", "accumulation", "gradient_accumulation_steps", "learning_rate",
    "schedule", "warmup", "seed",
)  # fmt: skip


def write(folder: Path) -> None:
    """Draw the figures, write report and card of an adapter folder that holds its recipe and metrics."""
    metrics = _read(folder / METRICS)
    for draw, name in ((plots.loss, FIGURE), (plots.radar, RADAR), (plots.markers, MARKERS)):
        draw(metrics, folder / name)
    name = folder.name.removesuffix(PART)
    write_text(folder / REPORT, report.render(name, metrics))
    write_text(folder / CARD, render(name, folder, metrics))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def render(name: str, folder: Path, metrics: dict[str, Any]) -> str:
    """The card as text: card.md beside this file, filled in from the folder's files and nothing else."""
    config = _read(folder / CONFIG)
    base = config["base_model_name_or_path"]
    gguf_file = next((each.gguf.files[0].name for each in BASES.values() if each.name == base and each.converted), "")
    return report.TEMPLATES.get_template("card.md").render(
        name=name, base=base, config=config, recipe=_read(folder / RECIPE), recipe_fields=RECIPE_FIELDS,
        metrics=metrics, titles=TITLES, metadata=_metadata(name, base, metrics), gguf_file=gguf_file, sampling=SAMPLING,
    )  # fmt: skip


def _metadata(name: str, base: str, metrics: dict[str, Any]) -> str:
    """The head of the card in the Hub's terms, its figures as a model-index."""
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="chat-zhenhuan", metric_type=key, metric_name=title,
            dataset_name="Chat-甄嬛, rows held out and probes", metric_value=metrics[key]["value"],
        )
        for key, title in TITLES.items() if key in metrics
    ]  # fmt: skip
    return ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", language=["zh"], license="apache-2.0",
        tags=["lora", "role-play", f"base_model:adapter:{base}"], model_name=name, eval_results=results,
    ).to_yaml()  # fmt: skip


def ledger(root: Path) -> str:
    """adapters/README.md: a line for each adapter under `root`, from its metrics."""
    titles = ("held-out loss, base → adapter", *(TITLES[name] for name in LEDGER))
    rows: list[Sequence[Any]] = [("adapter", "base", "steps", *titles, "date"), ["---"] * (len(titles) + 4)]
    for folder in sorted(path.parent for path in root.glob(f"*/{METRICS}")):
        metrics, config = _read(folder / METRICS), _read(folder / CONFIG)
        numbers = {name: metric.get("value") for name, metric in metrics.items() if isinstance(metric, dict)}
        losses = f"{numbers.get('heldout_loss' + BASE)} → {numbers.get('heldout_loss')}"
        rates = (numbers.get(name, "—") for name in LEDGER)
        link = f"[{folder.name}]({folder.name}/{CARD})"
        rows.append((link, config["base_model_name_or_path"], metrics["steps"], losses, *rates, metrics["run"]["date"]))
    table = "\n".join(f"| {' | '.join(map(report.cell, row))} |" for row in rows)
    note = "Written by `python -m training.run` and `training.evaluate`; each line is read from an adapter's own files."
    return f"# Adapters\n\n{note}\n\n{table}\n"


def update_ledger(folder: Path) -> None:
    """Write the ledger again if the adapter folder is one of those that it lists."""
    if folder.parent.resolve() == ROOT:
        write_text(ROOT / CARD, ledger(ROOT))


def main() -> None:
    """Draw and write the cards of adapter folders again, and the ledger."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate.card", description=main.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="adapters/NAME")
    for folder in parser.parse_args().folders:
        write(folder)
    write_text(ROOT / CARD, ledger(ROOT))


if __name__ == "__main__":
    main()
