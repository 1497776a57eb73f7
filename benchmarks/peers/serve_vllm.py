"""vLLM on the work of benchmarks/decode.py: questions of 60 tokens, Qwen2.5's sampling, LoRAs of rank 8.

benchmarks/peers/run.sh serve                          makes vLLM's environment and runs all of this
python -m benchmarks.peers.serve_vllm [--only NAME ...] [--tokens 128]
ANY/PYTHON -m benchmarks.peers.serve_vllm --one NAME   one engine by this interpreter

The weights are vLLM's dummies in the 7B's architecture: as fast as real ones. Of so many adapters each conversation
uses one, and every so many-and-first none, as in benchmarks/decode.py. Tokens a second are counted after the last
conversation's first token, for all of them together; each row is the median of three.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers import launcher

MODULE = "benchmarks.peers.serve_vllm"
WORK = launcher.ENVIRONMENTS / "work"
UNITS = {"tokens_per_second": "tokens/s", "first_token_ms": "ms", "tenth_turn_ms": "ms", "switch_ms": "ms"}
QUESTION, CHAT = 60, 900  # tokens of a first question, and of a chat before its tenth
RANK, ADAPTERS = 8, 4
ROWS = ((1, 1), (8, 1), (8, 4), (32, 1), (32, 4))  # conversations at once, adapters among them
ENGINES: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": {"quantization": "fp8"}}  # what LLM() is given besides


@dataclass(frozen=True)
class Size:
    """A Qwen2 architecture."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the seven layers that a LoRA adapts, by name."""
        wide, inner = self.hidden_size, self.intermediate_size
        kv = wide // self.num_attention_heads * self.num_key_value_heads
        return {
            "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (wide, kv), "self_attn.v_proj": (wide, kv),
            "self_attn.o_proj": (wide, wide), "mlp.gate_proj": (wide, inner), "mlp.up_proj": (wide, inner),
            "mlp.down_proj": (inner, wide),
        }  # fmt: skip


TINY = Size(128, 256, 2, 4, 2, 1024)


