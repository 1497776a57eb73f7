"""Train an adapter, measure it, and open it: `python -m training.run [RECIPE] [--field value]`."""

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from chat.adapter import CARD, LAYERS, METRICS, PART, RECIPE, ROOT, Adapter, check_name
from training import hub, modelscope, ranks
from training.recipe import HUANHUAN, RECIPES, Recipe

log = logging.getLogger(__name__)

MOST_RANK = 32  # of the fast profile: tiles of more do not fit a GPU's shared memory
FULL = (
    "The GPU's memory is full. The same is learned in less of it with --profile faithful, and in still less with "
    "--batch-size 1 and an --accumulation as many times larger; --bits 4 shrinks the base to a third. nvidia-smi shows "
    "who else is at work there. If a checkpoint was written, --resume goes on from it under another profile, too."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe, and what to do around it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    output: Path | None = None
    """The adapter folder to write; adapters/NAME by default."""
    work: Path | None = None
    """Where checkpoints and the TensorBoard log go; runs/NAME by default."""
    profile: Literal["auto", "faithful", "fast"] = "auto"
    """faithful: the stock Trainer. fast, which a GPU gets unless told: the same steps, computed by training/fast.py."""
    resume: bool = False
    """Go on from the last checkpoint, exact to the bit."""
    push: str | None = None
    """USER/NAME on the Hub; the permission to write is checked before training."""
    push_modelscope: str | None = None
    """USER/NAME on ModelScope; asked first, too."""
    private: bool = False
    """A repository that the push creates is seen by you alone."""
    pr: bool = False
    """Push to the Hub as a pull request on a repository that is there."""
    save_on_each_node: bool = False
    """Of several machines that share no disk, each gets the checkpoints and the adapter."""


class Laps:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def end(self, part: str) -> float:
        """A part ends here, and the next one begins; the seconds it took."""
        now = time.perf_counter()
        self.seconds[part], self.began = now - self.began, now
        return self.seconds[part]

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())


def main() -> None:
    """Parse the command line, run, and say in a sentence what went wrong."""
    logging.basicConfig(level=logging.INFO if ranks.first() else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [HUANHUAN.name, *arguments]
    try:
        choices = {name: (recipe.base, Run(recipe=recipe)) for name, recipe in RECIPES.items()}
        chosen = tyro.extras.overridable_config_cli(choices, args=arguments, prog="python -m training.run")
        if adapter := run(chosen):
            log.info("%s is ready: python app.py --base %s", adapter.folder, chosen.recipe.base)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(FULL if type(error).__name__ == "OutOfMemoryError" else str(error))  # torch's own names no remedy
    except KeyboardInterrupt:
        sys.exit("Stopped at once. If a checkpoint was written, --resume goes on from it.")


def run(job: Run, api: Any = None) -> Adapter | None:
    """The whole story: examples, tokens, base, proof, training, measures, card, the gate, and the push.

    Of several processes the first one measures, writes and publishes, and with `save_on_each_node` the first of each
    machine measures and writes. The others return None when training is done.

    Raises ValueError, FileExistsError, Unavailable, Interrupted, PermissionError or ConnectionError, each a sentence
    with the remedy.
    """
    recipe = job.recipe
    output, work = job.output or ROOT / recipe.name, job.work or Path("runs") / recipe.name
    _prepare(job, output, work)
    if ranks.first():
        _require_permission(job, work, api)
    ranks.use_own_gpu()
    profile = _profile(job)

    from chat import local
    from training import data, evaluate, fast, proof, trainer

    laps = Laps()
    examples, held_out, located = _read(recipe, laps)
    tokenizer = local.load_tokenizer(located)
    rows, held_out_rows = (_encode(tokenizer, part, recipe) for part in (examples, held_out))
    _show(tokenizer, examples, rows)
    laps.end("token ids")
    model = trainer.attach(local.load_base(located, bits=recipe.bits), recipe, profile)
    log.info("%s trainable parameters on %s, served by %s",
             f"{trainer.trained_parameters(model):,}", located.base.name, located.source)  # fmt: skip
    laps.end("reading the base")
    log.info(proof.check_isolation(model, rows[:4]))
    laps.end("proof")

    measure = partial(_heldout, model, held_out_rows) if held_out else None
    pause = _before(measure, laps, len(held_out)) if measure else 0.0
    step = fast.Step(model, recipe.max_length) if profile == "fast" else None
    expected = proof.forecast(model, rows, recipe, step, pause)
    log.info("Forecast: %s, profile %s", expected, profile)
    laps.end("forecast")
    train = partial(trainer.train, resume=job.resume, on_each_node=job.save_on_each_node)
    history = train(model, rows, recipe, work, at_epoch_end=measure, step=step)
    if not ranks.writes(job.save_on_each_node):
        return None
    seconds = laps.end("training")
    del step  # and what it recorded, which measuring has better use for
    log.info("Actual:   %s", dataclasses.replace(expected, seconds=seconds, memory=proof.memory_in_use()))

    model = trainer.whole(model, partial(local.load_base, located), recipe)
    trainer.round_to_bf16(model)
    metrics = evaluate.measure(model, tokenizer, recipe, examples, held_out)
    laps.end("measures")
    metrics |= {"data": data.record(recipe.dataset)}
    metrics |= _record(history, expected, seconds, proof.memory_in_use(), len(rows), located.source, profile)
    adapter = _write(model, recipe, metrics, output, located)
    laps.end("files, opened")
    _report(metrics)
    log.info("Parts:    %s", laps)
    if ranks.first():
        _publish(job, adapter, api)
    return adapter


def _read(recipe: Recipe, laps: Laps) -> tuple[list[Any], list[Any], Any]:
    """What is learned, what is held out, and where the base lies."""
    from chat import local
    from training import data

    examples, held_out = data.split(data.load(recipe.dataset), recipe.held_out, recipe.seed)
    log.info("%d examples to learn, %d held out", len(examples), len(held_out))
    laps.end("reading examples")
    located = local.dense(_locate(recipe.base))
    laps.end("finding the base")
    return examples, held_out, located


def _show(tokenizer: Any, examples: list[Any], rows: list[Any]) -> None:
    from training import proof

    log.info("%s\n%s", proof.show_row(tokenizer, rows[0]), proof.check_parity(tokenizer, examples, rows))
    log.info(proof.histogram(rows))


def _profile(job: Run) -> str:
    """faithful or fast. Raises ValueError where fast was asked for and cannot be had, or a step cannot be shared."""
    import torch

    recipe = job.recipe
    plain = set(recipe.layers) == set(LAYERS) and recipe.rank <= MOST_RANK and not recipe.dora and recipe.bits == 16
    plain = plain and not ranks.stock_only()
    if job.profile == "fast" and not plain:
        raise ValueError(
            f"The fast profile adapts all seven layers of a base in 16 bits, up to rank {MOST_RANK}, without DoRA, "
            "FSDP or DeepSpeed. Leave --profile out."
        )
    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)  # for FlashAttention
    auto = "fast" if plain and ampere and find_spec("triton") else "faithful"
    profile = auto if job.profile == "auto" else job.profile
    if profile == "faithful":
        ranks.accumulation(recipe)
    return profile


