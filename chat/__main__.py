"""Talk with 甄嬛 in the terminal: `python -m chat [--base small] [--bits 16] [--engine llama] [--adapter NAME]`."""

import argparse
import logging
import sys
import threading
from contextlib import suppress

from chat import ENGINES, load, machine
from chat.bases import MEMORY_7B
from chat.engine import ChatEngine
from chat.persona import GREETING, NAME, Message
from chat.proxies import check_proxies
from chat.sampling import Sampling


def main() -> None:
    """Load the base and its adapters, then answer line by line until an empty line or Ctrl-D."""
    machine.allow_any_terminal()
    parser = argparse.ArgumentParser(prog="python -m chat", description=f"Talk with {NAME}.")
    parser.add_argument("--base", help="small, medium, 7b, or a folder; by default what fits this machine")
    parser.add_argument("--bits", type=int, choices=MEMORY_7B, default=16, help="of its weights; 8 or 4 save memory")
    parser.add_argument("--engine", choices=ENGINES, help="by default what fits this machine")
    parser.add_argument("--adapter", help="an adapter's name, or base for none")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_proxies()
        engine = load(arguments.base, arguments.bits, arguments.engine)
        engine.wait()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(str(error))
    talk(engine, arguments.adapter or engine.adapters[0])


def talk(engine: ChatEngine, adapter: str) -> None:
    """Read questions from standard input and print each reply as it comes; Ctrl-C stops a reply."""
    print(f"{NAME} · {engine.base} · {adapter}\n\n{NAME}：{GREETING}")
    messages: list[Message] = []
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("\n你：").strip():
            messages.append({"role": "user", "content": question})
            print(f"{NAME}：", end="", flush=True)
            reply, cancel = "", threading.Event()
            try:
                for chunk in engine.stream(messages, [adapter], Sampling(temperature=engine.temperature), cancel):
                    reply += chunk.text
                    print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                cancel.set()
            except (ValueError, RuntimeError) as error:
                print(error, end="")
            print()
            messages.append({"role": "assistant", "content": reply or "……"})


if __name__ == "__main__":
    main()
