"""What each choice of the pocket recipe is worth: data, epochs, rank, learning rate, rsLoRA, DoRA.

python -m benchmarks.ablation [VARIANT …] [--at-once 4] [--output benchmarks/results/ablation.json]

Every variant trains on the same base, from the same examples less the same held-out rows, in a process of its own;
several share the GPU, so the seconds compare nothing. Losses are in nats per text token, by epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from training.recipe import FACTS, POCKET, Recipe

# How often the script, our files of facts, and our other dialogues are read; and the recipe.
Variant = tuple[int, int, int, Recipe]


def pocket(*, script: int = 1, facts: int = 3, rest: int = 1, **changed: Any) -> Variant:
    """The pocket recipe, but for what is named."""
    return script, facts, rest, replace(POCKET, **changed)


def trial(**changed: Any) -> Variant:
    """Two epochs at 1e-3 that read the facts twice, but for what is named: what most choices were tried on."""
    return pocket(**({"facts": 2, "epochs": 2, "learning_rate": 1e-3} | changed))


VARIANTS: dict[str, Variant] = {
    "facts twice": trial(),
    "script only": trial(facts=0, rest=0),
    "ours only": trial(script=0),
    "facts once": trial(facts=1),
    "facts four times": trial(facts=4),
    "facts five times": trial(facts=5),
    "one epoch": trial(epochs=1),
    "lr 6e-4": trial(learning_rate=6e-4),
    "rank 16": trial(rank=16, alpha=64),
    "rank 32, rsLoRA": trial(rank=32, alpha=32, rslora=True),
    # in one batch: its profile launches each batch's kernels one by one
    "DoRA": trial(batch_size=64, gradient_accumulation_steps=1, dora=True),
    "pocket": pocket(),
    "pocket, lr 1e-3": pocket(learning_rate=1e-3),
    "pocket, facts four times": pocket(facts=4),
    "pocket, facts four times, two epochs": pocket(facts=4, epochs=2),
    "pocket, dropout 0.1": pocket(dropout=0.1),
}
TOKENS = 96  # of a reply to a probe


def one(name: str) -> dict[str, Any]:
    """Train a variant and measure it at the end of each epoch; probes at the last."""
    from chat import base_model, convert
    from chat.checkpoints import locate
    from qwen2.training_step import TrainingStep
    from training import data, trainer
    from training.evaluate.losses import validation_metrics
    from training.evaluate.measures import measure_side
    from training.tokens import encode

    script, facts, rest, recipe = VARIANTS[name]
    recipe = replace(recipe, reply_tokens=TOKENS, long_chats=0, probe_replies=0, save_steps=10**9)
    examples, validation = data.split(data.load(("huanhuan", "dataset")), recipe.validation_rows, recipe.seed)
    times = dict.fromkeys((Path(file).name for file in FACTS), facts) | {data.FULL_FILE.name: script}
    chosen = [e for e in examples for _ in range(times.get(e.source, rest))]
    checkpoint = convert.ensure_converted(locate(recipe.base))
    tokenizer = base_model.load_tokenizer(checkpoint)
    rows, validation_rows = (
        encode(tokenizer, part, recipe.max_length, recipe.terminator) for part in (chosen, validation)
    )
    profile = "faithful" if recipe.dora or base_model.best_device() == "cpu" else "fast"
    model = trainer.attach(base_model.load_base(checkpoint), recipe, profile)
    epochs: list[dict[str, float]] = []

    def validate() -> dict[str, float]:
        metrics = validation_metrics(model, validation_rows, validation)
        return {name: metric["value"] for name, metric in metrics.items()}

    def measure() -> dict[str, float]:
        epochs.append(validate())
        return epochs[-1]

    with model.disable_adapter():
        base = validate()
    with tempfile.TemporaryDirectory() as work:
        step = TrainingStep(model, recipe.max_length) if profile == "fast" else None
        trainer.train(model, rows, recipe, Path(work), measure=measure, step=step)
        del step
    side = measure_side(model, tokenizer, recipe, chosen, validation)
    probes = {key: side.numbers[key]["value"] for key in ("identity_pass_rate", "canon_pass_rate", "attack_pass_rate")}
    return {"variant": name, "rows": len(rows), "base": base, "epochs": epochs, **probes}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: for each variant the script's held-out loss by epoch, ours at the last, and the probes."""
    lines = [
        "| variant | rows | script, by epoch | of the base's | ours, last epoch | identity | canon | attacks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        script = [epoch["heldout_loss_script"] for epoch in each["epochs"]]
        lines.append(
            f"| {each['variant']} | {each['rows']:,} | {' / '.join(f'{loss:.3f}' for loss in script)} "
            f"| {min(script) / each['base']['heldout_loss_script']:.3f} "
            f"| {each['epochs'][-1]['heldout_loss_ours']:.3f} "
            f"| {each['identity_pass_rate']:.0%} | {each['canon_pass_rate']:.0%} | {each['attack_pass_rate']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the variants, several at once, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--at-once", type=int, default=4, help="processes that share the GPU")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    picked = parser.parse_args()
    if picked.one:
        print(json.dumps(one(picked.one), ensure_ascii=False))
        return

    def run(name: str) -> dict[str, Any] | None:
        command = [sys.executable, "-m", "benchmarks.ablation", "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr)
            return None
        print(f"{name}: done", file=sys.stderr)
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(picked.at_once) as pool:
        for done in as_completed([pool.submit(run, name) for name in picked.variants or VARIANTS]):
            results += [result for result in (done.result(),) if result]
            results.sort(key=lambda result: list(VARIANTS).index(result["variant"]))
            write(results, picked.output)  # at once: a machine may be taken away
    print(table(results))


def write(results: list[dict[str, Any]], path: Path) -> None:
    """Keep the numbers, with the machine, the versions and the date."""
    from importlib.metadata import version

    from training.adapter_files import device_name

    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "date": date.today().isoformat(),
        "device": device_name(),
        **versions,
        "unit": "nats per text token",
        "rows": results,
    }
    path.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