def _heldout(model: Any, rows: list[Any]) -> dict[str, float]:
    from training import evaluate

    loss = evaluate.heldout_loss(model, rows)
    return {"heldout_loss": loss.per_token, "heldout_terminator": loss.per_terminator}


def _before(measure: Callable[[], dict[str, float]], laps: Laps, rows: int) -> float:
    """Show what is measured before the first step, and return the seconds that takes."""
    log.info("Before:   held-out loss %.3f a token, of %d rows", measure()["heldout_loss"], rows)
    return laps.end("held-out loss")


def _prepare(job: Run, output: Path, work: Path) -> None:
    """Refuse early what would be lost or mixed up later, and note the recipe beside its checkpoints."""
    check_name(output.name)
    _require_bits(job.recipe.bits)
    noted = work / RECIPE
    if job.resume:
        if not noted.exists():
            raise ValueError(f"{work} holds no run to resume. Start without --resume.")
        then = _recorded(noted)
        changed = [name for name, value in _as_json(job.recipe).items() if then.get(name) != value]
        if changed:
            raise ValueError(f"{work} was started with another {', '.join(changed)}. Give the same values to resume.")
        return
    if any(work.glob("checkpoint-*")):
        raise FileExistsError(
            f"{work} holds checkpoints of an earlier run. Add --resume, or delete it, or name another --work."
        )
    if output.exists() and not (output / METRICS).exists():
        raise FileExistsError(f"{output} exists and is no adapter of ours. Name another --output.")
    work.mkdir(parents=True, exist_ok=True)
    if ranks.writes(job.save_on_each_node):
        noted.write_text(json.dumps(_as_json(job.recipe), ensure_ascii=False, indent=1), encoding="utf-8")


def _require_bits(bits: int) -> None:
    """Raise ValueError for bits that cannot be had here, or not in pieces."""
    from chat import local

    local.require_bits(bits)
    if bits != 16 and ranks.stock_only():
        raise ValueError(
            f"FSDP and DeepSpeed take a base in 16 bits, not {bits}. Launch with --multi_gpu, which gives each GPU a "
            "whole base, or leave --bits out."
        )


