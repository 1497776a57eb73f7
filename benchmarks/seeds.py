"""How much the pass rates vary: identity, canon and attacks drawn anew, seed by seed.

python -m benchmarks.seeds [--base small] [--adapter pocket] [--seeds 20240601 1 2]

The evaluation draws each answer once, with one seed, by `generate`; here the page's engine draws it, one reply at a
time. A seed takes minutes on a CPU.
"""

import argparse
import threading
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks import results
from chat import load_here
from chat.engine import ChatEngine
from chat.sampling import Sampling
from training.evaluate.probes import PROBE_SETS, Attack, Probe
from training.evaluate.scores import SEED
from training.recipe import POCKET


def passed(engine: ChatEngine, adapter: str, probes: Sequence[Probe | Attack], seed: int) -> int:
    """How many answers pass."""
    sampling = Sampling(seed=seed, max_new_tokens=POCKET.reply_tokens)
    passes = 0
    for probe in tqdm(probes, desc=f"seed {seed}", leave=False):
        chunks = engine.stream([{"role": "user", "content": probe.question}], [adapter], sampling, threading.Event())
        passes += not probe.fault("".join(chunk.text for chunk in chunks))
    return passes


def main() -> None:
    """Measure, keep and print a row for each seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="small")
    parser.add_argument("--adapter", default="pocket")
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEED, 1, 2])
    arguments = parser.parse_args()
    engine = load_here(arguments.base)
    engine.wait()
    if arguments.adapter not in engine.adapters:
        parser.error(f"{arguments.adapter} is no adapter of {arguments.base}; adapters/README.md names what there is.")
    rows = []
    for seed in arguments.seeds:
        row = {kind: passed(engine, arguments.adapter, probes, seed) for kind, (_, probes) in PROBE_SETS.items()}
        rows.append({"seed": str(seed), **row})
    name = f"seeds-{results.kind()}-{arguments.adapter}"
    units = {kind: f"of {len(probes)}" for kind, (_, probes) in PROBE_SETS.items()}
    results.save(name, rows, units, base=engine.base, weights=engine.digest(arguments.adapter))
    print(results.table(name))


if __name__ == "__main__":
    main()
