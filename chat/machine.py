"""What this machine has: free memory, usable cores, an NVIDIA or AMD GPU for torch."""

import ctypes
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own limits
ZERO_GPU = "SPACES_ZERO_GPU"  # set on a Space with ZeroGPU


def available_memory() -> int:
    """Bytes that a program can still take, of the machine or of its container, whichever allows less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit == "max":
            return free
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(held.get("inactive_file", 0)) + int(held.get("active_file", 0))  # the kernel can drop this cache
        return min(free, int(limit) - int(used) + files)
    except (OSError, ValueError):
        return free


def usable_cores() -> int:
    """Cores worth a thread each: those that this process may use; of more than four, one for each physical core."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable > 4:
        usable = max(4, min(usable, psutil.cpu_count(logical=False) or usable))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return usable if quota == "max" else max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return usable


def allow_any_terminal() -> None:
    """Let what the terminal's encoding does not have be printed as escapes: Chinese would end the program elsewhere."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def has_gpu() -> bool:
    """Whether torch is installed and has a GPU, or ZeroGPU will lend one. Imports torch only where a driver is."""
    if os.environ.get(ZERO_GPU):
        return True
    if not find_spec("torch") or not _has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def _has_driver() -> bool:
    nvidia = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return Path("/dev/kfd").exists() or bool(ctypes.CDLL(nvidia))  # the first is AMD's
    except OSError:
        return False
