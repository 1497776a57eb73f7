"""One optimiser step of the recipe `huanhuan` by its peers: stock Trainer, Liger, TRL and Unsloth.

benchmarks/peers/run.sh train                            makes an environment for each peer and runs all of this
python -m benchmarks.peers.train_peers [--only NAME ...] [--steps 20]
ANY/PYTHON -m benchmarks.peers.train_peers --one NAME    one peer by this interpreter, after --prepare

The rows are those that benchmarks/train.py draws: 16 a step, in the same order for every peer, flattened or packed, not
padded. The base is the 7B's architecture with random weights in bf16; LoRA, learning rate and optimiser are the
recipe's. `step_seconds` is the time of 16 rows after the warm-up, also where a packed step holds more or fewer.
"""

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from benchmarks.peers import launcher

MODULE = "benchmarks.peers.train_peers"
WORK = launcher.ENVIRONMENTS / "work"
WARM = 6  # steps not counted: compiling, autotuning, the allocator
UNITS = {"step_seconds": "s", "run_seconds": "s", "peak_gib": "GiB", "tokens_per_second": "tokens/s"}


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    package: str  # whose version the row names
    environment: str
    dropout: float = 0.1
    packed: bool = False


PEERS = {
    "stock": Peer("transformers", "stock"),
    "liger": Peer("liger-kernel", "liger"),
    "trl": Peer("trl", "trl"),
    "trl-packed": Peer("trl", "trl", packed=True),
    "unsloth": Peer("unsloth", "unsloth"),
    "unsloth-no-dropout": Peer("unsloth", "unsloth", dropout=0.0),
    "unsloth-packed": Peer("unsloth", "unsloth", dropout=0.0, packed=True),
}


def prepare(steps: int, tiny: bool) -> None:
    """Write the rows, the recipe and the tokenizer to WORK, by the code of this project: peers need none of it."""
    from benchmarks import models

    chosen = argparse.Namespace(base="7b", random=True, dataset=None)
    recipe, tokenizer, rows = models.load(chosen)
    config = models.ARCHITECTURE.to_dict()
    if tiny:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}  # fmt: skip
    batch = recipe.global_batch_size
    part = random.Random(0).sample(rows, min(len(rows), batch * (steps + WARM)))
    task = {
        "rows": [{"input_ids": row.input_ids, "labels": row.labels} for row in part],
        "batch": batch,
        "tokens_per_step": batch * statistics.fmean(len(row.input_ids) for row in rows),
        "steps": recipe.steps(len(rows)),
        "learning_rate": recipe.learning_rate,
        "lora": {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": list(recipe.layers)},
        "config": config,
    }
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "task.json").write_text(json.dumps(task, default=str), encoding="utf-8")
    tokenizer.save_pretrained(WORK / "tokenizer")


def random_base(config: dict[str, Any]) -> Any:
    """The architecture with random weights in bf16, on the GPU if there is one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2ForCausalLM._from_config(Qwen2Config(**config), dtype=torch.bfloat16)


def with_lora(task: dict[str, Any], dropout: float) -> Any:
    """A random base with a fresh LoRA by PEFT."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=dropout, **task["lora"])
    return get_peft_model(random_base(task["config"]), lora)


def arguments(task: dict[str, Any], batch: int) -> dict[str, Any]:
    """Fields of TrainingArguments, which SFTConfig takes as well."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(WORK / "out"), "per_device_train_batch_size": batch, "num_train_epochs": 1,
        "learning_rate": task["learning_rate"], "lr_scheduler_type": "linear", "bf16": gpu, "use_cpu": not gpu,
        "gradient_checkpointing": False, "optim": "adamw_torch_fused" if gpu else "adamw_torch", "logging_steps": 5,
        "save_strategy": "no", "report_to": [], "remove_unused_columns": False, "dataloader_pin_memory": gpu,
        "train_sampling_strategy": "sequential",  # every peer the same rows in a step
    }  # fmt: skip


def stock(task: dict[str, Any], peer: Peer) -> Any:
    """transformers' Trainer on flattened batches, with Liger's kernels if that is the peer."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    if peer.environment == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()  # RoPE, SwiGLU, RMSNorm, and the head fused with the loss
    return Trainer(
        model=with_lora(task, peer.dropout),
        args=TrainingArguments(**arguments(task, task["batch"])),
        train_dataset=task["rows"],
        data_collator=DataCollatorWithFlattening(),
    )