def write_base(folder: Path, size: Size) -> None:
    """config.json alone: vLLM makes the weights up."""
    config = vars(size) | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "use_sliding_window": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_adapter(folder: Path, size: Size, seed: int) -> None:
    """A LoRA in PEFT's format that changes something. A folder that has its adapter_config.json is whole."""
    import torch
    from safetensors.torch import save_file

    if (folder / "adapter_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(size.num_hidden_layers):
        for name, (inputs, outputs) in size.linear_layers().items():
            for half, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                values = 0.01 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.model.layers.{layer}.{name}.{half}.weight"] = values.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.split(".")[1] for name in size.linear_layers()]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4 * RANK, "bias": "none",
              "target_modules": names, "base_model_name_or_path": "random"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def random_prompt(tokens: int, seed: int, vocabulary: int) -> list[int]:
    """Token ids that nobody asked before."""
    drawn = random.Random(seed)
    return [drawn.randrange(min(vocabulary, 150_000)) for _ in range(tokens)]


class Server:
    """vLLM in this process, stepped here: a time is that at which a token reaches this process."""

    def __init__(self, name: str, size: Size, memory: float) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        folder = WORK / ("vllm-tiny" if size == TINY else "vllm")
        write_base(folder / "base", size)
        for n in range(ADAPTERS):
            write_adapter(folder / f"adapter{n}", size, n)
        self.size = size
        self.engine = LLM(
            str(folder / "base"), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2560,
            max_num_seqs=32, gpu_memory_utilization=memory, enable_prefix_caching=True, enable_lora=True,
            max_loras=ADAPTERS, max_cpu_loras=ADAPTERS, max_lora_rank=RANK, **ENGINES[name],
        ).llm_engine  # fmt: skip
        self.adapters = [LoRARequest(f"adapter{n}", n + 1, str(folder / f"adapter{n}")) for n in range(ADAPTERS)]
        self.asked = 0

    def ask(self, prompts: Sequence[list[int]], adapters: Sequence[int], tokens: int) -> tuple[list[float], float]:
        """Seconds until each prompt's first token, and until the last token of all. Adapter -1 is the base alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_tokens=tokens, ignore_eos=True,
            detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        first: dict[str, float] = {}
        counts: dict[str, int] = {}
        last, began = 0.0, time.perf_counter()
        for prompt, adapter in zip(prompts, adapters, strict=True):
            self.asked += 1
            lora = {"lora_request": self.adapters[adapter]} if adapter >= 0 else {}
            self.engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, sampling, **lora)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                last = time.perf_counter() - began
                new = sum(len(part.token_ids) for part in output.outputs)
                if new:
                    first.setdefault(output.request_id, last)
                counts[output.request_id] = counts.get(output.request_id, 0) + new
        if len(counts) != len(prompts) or set(counts.values()) != {tokens}:
            raise RuntimeError(f"asked for {tokens} tokens of {len(prompts)} replies, got {sorted(counts.values())}")
        return list(first.values()), last

    def prompt(self, tokens: int, seed: int) -> list[int]:
        """Random ids within the vocabulary."""
        return random_prompt(tokens, seed, self.size.vocab_size)

    def together(self, count: int, adapters: int, tokens: int, seed: int) -> float:
        """Tokens a second of so many conversations, after the last one's first token."""
        used = [n % (adapters + 1) - 1 for n in range(count)] if count > 1 else [0]
        first, last = self.ask([self.prompt(QUESTION, seed + n) for n in range(count)], used, tokens)
        return count * (tokens - 1) / (last - max(first))

    def first_ms(self, prompt: list[int], adapter: int = 0) -> float:
        """Milliseconds to the first token of one question."""
        return 1000 * self.ask([prompt], [adapter], 1)[1]

    def latencies(self) -> dict[str, float]:
        """A first question, the tenth turn of a chat whose start is cached, and what another adapter costs."""
        fresh, tenth, same, other = [], [], [], []
        for n in range(5):
            fresh.append(self.first_ms(self.prompt(QUESTION, 10_100 + n)))
            chat = self.prompt(CHAT, 10_200 + n)
            self.first_ms(chat)
            tenth.append(self.first_ms(chat + self.prompt(QUESTION, 10_300 + n)))
            same.append(self.first_ms(self.prompt(QUESTION, 10_400 + n)))
            other.append(self.first_ms(self.prompt(QUESTION, 10_500 + n), 1 + n % (ADAPTERS - 1)))
        return {
            "first_token_ms": round(statistics.median(fresh), 1),
            "tenth_turn_ms": round(statistics.median(tenth), 1),
            "switch_ms": round(statistics.median(other) - statistics.median(same), 2),
        }


def measure(name: str, tokens: int, memory: float, tiny: bool) -> None:
    """Report all rows of one engine."""
    server = Server(name, TINY if tiny else Size(), memory)
    for count, adapters in ROWS:
        server.together(count, adapters, 8, 0)
        server.together(count, adapters, tokens, 1000)  # once unmeasured: each batch size has a graph of its own
        speeds = [server.together(count, adapters, tokens, 2000 + 1000 * n) for n in range(3)]
        row = {"engine": f"vLLM {version('vllm')}, {name}", "batch": count, "adapters": adapters,
               "tokens_per_second": round(statistics.median(speeds), 1)}  # fmt: skip
        launcher.report(row | (server.latencies() if count == 1 else {}), ("vllm", "torch", "transformers"))


def main() -> None:
    """Measure each engine in a process of its own, or one in this process."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="some of the engines")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply")
    parser.add_argument("--memory", type=float, default=0.6, help="part of the GPU's memory that vLLM may take")
    parser.add_argument("--each", type=float, default=900, help="seconds that one engine may take")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--one", choices=ENGINES, help="measure one engine by this interpreter")
    chosen = parser.parse_args()
    if chosen.one:
        measure(chosen.one, chosen.tokens, chosen.memory, chosen.tiny)
        return
    reports = []
    for name in chosen.only:
        arguments = ["-m", MODULE, "--one", name, "--tokens", str(chosen.tokens), "--memory", str(chosen.memory),
                     *(["--tiny"] if chosen.tiny else [])]  # fmt: skip
        reports += launcher.run_worker("vllm", arguments, WORK / f"vllm-{name}.log", chosen.each)
    launcher.save("serve-peers", reports, UNITS, "serve", "engine", "ours")


if __name__ == "__main__":
    main()
