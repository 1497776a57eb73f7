"""How steady the pass rates are: identity, canon and attacks drawn anew, seed by seed.

python -m benchmarks.seeds [--base small] [--adapter pocket] [--seeds 20240601 1 2]

The evaluation draws each answer once, with one seed, by `generate`; here the page's engine draws it, one reply at a
time. Minutes a seed on a CPU.
"""

import argparse
import threading
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks import results
from chat import load_here
from chat.engine import Awaited, ChatEngine, Sampling
from training.evaluate import ASKED, SEED
from training.probes import Attack, Probe
from training.recipe import POCKET


def passed(engine: ChatEngine, adapter: str, probes: Sequence[Probe | Attack], seed: int) -> int:
    """How many answers pass."""
    sampling = Sampling(seed=seed, max_new_tokens=POCKET.reply_tokens)
    passes = 0
    for probe in tqdm(probes, desc=f"seed {seed}", leave=False):
        pieces = engine.stream([{"role": "user", "content": probe.question}], adapter, sampling, threading.Event())
        passes += not probe.fault("".join(piece.text for piece in pieces))
    return passes


def main() -> None:
    """Measure, keep and print a row for each seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="small")
    parser.add_argument("--adapter", default="pocket")
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEED, 1, 2])
    chosen = parser.parse_args()
    loaded = load_here(chosen.base)
    engine = loaded.wait() if isinstance(loaded, Awaited) else loaded
    if chosen.adapter not in engine.adapters:
        parser.error(f"{chosen.adapter} is no adapter of {chosen.base}; adapters/README.md names what there is.")
    rows = []
    for seed in chosen.seeds:
        row = {kind: passed(engine, chosen.adapter, probes, seed) for kind, (_, probes) in ASKED.items()}
        rows.append({"seed": str(seed), **row})
    name = f"seeds-{results.kind()}-{chosen.adapter}"
    units = {kind: f"of {len(probes)}" for kind, (_, probes) in ASKED.items()}
    results.save(name, rows, units, base=engine.base, weights=engine.digest(chosen.adapter))
    print(results.table(name))


if __name__ == "__main__":
    main()
