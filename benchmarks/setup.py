"""What `make demo` costs a newcomer: seconds from nothing to her first answer, disk, memory, for each Python here.

python -m benchmarks.setup [--base medium] [--python python3.12 …]

For each Python the project's files are copied into a fresh folder with an empty cache of its own, where neither pip nor
the Hub finds what an earlier installation left; the clock starts at `make demo`, and one question is asked over the
page's API. Then the same command once more, with packages and base in place. Network and disk are this machine's.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from httpx_sse import connect_sse

from benchmarks import results
from chat.persona import DRESSING

ROOT = Path(__file__).parent.parent
PYTHONS = tuple(f"python3.{minor}" for minor in range(10, 15))
QUESTION = "你是谁？"
TIMEOUT = 900  # seconds for all of it
POLL = 0.05  # seconds between two polls
UNITS = {
    "install_seconds": "s", "page_open_seconds": "s", "first_letter_seconds": "s", "answer_seconds": "s",
    "second_open_seconds": "s", "venv_mb": "MB", "cache_mb": "MB", "memory_mb": "MB",
}  # fmt: skip
# Settings that would change what is measured.
UNSET = (
    "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "REQUIREMENTS", "FLAGS", "MAKEFLAGS",
    "MAKELEVEL", "ENGINE_URL", "MODEL_FOLDER", "MODEL_SOURCE", "ADAPTERS", "MAX_NUM_SEQS", "PLACES", "METRICS",
    "VISITOR_MESSAGES", "VISITOR_TOKENS", "ALL_MESSAGES", "ALL_TOKENS",
)  # fmt: skip
REPORTED = ("gradio", "xllamacpp", "torch", "transformers")  # packages whose versions are kept


class Demo:
    """A `make demo` that runs in a folder, in a process group of its own."""

    def __init__(self, folder: Path, python: str, base: str) -> None:
        """Start it; the clock runs from here."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}/", folder / "make.log"
        flags = f"FLAGS=--base {base} --host 127.0.0.1 --port {port}"
        environment = {name: value for name, value in os.environ.items() if name not in UNSET} | {
            "CHAT_CACHE": str(folder / "cache"), "HF_HUB_CACHE": str(folder / "cache" / "hub"), "PIP_NO_CACHE_DIR": "1",
        }  # fmt: skip
        with self.log.open("w") as log:
            self.began = time.perf_counter()
            self.process = subprocess.Popen(
                ["make", "demo", f"PYTHON={python}", flags], cwd=folder, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def seconds(self) -> float:
        """Since the start."""
        return round(time.perf_counter() - self.began, 1)

    def until_installed(self) -> float:
        """Seconds until make has put down its stamp."""
        while not list((self.log.parent / ".venv").glob("*.stamp")):
            self._poll()
        return self.seconds()

    def until_open(self) -> float:
        """Seconds until the page answers."""
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.address}health").is_success:
                    return self.seconds()
            self._poll()

    def ask(self) -> tuple[float, float, str]:
        """Seconds until her first letter and until the end, and the whole reply; the engine may still be loading."""
        first, text = 0.0, ""
        with httpx.Client(base_url=self.address, timeout=TIMEOUT) as client:
            page = client.get("gradio_api/info").json()["named_endpoints"]["/chat"]
            data = [QUESTION, *(given["parameter_default"] for given in page["parameters"][1:])]
            call = client.post("gradio_api/call/chat", json={"data": data}).raise_for_status()
            with connect_sse(client, "GET", f"gradio_api/call/chat/{call.json()['event_id']}") as events:
                for event in events.iter_sse():
                    text = (json.loads(event.data) or [text])[0] if event.event in ("generating", "complete") else text
                    if not first and text and not text.startswith(DRESSING):
                        first = self.seconds()
        if not first:
            raise RuntimeError(f"She did not answer; the page says {text!r}.")
        return first, self.seconds(), text

    def memory(self) -> float:
        """Bytes that the largest process of it holds: the page."""
        return float(max(one.memory_info().rss for one in psutil.Process(self.process.pid).children(recursive=True)))

    def stop(self) -> None:
        """End the whole group."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(timeout=10)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _poll(self) -> None:
        """Wait a moment. Raises RuntimeError when it ended or takes too long."""
        if self.process.poll() is not None or self.seconds() > TIMEOUT:
            output = self.log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(
                f"`make demo` ended, or was not done after {TIMEOUT} s. Its last words:\n{output[-3000:]}"
            )
        time.sleep(POLL)


@contextmanager
def running(folder: Path, python: str, base: str) -> Iterator[Demo]:
    """A `make demo`, as long as this lasts."""
    demo = Demo(folder, python, base)
    try:
        yield demo
    finally:
        demo.stop()


def copy(folder: Path) -> None:
    """The project's files, those that git does not know yet among them."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def measure(python: str, base: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A row, and the versions of what was installed. Raises RuntimeError with make's last words."""
    with tempfile.TemporaryDirectory(prefix="setup-") as name:
        folder = Path(name)
        copy(folder)
        with running(folder, python, base) as demo:
            row: dict[str, Any] = {"python": version(python), "base": base, "install_seconds": demo.until_installed()}
            row["page_open_seconds"] = demo.until_open()
            row["first_letter_seconds"], row["answer_seconds"], reply = demo.ask()
            memory = demo.memory()
        with running(folder, python, base) as demo:
            row["second_open_seconds"] = demo.until_open()
        packages = installed(folder)
        row |= {"venv_mb": megabytes(folder / ".venv"), "cache_mb": megabytes(folder / "cache")}
        row |= {"memory_mb": round(memory / 1e6), "torch": "yes" if "torch" in packages else "no"}
        print(f"{row['python']}: {len(packages)} packages; {QUESTION} {reply}", file=sys.stderr)
        return row, packages


def installed(folder: Path) -> dict[str, str]:
    """Names and versions of the packages in the folder's environment."""
    infos = (folder / ".venv").glob("lib/*/site-packages/*.dist-info")
    parts = (path.name.removesuffix(".dist-info").rpartition("-") for path in infos)
    return {re.sub(r"[-_.]+", "-", name).lower(): number for name, _, number in parts}


def megabytes(folder: Path) -> int:
    """What a folder takes on the disk."""
    return round(sum(512 * path.lstat().st_blocks for path in folder.rglob("*")) / 1e6)


def version(python: str) -> str | None:
    """The version of an interpreter; None when it does not run."""
    try:
        asked = [python, "-c", "import platform; print(platform.python_version())"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.setup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="medium", help="small, medium or 7b")
    parser.add_argument("--python", nargs="+", metavar="PYTHON", help="by default each of 3.10 to 3.14 on the path")
    chosen = parser.parse_args(arguments)
    pythons = chosen.python or [python for python in PYTHONS if version(python)]
    if missing := [python for python in pythons if not version(python)]:
        sys.exit(f"{missing[0]} does not run here. Name interpreters that do: --python /path/to/python3.12")
    if not pythons:
        sys.exit("None of Python 3.10 to 3.14 is on the path. Name one: --python /path/to/python3.12")
    rows: list[dict[str, Any]] = []
    packages: dict[str, str] = {}
    for python in pythons:
        try:
            row, packages = measure(python, chosen.base)
        except RuntimeError as error:
            sys.exit(f"{python}: {error}")
        rows.append(row)
    results.save("setup", rows, UNITS, versions={name: packages[name] for name in REPORTED if name in packages})
    print(results.table("setup"))


if __name__ == "__main__":
    main()
