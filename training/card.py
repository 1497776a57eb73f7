"""Adapter folder to model card and ledger: every number is read from the folder's files."""

import json
from pathlib import Path
from string import Template
from typing import Any

from chat.adapter import CARD, CONFIG, FIGURE, MARKERS, METRICS, PART, RADAR, RECIPE, REPORT, ROOT
from chat.base import BASES, SAMPLING
from training import plots, report
from training.report import quoted, table

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
BASE = "_base"
LEDGER = ("identity_pass_rate", "canon_pass_rate", "attack_pass_rate", "long_chat_pass_rate")
SHOWN_FIELDS = (
    "bits", "dataset", "max_length", "terminator", "held_out", "rank", "alpha", "rslora", "dora", "dropout", "layers",
    "epochs", "batch_size", "accumulation", "learning_rate", "schedule", "warmup", "seed",
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
GGUF = """
With llama.cpp and Ollama · 用 llama.cpp 与 Ollama：in Chat-甄嬛, `python -m training.export FOLDER --gguf {name}.gguf`
writes this LoRA as GGUF, a Modelfile beside it, and says what to do next; `--merged` merges it with its base ·
在 Chat-甄嬛 里写成 GGUF LoRA 与 Modelfile，并提示下一步；`--merged` 则与底座合并。
"""
MERGED = """
As one model · 合为一个模型：in Chat-甄嬛, `python -m training.export FOLDER --merged {name}-merged` merges this DoRA
with its base, for programs that know no DoRA · 在 Chat-甄嬛 里与底座合并，供不识 DoRA 的程序使用。
"""
FOLDED = """
rsLoRA is folded into `lora_alpha` (alpha times the root of the rank), as some programs pass over `use_rslora` · rsLoRA
已折入 `lora_alpha`（alpha 乘以秩的平方根），因为有的程序不理会 `use_rslora`。
"""
TEMPLATE = Path(__file__).with_suffix(".md")


def write(folder: Path) -> None:
    """Draw the figures, write report and card of an adapter folder that holds its recipe and metrics."""
    recipe, metrics = _read(folder / RECIPE), _read(folder / METRICS)
    for draw, name in ((plots.loss, FIGURE), (plots.radar, RADAR), (plots.markers, MARKERS)):
        draw(metrics, folder / name)
    (folder / REPORT).write_text(report.render(_name(folder), metrics), encoding="utf-8")
    (folder / CARD).write_text(render(folder, recipe, metrics), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _name(folder: Path) -> str:
    return folder.name.removesuffix(PART)


def render(folder: Path, recipe: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The card as text: the template beside this file, filled in from the folder's files and nothing else."""
    base = _read(folder / CONFIG)["base_model_name_or_path"]
    name = _name(folder)
    files = [known.gguf.files[0].name for known in BASES.values() if known.name == base and known.converted]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=_metadata(name, base, metrics),
        name=name,
        base=base,
        choice=recipe["base"],
        system_prompt=recipe["system_prompt"],
        source=f', gguf_file="{files[0]}"' if files else "",
        sampling=", ".join(f'"{field}": {value}' for field, value in SAMPLING.items()),
        engine="" if files else VLLM.format(base=base, rank=recipe["rank"]),
        export=_export(folder, name, recipe),
        note=DIFFERENCES.format(steps=metrics["steps"]) if recipe["name"] == "huanhuan" else "",
        figure=FIGURE,
        figures=_figures(metrics),
        report=REPORT,
        measures=table(("measure", "adapter", "count", "95 %", "base"), _measures(metrics)),
        epochs=_epochs(metrics),
        recipe=table(("field", "value"), [(field, _plain(recipe[field])) for field in SHOWN_FIELDS if field in recipe]),
        data=table(("file", "sha256"), [(file["file"], f"`{file['sha256']}`") for file in metrics.get("data", [])]),
        run=table(("what", "value"), [(what, _plain(value)) for what, value in metrics["run"].items()]),
        probes=table(("question", "her reply", ""), _probes(metrics)),
    )


def _export(folder: Path, name: str, recipe: dict[str, Any]) -> str:
    """How other programs come to open it."""
    folded = recipe.get("rslora") and not _read(folder / CONFIG).get("use_rslora")
    return (MERGED if recipe.get("dora") else GGUF).format(name=name) + (FOLDED if folded else "")


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


def _figures(metrics: dict[str, Any]) -> str:
    """What was drawn beside the loss curve; an adapter measured before there was a base to compare with has neither."""
    radar = f"![Base against adapter · 底座与适配器]({RADAR})\n\n" if f"attack_pass_rate{BASE}" in metrics else ""
    return radar + (f"![Marker rates · 用词的比例]({MARKERS})\n\n" if "markers" in metrics else "")


def _measures(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = [
        (title, metrics[key]["value"], f"{metrics[key]['count']:,}", _interval(metrics[key]),
         metrics.get(key + BASE, {}).get("value", ""))
        for key, title in TITLES.items() if key in metrics
    ]  # fmt: skip
    if "heldout_loss" not in metrics:
        return rows
    ratio = metrics["heldout_loss"]["value"] / metrics[f"heldout_loss{BASE}"]["value"]
    return [*rows, ("held-out loss, adapter / base", round(ratio, 3), "", "", "")]


def _interval(metric: dict[str, Any]) -> str:
    return f"{metric['low']} to {metric['high']}" if "low" in metric else ""


def _epochs(metrics: dict[str, Any]) -> str:
    rows = [(e["epoch"], round(e["loss"], 4), round(e["terminator"], 4)) for e in metrics.get("heldout_by_epoch", [])]
    return table(("epoch", "held-out loss", "of the terminator"), rows) if rows else ""


def _probes(metrics: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(p["question"], quoted(p["reply"]), "✓" if p["passed"] else "✗") for p in metrics["identity_probes"]]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def ledger(root: Path) -> str:
    """adapters/README.md: a line for each adapter under `root`, from its metrics."""
    rows = []
    for folder in sorted(path.parent for path in root.glob(f"*/{METRICS}")):
        metrics, config = _read(folder / METRICS), _read(folder / CONFIG)
        numbers = {name: metric.get("value") for name, metric in metrics.items() if isinstance(metric, dict)}
        before, after = numbers.get(f"heldout_loss{BASE}"), numbers.get("heldout_loss")
        rows.append(
            (f"[{folder.name}]({folder.name}/{CARD})", config["base_model_name_or_path"], metrics["steps"],
             f"{before} → {after}", *(numbers.get(name, "—") for name in LEDGER), metrics["run"]["date"])
        )  # fmt: skip
    titles = ("held-out loss, base → adapter", *(TITLES[name] for name in LEDGER))
    note = "Written by `python -m training.run` and `training.evaluate`; each line is read from an adapter's own files."
    return f"# Adapters\n\n{note}\n\n{table(('adapter', 'base', 'steps', *titles, 'date'), rows)}"


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
