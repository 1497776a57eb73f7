"""The figures of an adapter's card: loss curve, radar, marker rates. Each is a PNG drawn from metrics.json."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from chat.files import whole
from training.evaluate.scores import BASE, MARKERS

# rates from 0 to 1 → their names on the radar
AXES = {
    "identity_pass_rate": "identity", "canon_pass_rate": "canon", "attack_pass_rate": "attacks withstood",
    "long_chat_pass_rate": "long chats", "stop_rate": "ends by herself", "distinct_2": "distinct-2",
}  # fmt: skip


@contextmanager
def _figure(path: Path, **axes: Any) -> Iterator[Any]:
    """Axes to draw on, saved to `path` at the end without the version of matplotlib."""
    figure = Figure(figsize=(7, 4), dpi=110)
    drawn = figure.subplots(subplot_kw=axes)
    yield drawn
    drawn.grid(alpha=0.3)
    figure.tight_layout()
    with whole(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def loss(metrics: dict[str, Any], path: Path) -> None:
    """The loss curve: of training, and of the validation rows."""
    with _figure(path) as axes:
        steps, losses = zip(*metrics["loss_curve"], strict=True) if metrics["loss_curve"] else ((), ())
        axes.plot(steps, losses, label="training, every token learned")
        if by_epoch := metrics.get("heldout_by_epoch"):
            points = [(0, metrics[f"heldout_loss{BASE}"]["value"]), *((e["step"], e["loss"]) for e in by_epoch)]
            axes.plot(*zip(*points, strict=True), "o--", label="held out, text tokens")
        axes.set(xlabel="step", ylabel="loss per token (nats)")
        axes.legend()


def radar(metrics: dict[str, Any], path: Path) -> None:
    """Base against adapter, rate by rate; a rate that was not measured on both has no axis."""
    shown = [name for name in AXES if name in metrics and name + BASE in metrics]
    angles = [2 * math.pi * i / len(shown) for i in range(len(shown))]
    with _figure(path, projection="polar") as axes:
        for side, suffix in (("base", BASE), ("adapter", "")):
            values = [metrics[name + suffix]["value"] for name in shown]
            axes.plot(angles + angles[:1], values + values[:1], label=side)
            axes.fill(angles, values, alpha=0.15)
        axes.set_xticks(angles, [AXES[name] for name in shown])
        axes.tick_params(axis="x", pad=14)  # names clear of the circle
        axes.set_ylim(0, 1)
        axes.legend(loc="lower left", bbox_to_anchor=(1.1, 0))


def markers(metrics: dict[str, Any], path: Path) -> None:
    """The share of replies with each marker of her voice: base, adapter, and the validation rows' own replies."""
    sides = metrics.get("markers", {})
    with _figure(path) as axes:
        for i, (side, rates) in enumerate(sides.items()):
            axes.bar([x + 0.27 * (i - 1) for x in range(len(rates))], list(rates.values()), width=0.25, label=side)
        names = [MARKERS.get(marker, marker) for marker in next(iter(sides.values()), {})]
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set(ylabel="share of replies")
        if sides:
            axes.legend()
