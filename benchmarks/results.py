"""Results of the benchmarks: written as JSON with machine, versions and date, shown as tables in the README.

python -m benchmarks.results    writes the tables of benchmarks/README.md and of docs/reliability.md anew
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
PAGES = (Path(__file__).parent / "README.md", DOCS / "reliability.md", DOCS / "reliability_zh.md")
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PACKAGES = ("torch", "transformers", "peft", "xllamacpp", "gradio")


def save(name: str, rows: list[dict[str, Any]], units: dict[str, str], **more: Any) -> None:
    """Write results/NAME.json; `units` names the columns of numbers, `more` is kept beside the rows."""
    record = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "units": units}
    text = json.dumps(record | more | {"rows": rows}, ensure_ascii=False, indent=1)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def machine() -> str:
    """The GPU by name, or the processor, and how many cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    """Its name where Linux tells it, and whether it has AVX-512: half of a speed on a CPU may hang on that."""
    cpuinfo = Path("/proc/cpuinfo")
    told = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    if not name:
        return platform.processor() or platform.machine()
    return f"{name[1].strip()}{', AVX-512' if 'avx512f' in told else ''}"


def kind() -> str:
    """What a file of results is called after: h100 of NVIDIA H100 80GB HBM3, gpu where no model is told so, or cpu."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    model = re.search(r"\b[A-Z]+\d+", torch.cuda.get_device_name())
    return model[0].lower() if model else "gpu"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of the packages that decide a speed, as far as they are here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except ImportError:
            continue
    return found


def table(name: str) -> str:
    """results/NAME.json in Markdown, with a line that says where it was measured."""
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(column for row in record["rows"] for column in row))
    head = [f"{column}, {record['units'][column]}" if column in record["units"] else column for column in columns]
    lines = [head, ["---"] * len(head), *([_cell(row.get(column)) for column in columns] for row in record["rows"])]
    packages = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    where = f"{record['date']} · {record['machine']} · {packages}"
    return "\n".join([where, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)


def main() -> None:
    """Put each table between its marks on the pages."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(TABLE.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
