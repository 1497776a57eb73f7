"""Run each peer in a process of its own, with the Python of its environment, and collect its rows.

A worker prints one line of JSON for each row, after ROW. Standard library only, so that every peer can import it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"
MARK = "ROW "
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def report(row: dict[str, Any], packages: Sequence[str]) -> None:
    """In a worker: hand over one row, with the machine and the versions of `packages`."""
    print("\n" + MARK + json.dumps({"row": row, "kind": results.kind(), "machine": results.machine(),
                             "versions": results.versions(packages)}), flush=True)  # fmt: skip


def python_of(environment: str) -> Path:
    """The interpreter that run.sh made for a peer. Exits with the command that makes it where there is none."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} does not exist. Make it: benchmarks/peers/run.sh make {environment}")
    return python


def run_worker(environment: str, arguments: Sequence[str], log: Path, seconds: float) -> list[dict[str, Any]]:
    """What one worker reported. Its output goes to `log`; one that fails or takes longer than `seconds` ends there."""
    variables = os.environ | OFFLINE
    # xformers' wheel is built for CUDA 12, torch here for 13: Unsloth finds the older runtime by this path.
    runtime = [
        str(path) for path in (ENVIRONMENTS / environment).glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    ]
    variables["LD_LIBRARY_PATH"] = os.pathsep.join([*runtime, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(python_of(environment)), *arguments], cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            outcome = f"exit status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            outcome = f"not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # vLLM has processes of its own
                process.wait()
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if process.returncode:
        print(
            f"{' '.join(arguments)}: {outcome}. The end of {log}:", *said[-20:], sep="\n", file=sys.stderr, flush=True
        )
    return [json.loads(line.removeprefix(MARK)) for line in said if line.startswith(MARK)]


def save(name: str, reports: Sequence[dict[str, Any]], units: dict[str, str], own: str, column: str, ours: str) -> None:
    """Write results/NAME-KIND.json and print its table: what was reported, then our own rows of such a GPU.

    Those are the rows of results/OWN-KIND.json whose `column` says `ours`, if our benchmark was run here before.
    """
    if not reports:
        sys.exit("No peer was measured.")
    kind, told = reports[0]["kind"], [report["versions"] for report in reports]
    shared = {package: number for package, number in told[0].items() if all(v.get(package) == number for v in told)}
    rows = [report["row"] for report in reports]
    if (file := results.FOLDER / f"{own}-{kind}.json").exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        kept = [column, "batch", "adapters", *units]
        found = [{key: row[key] for key in kept if key in row} for row in record["rows"] if row[column] == ours]
        rows += [row | {column: f"this project, {record['date']}"} for row in found]
    results.save(f"{name}-{kind}", rows, units, machine=reports[0]["machine"], versions=shared)
    print(results.table(f"{name}-{kind}"), flush=True)
