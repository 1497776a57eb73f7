"""Faults, floods and forgeries on purpose: what was done to the system, how often, and whether it held.

python -m benchmarks.torture [PARTS ...] [--scale 0.1]

All parts take some 18 minutes on two cores (`make torture`). `--scale` makes each part shorter. The table is written
to benchmarks/results/torture.json; parts that did not run keep their rows. The exit status is 1 when something did
not hold.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.torture import engines, files, network, page, training

NAME = "torture"
PARTS: dict[str, Callable[[float, Path], list[dict[str, Any]]]] = {
    "page": page.flood, "api": page.api, "engines": engines.torture, "files": files.torture,
    "training": training.torture, "network": network.torture,
}  # fmt: skip


def main() -> None:
    """Run the parts, print the table, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="by default all of them")
    parser.add_argument("--scale", type=float, default=1.0, help="of the time and the number of tries")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what is done on purpose need not be told
    kept = results.FOLDER / f"{NAME}.json"
    rows = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.exists() else []
    if len(args.parts) != 1:  # each in a process of its own: what one left running would disturb the next
        command = [sys.executable, "-m", "benchmarks.torture", "--scale", str(args.scale)]
        sys.exit(max([subprocess.run([*command, name], check=False).returncode for name in args.parts or PARTS]))
    for name in args.parts:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            made = [dict(row) for row in PARTS[name](args.scale, Path(folder))]
        rows = [row for row in rows if row["part"] != made[0]["part"]] + made
        for row in made:
            print(f"{'held' if row['held'] else 'FAULT'}  {row['part']}: {row['what']} ×{row['times']}")
            print(f"      {row['found']}")
        print(f"      {name} took {time.monotonic() - began:.0f} s", flush=True)
    rows.sort(key=lambda row: list(PARTS).index(row["part"].lower()))
    results.save(NAME, rows, {})
    sys.exit(not all(row["held"] for row in rows))


if __name__ == "__main__":
    main()