def _require_permission(job: Run, work: Path, api: Any) -> None:
    """Ask each place that the adapter is to go to; what it would refuse in hours is better heard now."""
    if job.push or job.push_modelscope:
        hub.require_no_secret(work / RECIPE)  # it goes up too, and may name a home folder
    if job.push:
        hub.require_permission(job.push, api or _hf_api(), job.pr, private=job.private)
    if job.push_modelscope:
        modelscope.require_permission(job.push_modelscope, job.private)


def _publish(job: Run, adapter: Adapter, api: Any) -> None:
    """Push to each place. One that fails does not keep the adapter from the other. Raises ConnectionError for both."""
    pushes: list[Callable[[], str]] = []
    if job.push:
        pushes.append(partial(hub.push, adapter, job.push, api or _hf_api(), job.pr))
    if job.push_modelscope:
        pushes.append(partial(modelscope.push, adapter, job.push_modelscope, job.private))
    failed = []
    for push in pushes:
        try:
            log.info("Pushed: %s", push())
        except ConnectionError as error:
            failed.append(str(error))
    if failed:
        raise ConnectionError(" ".join(failed))


def _hf_api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _as_json(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def _recorded(path: Path) -> dict[str, Any]:
    """A recipe as it was written down; there were 16 bits before there was a choice."""
    return {"bits": 16, **json.loads(path.read_text(encoding="utf-8"))}


def _locate(base: str) -> Any:
    from chat.base import locate

    return locate(base)


def _encode(tokenizer: Any, examples: list[Any], recipe: Recipe) -> list[Any]:
    from training.tokens import encode

    return encode(tokenizer, examples, recipe.max_length, recipe.terminator)


def _record(
    history: list[Any], expected: Any, seconds: float, memory: int, rows: int, source: str, profile: str
) -> dict[str, Any]:
    """What the run itself adds to metrics.json."""
    from importlib.metadata import version

    import accelerate

    epochs = [entry for entry in history if "heldout_loss" in entry]
    return {
        "steps": expected.steps,
        "loss_curve": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "heldout_by_epoch": [
            {
                "epoch": round(e["epoch"], 2),
                "step": e["step"],
                "loss": e["heldout_loss"],
                "terminator": e["heldout_terminator"],
            }
            for e in epochs
        ],
        "run": {
            "date": date.today().isoformat(),
            "device": device(),
            "base served by": source,
            "profile": profile,
            "rows learned": rows,
            "tokens": round(expected.tokens),
            "forecast seconds": round(expected.seconds, 1),
            "actual seconds": round(seconds, 1),
            "forecast GB": round(expected.memory / 1e9, 2),
            "actual GB": round(memory / 1e9, 2),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
            "accelerate": accelerate.__version__,
        },
    }


def device() -> str:
    """The GPU by name, or CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _write(model: Any, recipe: Recipe, metrics: dict[str, Any], output: Path, located: Any) -> Adapter:
    """Write the folder beside its final name, open it, and only then give it that name."""
    from training import card, trainer

    part = output.with_name(output.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    trainer.save(model, part)
    for name, value in ((RECIPE, _as_json(recipe)), (METRICS, metrics)):
        (part / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    card.write(part)
    Adapter.open(part, located, output.name)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(part, output)
    if output.parent.resolve() == ROOT:
        (ROOT / CARD).write_text(card.ledger(ROOT), encoding="utf-8")
    return Adapter.open(output, located)


def _report(metrics: dict[str, Any]) -> None:
    for name, metric in metrics.items():
        if isinstance(metric, dict) and "count" in metric:
            log.info("%-26s %8.4f   (%d)", name, metric["value"], metric["count"])


def reopen(folder: Path, base: str | None) -> tuple[Any, Any, Recipe, list[Any], list[Any]]:
    """A trained adapter on its base, the tokenizer, its recipe, what it learned and what was held out from it.

    Nothing counts as held out once the data have changed: rows that are now may have been learned then.
    """
    from peft import PeftModel

    from chat import local
    from training import data

    recorded = _recorded(folder / RECIPE).items()
    recipe = Recipe(**{name: cast("Any", tuple(v) if isinstance(v, list) else v) for name, v in recorded})
    located = local.dense(_locate(base or recipe.base))
    adapter = Adapter.open(folder, located)
    if "run" not in adapter.metrics:
        raise ValueError(f"{folder} has no {METRICS} of its run, which the card needs. Copy the whole folder again.")
    tokenizer = local.load_tokenizer(located)
    learned, held_out = data.split(data.load(recipe.dataset), recipe.held_out, recipe.seed)
    if adapter.metrics.get("data", []) not in ([], data.record(recipe.dataset)):
        log.warning("%s was trained on other data than stand here now. Its numbers on held-out rows stay as they are; "
                    "train it again for new ones.", folder)  # fmt: skip
        held_out = []
    model = PeftModel.from_pretrained(local.load_base(located, bits=recipe.bits), adapter.folder)
    return model, tokenizer, recipe, learned, held_out


if __name__ == "__main__":
    main()
