"""Talk with 甄嬛 in the terminal: `python -m chat [--base small] [--bits 16] [--engine llama] [--adapter NAME]`."""

import argparse
import logging
import sys
import threading

from chat import ENGINES, load
from chat.base import MEMORY_7B
from chat.engine import Awaited, Busy, ChatEngine, Sampling
from chat.fetch import Unavailable
from chat.persona import GREETING, NAME, Message


def main() -> None:
    """Load the base and its adapters, then answer line by line until an empty line or Ctrl-D."""
    parser = argparse.ArgumentParser(prog="python -m chat", description=f"Talk with {NAME}.")
    parser.add_argument("--base", help="small, medium, 7b, or a folder; by default what fits this machine")
    parser.add_argument("--bits", type=int, choices=MEMORY_7B, default=16, help="of its weights; 8 or 4 save memory")
    parser.add_argument("--engine", choices=ENGINES, help="by default what fits this machine")
    parser.add_argument("--adapter", help="an adapter's name, or base for none")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        engine = load(chosen.base, chosen.bits, chosen.engine)
        engine = engine.wait() if isinstance(engine, Awaited) else engine
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(str(error))
    talk(engine, chosen.adapter or engine.adapters[0])


def talk(engine: ChatEngine, adapter: str) -> None:
    """Read questions from standard input and print each reply as it comes; Ctrl-C stops a reply."""
    print(f"{NAME} · {engine.base} · {adapter}\n\n{NAME}：{GREETING}")
    turns: list[Message] = []
    while question := _ask():
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": _say(engine, turns, adapter)})


def _ask() -> str:
    try:
        return input("\n你：").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _say(engine: ChatEngine, turns: list[Message], adapter: str) -> str:
    said = ""
    print(f"{NAME}：", end="", flush=True)
    cancel = threading.Event()
    try:
        for piece in engine.stream(turns, adapter, Sampling(), cancel):
            said += piece.text
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        cancel.set()
    except (ValueError, Busy, Unavailable) as error:
        print(error, end="")
    print()
    return said or "……"


if __name__ == "__main__":
    main()
