"""Adapter folder to model card and ledger: every number is read from the folder's files."""

import json
from pathlib import Path
from string import Template
from typing import Any

from chat.adapter import CARD, CONFIG, FIGURE, METRICS, PART, RECIPE, ROOT
from chat.base import BASES, SAMPLING

# metric in metrics.json → what people call it
TITLES = {
    "heldout_loss_base": "held-out loss per text token, base",
    "heldout_loss": "held-out loss per text token, adapter",
    "heldout_terminator_base": "held-out loss of the terminator, base",
    "heldout_terminator": "held-out loss of the terminator, adapter",
    "identity_pass_rate": "identity probes passed",
    "stop_rate": "replies she ended herself",
    "distinct_2": "distinct-2 of the replies, by character",
    "assistant_phrase_rate": "replies with an assistant's phrase",
}
SHOWN_FIELDS = (
    "dataset", "max_length", "terminator", "held_out", "rank", "alpha", "dropout", "layers", "epochs", "batch_size",
    "accumulation", "learning_rate", "schedule", "warmup", "seed",
)  # fmt: skip
DIFFERENCES = """
The tutorial ran transformers 4.44, which drops the last, smaller step of each epoch (699 steps; here {steps} over the
rows not held out), averages the loss batch by batch (here by token), and keeps the LoRA in bf16 while training (here
fp32, written as bf16). Rows are flattened, not padded: the same losses without the padding.
"""
VLLM = """
With vLLM · 用 vLLM：`vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules zhenhuan=USER/NAME`, then
ask for the model `zhenhuan` with the system prompt above · 再以上面的系统提示词请求模型 `zhenhuan`。
"""
BAR = "\\|"  # a bar that does not end a cell
TEMPLATE = Path(__file__).with_suffix(".md")


def write(folder: Path) -> None:
    """Draw the figure and write the card of an adapter folder that holds its recipe and metrics."""
    recipe, metrics = _read(folder / RECIPE), _read(folder / METRICS)
    draw(metrics, folder / FIGURE)
    (folder / CARD).write_text(render(folder, recipe, metrics), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def draw(metrics: dict[str, Any], path: Path) -> None:
    """The loss curve, training and held-out, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    steps, losses = zip(*metrics["loss_curve"], strict=True) if metrics["loss_curve"] else ((), ())
    axes.plot(steps, losses, label="training, every token learned")
    if by_epoch := metrics.get("heldout_by_epoch"):
        points = [(0, metrics["heldout_loss_base"]["value"]), *((e["step"], e["loss"]) for e in by_epoch)]
        axes.plot(*zip(*points, strict=True), "o--", label="held out, text tokens")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def render(folder: Path, recipe: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The card as text: the template beside this file, filled in from the folder's files and nothing else."""
    base = _read(folder / CONFIG)["base_model_name_or_path"]
    name = folder.name.removesuffix(PART)
    packed = next((known.packed for known in BASES.values() if known.name == base), None)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=_metadata(name, base, metrics),
        name=name,
        base=base,
        choice=recipe["base"],
        system_prompt=recipe["system_prompt"],
        source=f', gguf_file="{packed.file}"' if packed else "",
        sampling=", ".join(f'"{field}": {value}' for field, value in SAMPLING.items()),
        engine="" if packed else VLLM.format(base=base, rank=recipe["rank"]),
        note=DIFFERENCES.format(steps=metrics["steps"]) if recipe["name"] == "huanhuan" else "",
        figure=FIGURE,
        measures=_table(("measure", "value", "count"), _measures(metrics)),
        epochs=_epochs(metrics),
        recipe=_table(("field", "value"), [(field, _plain(recipe[field])) for field in SHOWN_FIELDS]),
        data=_table(("file", "sha256"), [(file["file"], f"`{file['sha256']}`") for file in metrics.get("data", [])]),
        run=_table(("what", "value"), [(what, _plain(value)) for what, value in metrics["run"].items()]),
        probes=_table(("question", "her reply", ""), _probes(metrics)),
    )


def _metadata(name: str, base: str, metrics: dict[str, Any]) -> str:
    """The head of the card in the Hub's terms, its figures as a model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="chat-zhenhuan",
            dataset_name="Chat-甄嬛, rows held out and probes",
            metric_type=key,
            metric_name=title,
            metric_value=metrics[key]["value"],
        )
        for key, title in TITLES.items()
        if key in metrics
    ]
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        language=["zh"],
        license="apache-2.0",
        tags=["lora", "role-play", f"base_model:adapter:{base}"],
        model_name=name,
        eval_results=results,
    )
    return data.to_yaml()


def _measures(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = [
        (title, metrics[key]["value"], f"{metrics[key]['count']:,}") for key, title in TITLES.items() if key in metrics
    ]
    if "heldout_loss" not in metrics:
        return rows
    ratio = metrics["heldout_loss"]["value"] / metrics["heldout_loss_base"]["value"]
    return [*rows, ("held-out loss, adapter / base", round(ratio, 3), "")]


def _epochs(metrics: dict[str, Any]) -> str:
    rows = [(e["epoch"], round(e["loss"], 4), round(e["terminator"], 4)) for e in metrics.get("heldout_by_epoch", [])]
    return _table(("epoch", "held-out loss", "of the terminator"), rows) if rows else ""


def _probes(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (p["question"], p["reply"].replace("\n", " "), "✓" if p["passed"] else "✗") for p in metrics["identity_probes"]
    ]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [[str(cell).replace("|", BAR) for cell in line] for line in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def ledger(root: Path) -> str:
    """adapters/README.md: a line for each adapter under `root`, from its metrics."""
    rows = []
    for folder in sorted(path.parent for path in root.glob(f"*/{METRICS}")):
        metrics, config = _read(folder / METRICS), _read(folder / CONFIG)
        before, after = (metrics.get(key, {}).get("value") for key in ("heldout_loss_base", "heldout_loss"))
        rows.append(
            (f"[{folder.name}]({folder.name}/{CARD})", config["base_model_name_or_path"], metrics["steps"],
             f"{before} → {after}", metrics["identity_pass_rate"]["value"], metrics["run"]["date"])
        )  # fmt: skip
    head = ("adapter", "base", "steps", "held-out loss, base → adapter", "identity probes passed", "date")
    note = "Written by `python -m training.run`; each line is read from an adapter's own files."
    return f"# Adapters\n\n{note}\n\n{_table(head, rows)}"


def main() -> None:
    """Draw and write the cards of adapter folders again, and the ledger."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m training.card", description=(main.__doc__ or ""))
    parser.add_argument("folders", type=Path, nargs="+", metavar="adapters/NAME")
    for folder in parser.parse_args().folders:
        write(folder)
    (ROOT / CARD).write_text(ledger(ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