def sft(task: dict[str, Any], peer: Peer) -> Any:
    """TRL's SFTTrainer, padding-free or packed, on PEFT's model or on Unsloth's."""
    if peer.environment == "unsloth":
        model, tokenizer = unsloth(task, peer.dropout)
    else:
        from transformers import AutoTokenizer

        model, tokenizer = with_lora(task, peer.dropout), AutoTokenizer.from_pretrained(WORK / "tokenizer")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if peer.packed:  # a pack of about as many tokens as a step has, and one pack a step
        mean = statistics.fmean(len(row["input_ids"]) for row in task["rows"])
        kind = {"packing": True, "packing_strategy": "bfd", "max_length": round(task["batch"] * mean)}
    else:
        kind = {"packing": False, "padding_free": True, "max_length": None}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(task, 1 if peer.packed else task["batch"]), **kind),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=tokenizer,
    )


def unsloth(task: dict[str, Any], dropout: float) -> tuple[Any, Any]:
    """Unsloth's model with a LoRA, read from a folder that is written once in a process without Unsloth's patches."""
    import torch
    from unsloth import FastLanguageModel

    base = WORK / "base"
    if not (base / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, "-m", MODULE, "--write-base"], check=True, cwd=launcher.ROOT)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(base), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, lora_dropout=dropout, bias="none", use_gradient_checkpointing=False, **task["lora"]
    )
    return model, tokenizer


def write_base(task: dict[str, Any]) -> None:
    """The random base and the tokenizer as a folder, the tokenizer last: where it is, the folder is whole."""
    from transformers import AutoTokenizer

    model = random_base(task["config"])
    tokenizer = AutoTokenizer.from_pretrained(WORK / "tokenizer")
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(WORK / "base")
    tokenizer.save_pretrained(WORK / "base")


def measure(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """One row: train through all the rows once, and time the steps after the warm-up."""
    peer = PEERS[name]
    if peer.environment == "unsloth":
        importlib.import_module("unsloth")  # before torch and transformers, which it patches
    trainer = (stock if peer.environment in ("stock", "liger") else sft)(task, peer)
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        began = 0.0
        steps = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Note when the warm-up ended."""
            self.steps = state.global_step
            if self.steps == WARM:
                self.began = now()

    clock = Clock()
    trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    counted = clock.steps - WARM
    if counted < 1:
        raise RuntimeError(f"{clock.steps} steps are too few to count any. Prepare more: --prepare --steps 20.")
    seconds = (now() - clock.began) / counted
    step = seconds * task["batch"] * clock.steps / len(task["rows"])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "profile": f"{peer.package} {version(peer.package)}" + (", packed" if peer.packed else ""),
        "dropout": peer.dropout, "step_seconds": round(step, 4), "run_seconds": round(step * task["steps"], 1),
        "peak_gib": round(memory / 2**30, 1), "tokens_per_second": round(task["tokens_per_step"] / step),
        "steps_measured": counted,
    }  # fmt: skip


def main() -> None:
    """Measure all peers, each in its environment, or do one part of that."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="some of the peers")
    parser.add_argument("--steps", type=int, default=20, help="to count, after the warm-up")
    parser.add_argument("--each", type=float, default=900, help="seconds that one peer may take")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the scripts")
    parser.add_argument("--prepare", action="store_true", help="only write the rows and the tokenizer")
    parser.add_argument("--write-base", action="store_true", help="only write the base that Unsloth reads, 15 GB")
    parser.add_argument("--one", choices=PEERS, help="measure one peer by this interpreter")
    chosen = parser.parse_args()
    if chosen.one or chosen.write_base:
        task = json.loads((WORK / "task.json").read_text(encoding="utf-8"))
        if chosen.write_base:
            write_base(task)
        else:
            launcher.report(measure(chosen.one, task), ("torch", "transformers", "peft", PEERS[chosen.one].package))
        return
    prepare(chosen.steps, chosen.tiny)
    if chosen.prepare:
        return
    reports = []
    for name in chosen.only:
        arguments = ["-m", MODULE, "--one", name]
        found = launcher.run_worker(PEERS[name].environment, arguments, WORK / f"{name}.log", chosen.each)
        reports += found
        print(name, *(report["row"] for report in found), flush=True)
    launcher.save("train-peers", reports, UNITS, "train", "profile", "fast")


if __name__ == "__main__":
    main()
